"""Many tenants on a CPU: one base linear and one delta op for all rows, beside a dense linear for every tenant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.lowering import ops
from torch import Tensor
from torch.nn.functional import linear

from .delta_op import compiled
from .plots import panels
from .registry import Record, Run, case, last_level_cache, require
from .timing import side_by_side

Banks = list[tuple[Tensor, Tensor]]


def dense(xs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [linear(x, weight) for x, weight in zip(xs, weights, strict=True)]


def delta(x: Tensor, banks: Banks, tenant: Tensor) -> list[Tensor]:
    return [ops.delta_linear(x, signs, scale, None, None, None, tenant) for signs, scale in banks]


def base_and_delta(x: Tensor, weights: list[Tensor], banks: Banks, tenant: Tensor) -> list[Tensor]:
    return [
        linear(x, weight) + ops.delta_linear(x, signs, scale, None, None, None, tenant)
        for weight, (signs, scale) in zip(weights, banks, strict=True)
    ]


def plot(records: list[Record], path: Path) -> None:
    series = {"base + delta": "ratio", "separate linears": "separate_ratio", "delta alone": "delta_ratio"}
    labels = ("tenants", "time / time of one base linear")
    shown = [{**record, "rows": f"{record['rows_each']} rows each"} for record in records]
    panels(shown, ("dtype", "rows"), "tenants", series, labels, "Many tenants on a CPU, cold weights", path)


@case(
    "tenants-op",
    "time of base + delta for T tenants over T separate linears, cold weights, per number of tenants and rows of each",
    columns=(
        "tenants", "rows_each", "base_ms", "delta_ms", "both_ms", "separate_ms", "speedup", "ratio", "delta_gb_s",
        "base_row_gb_s",
    ),
    plot=plot,
)  # fmt: skip
def measure(run: Run) -> list[Record]:
    size = 512 if run.quick else 4096
    tenants = (1, 4) if run.quick else (1, 2, 4, 8, 16, 32)
    cold = (0.3 if run.quick else 2.5) * last_level_cache()
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(size, size, generator=generator).mul_(0.02).bfloat16()
        for _ in range(max(3, math.ceil(cold / (2 * size * size))))
    ]
    return [
        _measure(run, weights, _banks(slots, size, cold), slots, rows_each)
        for slots in tenants
        for rows_each in ((1,) if run.quick else (1, 4))
    ]


def _banks(slots: int, size: int, cold: float) -> Banks:
    """Banks of `slots` tenants, together over `cold` bytes of signs."""
    generator = torch.Generator().manual_seed(slots)
    banks = []
    for _ in range(max(3, math.ceil(cold / (slots * size * size / 8)))):
        signs = torch.randint(-(2**31), 2**31, (slots, 1, size, layout.words(size)), generator=generator)
        banks.append((signs.to(torch.int32), torch.rand(slots, 1, size, generator=generator) * 1e-3))
    return banks


def require_right(found: list[Tensor], x: Tensor, weights: list[Tensor] | None, banks: Banks, tenant: Tensor) -> None:
    """Check the first and the last tenant in the first and the last layer; without `weights`, of the delta alone."""
    for layer in (0, -1):
        signs, scale = banks[layer]
        for slot in (0, signs.shape[0] - 1):
            mine = tenant == slot
            expected = reference.delta_linear(x[mine], signs[slot : slot + 1], scale[slot : slot + 1])
            if weights is not None:
                expected = expected + x[mine].double() @ weights[layer].double().T
            error = float((found[layer][mine].double() - expected).norm() / expected.norm())
            require(error < 8e-3, f"off by {error:.2g} for tenant {slot} of {signs.shape[0]}")


def _measure(run: Run, weights: list[Tensor], banks: Banks, slots: int, rows_each: int) -> Record:
    torch._dynamo.reset()
    size, layers, rows = weights[0].shape[0], len(weights), slots * rows_each
    tenant = torch.arange(slots, dtype=torch.int32).repeat(rows_each)  # rows of one tenant do not follow each other
    x = torch.randn(rows, size).bfloat16()
    beside = [banks[layer % len(banks)] for layer in range(layers)]
    own = [x[tenant == layer % slots] for layer in range(layers)]
    calls: dict[str, Callable[[], Any]] = {
        "base": functools.partial(compiled(dense), [x] * layers, weights),
        "base at one row": functools.partial(compiled(dense), [x[:1]] * layers, weights),
        "delta": functools.partial(compiled(delta), x, banks, tenant),
        "base + delta": functools.partial(compiled(base_and_delta), x, weights, beside, tenant),
        "separate": functools.partial(compiled(dense), own, weights),
    }
    with torch.no_grad():
        require_right(calls["delta"](), x, None, banks, tenant)
        require_right(calls["base + delta"](), x, weights, beside, tenant)
        seconds = side_by_side(calls, repeats=3 if run.quick else 15)
    base, first, both, separate = (
        seconds[name] / layers for name in ("base", "base at one row", "base + delta", "separate")
    )
    alone = seconds["delta"] / len(banks)
    return {
        "outputs": size,
        "features": size,
        "dtype": "bfloat16",
        "tenants": slots,
        "rows_each": rows_each,
        "layers": layers,
        "base_ms": base * 1e3,
        "delta_ms": alone * 1e3,
        "both_ms": both * 1e3,
        "separate_ms": separate * slots * 1e3,
        "speedup": separate * slots / both,
        "ratio": both / base,
        "delta_ratio": alone / base,
        "separate_ratio": separate * slots / base,
        "delta_gb_s": banks[0][0].nbytes / alone / 1e9,
        "base_row_gb_s": weights[0].nbytes / first / 1e9,
    }
