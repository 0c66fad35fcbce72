"""Compressing on another device than the host: tests/compress/pretended_device in a process of its own.

To work on it: PRETEND_DEVICE=1 pytest tests/compress/pretended_device
"""

from __future__ import annotations

from pathlib import Path


def test_on_a_pretended_device(run_alone):
    run_alone(Path(__file__).parent / "pretended_device", PRETEND_DEVICE="1")
