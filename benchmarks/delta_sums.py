"""Exact and rounded sums of the CPU delta op at bf16, compiled for this machine and for every one with AVX2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.lowering import inductor, ops
from torch import Tensor

from .registry import Record, Run, case, last_level_cache, require
from .timing import side_by_side

Layers = list[tuple[Tensor, Tensor]]
TARGETS: dict[str, dict[str, Any]] = {"this CPU": {}, "AVX2": {"cpp.march": "x86-64-v3", "cpp.simdlen": 256}}
TOGETHER = 8  # layers of one compiled call


def deltas(exact: bool, options: Mapping[str, Any]) -> Callable[..., list[Tensor]]:
    """`TOGETHER` delta ops on one x, compiled with these options."""

    def run(x: Tensor, layers: Layers) -> list[Tensor]:
        return [ops.delta_linear(x, signs, scale, None, None, None, None, exact=exact) for signs, scale in layers]

    return torch.compile(run, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, options), dynamic=False)


def all_of(way: Callable[..., list[Tensor]], x: Tensor, groups: list[Layers]) -> list[Tensor]:
    return [y for layers in groups for y in way(x, layers)]


@case(
    "delta-sums",
    "time of the delta op with exact and with rounded sums, bf16, cold signs, per instruction set and number of rows",
    columns=("target", "rows", "exact_ms", "rounded_ms", "ratio", "exact_gb_s", "rounded_gb_s"),
)
def measure(run: Run) -> list[Record]:
    size = 512 if run.quick else 4096
    generator = torch.Generator().manual_seed(0)

    def layer() -> tuple[Tensor, Tensor]:
        signs = torch.randint(-(2**31), 2**31, (1, 1, size, layout.words(size)), generator=generator)
        return signs.to(torch.int32), torch.rand(1, 1, size, generator=generator) * 1e-3

    count = math.ceil((0.1 if run.quick else 2.5) * last_level_cache() / (TOGETHER * size * size / 8))
    groups = [[layer() for _ in range(TOGETHER)] for _ in range(max(2, count))]
    return [record for rows in ((1, 16) if run.quick else (1, 4, 16, 128)) for record in _measure(run, groups, rows)]


def _measure(run: Run, groups: list[Layers], rows: int) -> list[Record]:
    torch._dynamo.reset()
    (signs, scale), layers = groups[-1][-1], TOGETHER * len(groups)
    x = torch.randn(rows, scale.shape[-1]).bfloat16()
    ways = {(target, exact): deltas(exact, options) for target, options in TARGETS.items() for exact in (True, False)}
    with torch.no_grad():
        found = {key: all_of(way, x, groups)[-1] for key, way in ways.items()}
        expected = reference.delta_linear(x, signs, scale)
        for key, y in found.items():
            error = float((y.double() - expected).norm() / expected.norm())
            require(error < 8e-3, f"delta op is off by {error:.2g} at {rows} rows with {key}")
        calls = {str(key): functools.partial(all_of, way, x, groups) for key, way in ways.items()}
        seconds = side_by_side(calls, repeats=3 if run.quick or rows > 16 else 9, warmup=1)
    records = []
    for target in TARGETS:
        exact, rounded = (seconds[str((target, exact))] / layers for exact in (True, False))
        records.append(
            {
                "target": target,
                "outputs": scale.shape[-1],
                "features": x.shape[1],
                "dtype": "bfloat16",
                "rows": rows,
                "layers": layers,
                "exact_ms": exact * 1e3,
                "rounded_ms": rounded * 1e3,
                "ratio": rounded / exact,
                "exact_gb_s": signs.nbytes / exact / 1e9,
                "rounded_gb_s": signs.nbytes / rounded / 1e9,
            }
        )
    return records
