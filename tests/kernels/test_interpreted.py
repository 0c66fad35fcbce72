"""The GPU kernels' arithmetic without a GPU: tests/kernels/interpreted in a process of its own.

Triton decides at import whether it interprets, and no other test of this process may see that. To work on them:
TRITON_INTERPRET=1 pytest tests/kernels/interpreted
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name, run_alone):
    run_alone(FOLDER / name, TRITON_INTERPRET="1")
