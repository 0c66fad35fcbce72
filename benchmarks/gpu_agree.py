"""Do the ways to run the op on a GPU give the same? Eager kernels, compiled ones, the interpreter's, the reference.

No times: each record is the distance of one result from the fp64 reference, and between results. All are recorded
before those that are too far off end the case.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import ops
from torch import Tensor

from . import gpu_timing
from .gpu_ways import compiled
from .registry import Record, Run, case, require

LIMITS = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}
PROBLEMS = ((1, 1, 64, 512), (16, 16, 96, 384), (12, 4, 33, 1000), (80, 3, 48, 256))  # M, T, N, K
# Runs the eager kernels on CPU tensors in a process of Triton's interpreter; there the binary path's assembly does not
# exist, so that the exact kernel answers.
INTERPRETED = """
import dataclasses, sys, torch
from bitdelta_compile.kernels import configs, delta_linear, layout
found = []
for x, canonical, row_scale, tenant in torch.load(sys.argv[1], weights_only=True):
    rows, features = x.shape
    plan = configs.choose(
        90, rows, canonical.shape[0], row_scale.shape[2], features, x.dtype, column=False, exact=True
    )
    plan = dataclasses.replace(plan, form="interpreted")
    signs = layout.to_layout(canonical, features, layout.FRAGMENTS)
    found.append(delta_linear.delta_linear(x, signs, row_scale, None, None, None, tenant, plan))
torch.save(found, sys.argv[2])
"""


def problems() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(x, canonical signs, row_scale, tenant) on the CPU; every fifth row is the base's."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, slots, outputs, features in PROBLEMS:
        canonical, row_scale, *_ = random_bank(slots, 1, outputs, features)
        every = torch.arange(rows)
        tenant = torch.where(every % 5 == 4, -1, every % slots).to(torch.int32)
        for dtype in LIMITS:
            x = torch.randn(rows, features, generator=generator).to(dtype)
            found.append((x, canonical, row_scale, tenant))
    return found


def interpreted(given: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """The exact kernel's results in Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "in.pt", Path(folder) / "out.pt"
        torch.save(given, inputs)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", INTERPRETED, str(inputs), str(outputs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        require(done.returncode == 0, f"the interpreter failed: {done.stderr[-500:]}")
        loaded: list[Tensor] = torch.load(outputs, weights_only=True)
    return loaded


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


@case(
    "gpu-agree",
    "distance of eager, compiled and interpreted results on a GPU from the fp64 reference",
    columns=(
        "rows",
        "tenants",
        "outputs",
        "features",
        "dtype",
        "eager",
        "compiled",
        "interpreted",
        "one_launch",
        "eager_to_compiled",
    ),
)
def measure(run: Run) -> Iterator[Record]:
    where = gpu_timing.device()
    given = problems()
    apart = interpreted(given)
    wrong = []
    for (x, canonical, row_scale, tenant), other in zip(given, apart, strict=True):
        torch._dynamo.reset()
        expected = reference.delta_linear(x, canonical, row_scale, tenant=tenant)
        signs = layout.to_layout(canonical.to(where), x.shape[1], layout.FRAGMENTS)

        def delta(x: Tensor, signs: Tensor, row_scale: Tensor, tenant: Tensor) -> Tensor:
            return ops.delta_linear(x, signs, row_scale, None, None, None, tenant, layout=layout.FRAGMENTS)

        inputs = (x.to(where), signs, row_scale.to(where), tenant.to(where))

        def base_and_delta(weight: Tensor, *rest: Tensor) -> Tensor:
            return torch.nn.functional.linear(rest[0], weight) + delta(*rest)

        weight = torch.randn(row_scale.shape[2], x.shape[1], generator=torch.Generator().manual_seed(1)).to(x.dtype)
        base = x.double() @ weight.double().T
        with torch.no_grad():
            eager, made = delta(*inputs), compiled(delta)(*inputs)
            both = compiled(base_and_delta, one_launch=True)(weight.to(where), *inputs)
        record: Record = {
            "rows": x.shape[0],
            "tenants": canonical.shape[0],
            "outputs": row_scale.shape[2],
            "features": x.shape[1],
            "dtype": str(x.dtype).removeprefix("torch."),
            "eager": distance(eager, expected),
            "compiled": distance(made, expected),
            "interpreted": distance(other, expected),
            "one_launch": distance(both, base + expected),
            "eager_to_compiled": distance(eager, made),
        }
        off = [
            name for name in ("eager", "compiled", "interpreted", "one_launch") if not record[name] < LIMITS[x.dtype]
        ]
        wrong += [f"{name} is off by {record[name]:.2g} in {record}" for name in off]
        yield record
    require(not wrong, "; ".join(wrong))
