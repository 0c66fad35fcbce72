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
# Two planes and all parts of a delta, several steps: what there is to compile takes longer than to run.
PLANES, STEPS = "5-3-2-33-300", "3-2-1-17-1030"


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(name, run_alone):
    run_alone(FOLDER / name, TRITON_INTERPRET="1")


# sm_80 and sm_90 multiply matrices with different instructions. sm_100 and sm_120 have the exact path only. A part of
# the tests, for the time they take; RUN_PTX=90 by hand runs all of them.
@pytest.mark.parametrize(
    ("name", "target", "chosen"),
    [
        ("pieces", 90, ""),
        ("columns", 90, "problem0 or problem1"),
        ("delta_linear", 80, f"{PLANES} or many_steps"),
        ("delta_linear", 90, f"{PLANES} or {STEPS} or many_steps or neighbours or promised or base_in or several"),
        ("delta_linear", 100, f"{PLANES} and (exact or prefill)"),
        ("delta_linear", 120, f"{PLANES} and (exact or prefill)"),
    ],
)
def test_as_ptx(name, target, chosen, run_alone):
    run_alone(FOLDER / f"test_{name}.py", RUN_PTX=str(target), PYTEST_ADDOPTS=f"-k '{chosen}'" if chosen else "")
