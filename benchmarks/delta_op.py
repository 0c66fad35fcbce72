"""The delta op on a CPU: beside the base linear it accompanies, and beside unpacking the delta and multiplying."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.lowering import inductor, ops
from torch import Tensor

from .plots import panels
from .registry import Record, Run, case, last_level_cache, require
from .timing import side_by_side

Layers = list[tuple[Tensor, Tensor, Tensor]]


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`function` through Inductor with our lowerings."""
    return torch.compile(function, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, {}))


def cold_layers(outputs: int, features: int, dtype: torch.dtype) -> Layers:
    """Distinct (weight, signs, row_scale), together over twice the last-level cache: cycled through, all are cold."""
    count = max(3, math.ceil(2.5 * last_level_cache() / (outputs * features * dtype.itemsize)))
    generator = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(count):
        weight = torch.randn(outputs, features, generator=generator).mul_(0.02).to(dtype)
        signs = torch.randint(-(2**31), 2**31, (1, 1, outputs, layout.words(features)), generator=generator)
        row_scale = torch.rand(1, 1, outputs, generator=generator) * 1e-3
        layers.append((weight, signs.to(torch.int32), row_scale))
    return layers


def base(x: Tensor, layers: Layers) -> list[Tensor]:
    return [torch.nn.functional.linear(x, weight) for weight, _, _ in layers]


def own_base(x: Tensor, layers: Layers) -> list[Tensor]:
    """The base linears as they are compiled in a graph that holds a delta: by our kernel where it takes the rows."""
    _, signs, scale = layers[0]
    one_output = ops.delta_linear(x, signs[:, :, :1], scale[:, :, :1], None, None, None, None)
    return [*base(x, layers), one_output]


def base_and_delta(x: Tensor, layers: Layers) -> list[Tensor]:
    return [
        torch.nn.functional.linear(x, weight) + ops.delta_linear(x, signs, scale, None, None, None, None)
        for weight, signs, scale in layers
    ]


def delta(x: Tensor, layers: Layers) -> list[Tensor]:
    return [ops.delta_linear(x, signs, scale, None, None, None, None) for _, signs, scale in layers]


def exact_delta(x: Tensor, layers: Layers) -> list[Tensor]:
    return [ops.delta_linear(x, signs, scale, None, None, None, None, exact=True) for _, signs, scale in layers]


def unpack_and_matmul(x: Tensor, layers: Layers) -> list[Tensor]:
    found = []
    for weight, signs, scale in layers:
        bits = (signs[0, 0].unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
        dense = (bits.flatten(-2) * 2 - 1).to(x.dtype) * scale[0, 0].to(x.dtype).unsqueeze(-1)
        found.append(torch.nn.functional.linear(x, weight + dense))
    return found


WAYS = {
    "base": base,
    "own base": own_base,
    "base + delta": base_and_delta,
    "delta": delta,
    "exact delta": exact_delta,
    "unpack and matmul": unpack_and_matmul,
}


def plot(records: list[Record], path: Path) -> None:
    shaped = [{**record, "shape": f"{record['outputs']} x {record['features']}"} for record in records]
    series = {"base + delta": "ratio", "delta alone": "delta_ratio", "unpack and matmul": "unpack_ratio"}
    labels = ("rows (all of one fine-tune)", "time / time of the base linear")
    panels(shaped, ("dtype", "shape"), "rows", series, labels, "Delta op on a CPU, cold weights", path)


@case(
    "delta-op",
    "time of base + delta over base alone, cold weights, per shape, dtype and number of rows",
    columns=(
        "outputs", "features", "dtype", "rows", "base_ms", "own_base_ratio", "delta_ratio", "exact_ratio", "ratio",
        "unpack_ratio", "delta_gb_s",
    ),
    plot=plot,
)  # fmt: skip
def measure(run: Run) -> list[Record]:
    shapes = [(512, 512)] if run.quick else [(4096, 4096), (1536, 384)]
    cases = ((shape, dtype) for shape in shapes for dtype in (torch.bfloat16, torch.float32))
    return [
        _measure(run, layers, rows, dtype)
        for (outputs, features), dtype in cases
        for layers in [cold_layers(outputs, features, dtype)]
        for rows in ((1, 16) if run.quick else (1, 4, 16, 128))
    ]


def _measure(run: Run, layers: Layers, rows: int, dtype: torch.dtype) -> Record:
    torch._dynamo.reset()
    outputs, features = layers[0][0].shape
    x = torch.randn(rows, features, dtype=dtype)
    with torch.no_grad():
        ways = {name: compiled(way) for name, way in WAYS.items()}
        found = ways["delta"](x, layers)
        for index in (0, len(layers) - 1):
            _, signs, scale = layers[index]
            expected = reference.delta_linear(x, signs, scale)
            error = (found[index].double() - expected).norm() / expected.norm()  # type: ignore[index]
            require(float(error) < 8e-3, f"delta op is off by {float(error):.2g} at {outputs}x{features}, {dtype}")
        repeats = 3 if run.quick else max(5, min(25, 2000 // (len(layers) * rows)))
        calls = {name: functools.partial(way, x, layers) for name, way in ways.items()}
        seconds = side_by_side(calls, repeats=repeats)
    per_layer = {name: value / len(layers) for name, value in seconds.items()}
    return {
        "outputs": outputs,
        "features": features,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "layers": len(layers),
        "seconds": per_layer,
        "base_ms": per_layer["base"] * 1e3,
        "own_base_ratio": per_layer["own base"] / per_layer["base"],
        "ratio": per_layer["base + delta"] / per_layer["base"],
        "delta_ratio": per_layer["delta"] / per_layer["base"],
        "exact_ratio": per_layer["exact delta"] / per_layer["base"],
        "unpack_ratio": per_layer["unpack and matmul"] / per_layer["base"],
        "delta_gb_s": layers[0][1].nbytes / per_layer["delta"] / 1e9,
    }
