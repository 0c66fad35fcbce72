"""The GPU kernels' arithmetic without a GPU: tests/kernels/interpreted in a process of its own.

Triton decides at import whether it interprets, and no other test of this process may see that. To work on them:
TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pytest_here = Path(sys.executable).with_name("pytest")
    done = subprocess.run(
        [pytest_here, FOLDER / name, "-x", "-p", "no:cacheprovider"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
