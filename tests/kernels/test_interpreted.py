"""The GPU kernels without a GPU: tests/kernels/interpreted, each time in a process of its own.

Once in Triton's interpreter, which says whether the arithmetic is right. Triton decides at import whether it
interprets, and no other test of this process may see that. To work on them: TRITON_INTERPRET=1 pytest
tests/kernels/interpreted. And compiled for GPUs, their PTX interpreted (benchmarks/ptx), which says whether what a GPU
would execute is right: layouts of fragments, shared memory, barriers, addresses. RUN_PTX=90 pytest
tests/kernels/interpreted.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"
FEW = "(odd_shapes and (5-3-2-33-300 or 3-2-1-17-1030))"  # two planes and all parts of a delta; several steps


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name, run_alone):
    run_alone(FOLDER / name, TRITON_INTERPRET="1")


# sm_80 and sm_90 multiply matrices with different instructions. sm_100 and sm_120 have the exact path only.
@pytest.mark.parametrize(
    ("name", "target", "chosen"),
    [
        ("pieces", 90, ""),
        ("columns", 90, "not problem3 and not problem4"),  # 3 and 4 planes: much to compile
        ("delta_linear", 80, f"{FEW} or many_steps"),
        ("delta_linear", 90, "not odd_shapes and not dtypes"),
        ("delta_linear", 90, FEW),
        ("delta_linear", 100, f"{FEW} and (exact or prefill)"),
        ("delta_linear", 120, f"{FEW} and (exact or prefill)"),
    ],
)
def test_as_ptx(name, target, chosen, run_alone):
    run_alone(FOLDER / f"test_{name}.py", RUN_PTX=str(target), PYTEST_ADDOPTS=f"-k '{chosen}'" if chosen else "")
