"""The callback that long steps report to."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)
