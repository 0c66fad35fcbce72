"""What Inductor makes of our templates for a GPU: tests/lowering/pretended_gpu in a process of its own.

To work on them: PRETEND_GPU=1 pytest tests/lowering/pretended_gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_in_a_process_that_believes_in_a_gpu(run_alone):
    run_alone(Path(__file__).parent / "pretended_gpu", PRETEND_GPU="1")
