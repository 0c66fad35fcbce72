"""What Inductor makes of our templates for a GPU: tests/lowering/pretended_gpu in a process of its own.

To work on them: PRETEND_GPU=1 pytest tests/lowering/pretended_gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "pretended_gpu"


def test_in_a_process_that_believes_in_a_gpu():
    environment = {**os.environ, "PRETEND_GPU": "1", "OMP_NUM_THREADS": "1"}
    pytest_here = Path(sys.executable).with_name("pytest")
    done = subprocess.run(
        [pytest_here, FOLDER, "-x", "-p", "no:cacheprovider"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
