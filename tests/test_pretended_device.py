"""Tensors of a device and of the host meet no more than a GPU allows: tests/pretended_device in a process of its own.

To work on them: PRETEND_DEVICE=1 pytest tests/pretended_device
"""

from __future__ import annotations

from pathlib import Path


def test_on_a_pretended_device(run_alone):
    run_alone(Path(__file__).parent / "pretended_device", PRETEND_DEVICE="1")
