"""The ways to run a linear layer for many tenants that the GPU cases time side by side, and the data they run on.

Sizes: T tenants, `rows` rows of each, N out, K in, L layers that are cycled through so that their data is cold. Rows
of one tenant follow each other; row t * rows + i belongs to slot t.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from bitdelta_compile.kernels import configs, layout, reference
from bitdelta_compile.lowering import inductor, ops
from torch import Tensor
from torch.nn.functional import linear

from . import gpu_timing
from .registry import require

RANKS = (16, 64, 128)
LARGEST_DENSE = 20 << 30  # bytes of dense weights beyond which a way that needs them is left out
Way = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One linear layer and who uses it; `name` is of the layers of that size in Llama-3-8B and Mistral-7B."""

    name: str
    outputs: int
    features: int
    tenants: int
    rows: int

    @property
    def packed_bytes(self) -> int:
        return self.tenants * self.outputs * self.features // 8

    @property
    def base_bytes(self) -> int:
        return 2 * self.outputs * self.features

    @property
    def dense_bytes(self) -> int:
        return self.tenants * self.base_bytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """weight bf16 [N, K]; signs in the canonical layout and in the device's; row_scale fp32 [T, 1, N]."""

    weight: Tensor
    canonical: Tensor
    signs: Tensor
    layout: str
    row_scale: Tensor


def layers(shape: Shape, where: torch.device, most: int = 1024) -> list[Layer]:
    """As many layers as make the smallest data that a way reads cold, at most `most`."""
    least = min(shape.base_bytes, shape.packed_bytes)
    count = min(most, gpu_timing.cold_copies(least, gpu_timing.l2_bytes(where)))
    generator = torch.Generator(where).manual_seed(0)
    words = layout.words(shape.features)
    found = []
    for _ in range(count):
        canonical = torch.randint(
            -(2**31), 2**31, (shape.tenants, 1, shape.outputs, words), generator=generator, device=where
        ).to(torch.int32)
        signs, name = on_device(canonical, shape.features)
        weight = torch.empty(shape.outputs, shape.features, device=where, dtype=torch.bfloat16)
        weight.normal_(0, 0.02, generator=generator)
        scale = torch.rand(shape.tenants, 1, shape.outputs, generator=generator, device=where) * 1e-3
        found.append(Layer(weight, canonical, signs, name, scale))
    return found


def on_device(canonical: Tensor, features: int) -> tuple[Tensor, str]:
    """Signs in the layout that this device's kernels read, and the name of that layout."""
    name = layout.FRAGMENTS if canonical.is_cuda else layout.CANONICAL
    return layout.to_layout(canonical, features, name), name


def delta(x: Tensor, layer: Layer, tenant: Tensor) -> Tensor:
    return ops.delta_linear(x, layer.signs, layer.row_scale, None, None, None, tenant, layout=layer.layout)


def base_and_delta(x: Tensor, layer: Layer, tenant: Tensor) -> Tensor:
    return linear(x, layer.weight) + delta(x, layer, tenant)


def _over(one: Callable[..., Tensor], x: Tensor, many: list[Layer], tenant: Tensor) -> Way:
    """`one` for every layer: compiled once, called with the tensors of each."""
    return lambda: [one(x, layer, tenant) for layer in many]


def compiled(
    function: Callable[..., Tensor], *, one_launch: bool | None = None, **options: object
) -> Callable[..., Tensor]:
    """`function` through Inductor with our lowerings.

    Args:
        one_launch: base and delta in one launch wherever there is a kernel for both, or never; by default as
            `configs.fused_pays` has it.
    """
    if one_launch is None:
        return torch.compile(function, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, options))

    def decided(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with mock.patch.object(configs, "fused_pays", return_value=one_launch):
            return inductor.compile_graph(gm, inputs, {**options, "fx_graph_cache": False})

    return torch.compile(function, backend=decided)


def ways(shape: Shape, many: list[Layer], x: Tensor, tenant: Tensor) -> dict[str, tuple[Way, int]]:
    """name -> (call, layers that it runs). Ways whose dense weights would not fit are left out.

    `delta` and `base + delta` are compiled, the latter also as `one launch` and as `apart`; `delta, eager` is the
    launcher without a compiler. `separate` runs a linear per tenant, `bmm` the unpacked deltas of all, `lora r`
    adapters of that rank, `original` the paper's kernel; none of these four contains the base's own product but
    `separate`.
    """
    own = x.reshape(shape.tenants, shape.rows, shape.features)
    count = len(many)
    weights = [layer.weight for layer in many]
    found: dict[str, tuple[Way, int]] = {
        "base": (lambda: [linear(x, weight) for weight in weights], count),
        "delta, eager": (_over(delta, x, many, tenant), count),
        "delta": (_over(compiled(delta), x, many, tenant), count),
        "base + delta": (_over(compiled(base_and_delta), x, many, tenant), count),
    }
    if shape.tenants * shape.rows <= configs.DECODE_ROWS:
        for name, one_launch in (("one launch", True), ("apart", False)):
            found[name] = (_over(compiled(base_and_delta, one_launch=one_launch), x, many, tenant), count)
    if shape.rows <= 64:
        found["original"] = (_original(shape, many, own), count)
    found |= {f"lora {rank}": _lora(shape, own, rank) for rank in RANKS}
    if shape.dense_bytes <= LARGEST_DENSE:
        copies = gpu_timing.cold_copies(shape.dense_bytes, gpu_timing.l2_bytes(x.device))
        dense = [
            torch.randn(shape.tenants, shape.outputs, shape.features, device=x.device, dtype=x.dtype)
            for _ in range(copies)
        ]
        turned = [each.mT for each in dense]
        found["separate"] = (
            lambda: [linear(mine, weight) for each in dense for mine, weight in zip(own, each, strict=True)], copies
        )  # fmt: skip
        found["bmm"] = (lambda: [torch.bmm(own, each) for each in turned], copies)
    return found


def _lora(shape: Shape, own: Tensor, rank: int) -> tuple[Way, int]:
    nbytes = 2 * shape.tenants * rank * (shape.outputs + shape.features)
    copies = gpu_timing.cold_copies(nbytes, gpu_timing.l2_bytes(own.device))
    pairs = [
        (
            torch.randn(shape.tenants, shape.features, rank, device=own.device, dtype=own.dtype),
            torch.randn(shape.tenants, rank, shape.outputs, device=own.device, dtype=own.dtype),
        )
        for _ in range(copies)
    ]
    return lambda: [torch.bmm(torch.bmm(own, down), up) for down, up in pairs], copies


def _original(shape: Shape, many: list[Layer], own: Tensor) -> Way:
    """The paper's kernel on the same signs, in its own layout and with its one scale per matrix."""
    from .gpu_kernels import original_bitdelta

    words = [layer.canonical[:, 0].mT.contiguous() for layer in many]  # [T, K / 32, N]
    scales = [layer.row_scale.mean((1, 2)) for layer in many]
    out = torch.empty(shape.tenants, shape.rows, shape.outputs, device=own.device, dtype=own.dtype)
    block = max(16, 1 << (shape.rows - 1).bit_length())
    grid = (shape.outputs // 128, shape.tenants)

    def run() -> Tensor:
        for word, scale in zip(words, scales, strict=True):
            original_bitdelta[grid](
                own, word, scale, out, shape.rows, shape.outputs, shape.features, BM=block, BN=128, BK=64
            )
        return out

    run()
    first = reference.delta_weight(
        many[-1].canonical[:1, :, :64].cpu(), torch.ones(1, 1, 64), None, None, None, shape.features
    )
    expected = own[0].float().cpu() @ first[0].T * scales[-1][0].item()
    error = (out[0, :, :64].float().cpu() - expected).norm() / expected.norm()
    require(float(error) < 8e-3, f"the paper's kernel is off by {float(error):.2g}")
    return run


def require_right(shape: Shape, many: list[Layer], x: Tensor, found: dict[str, tuple[Way, int]]) -> None:
    """Check our ways against the reference: first and last layer and tenant, the first and last outputs."""
    for name in ("delta, eager", "delta", "base + delta", "one launch", "apart"):
        if name not in found:
            continue
        results = found[name][0]()
        assert isinstance(results, list)
        for at in (0, -1):
            for slot in {0, shape.tenants - 1}:
                for columns in (slice(0, 48), slice(shape.outputs - 48, shape.outputs)):
                    _require_tile(name, shape, many[at], x, results[at], slot, columns)


def _require_tile(name: str, shape: Shape, layer: Layer, x: Tensor, result: Tensor, slot: int, columns: slice) -> None:
    rows = slice(slot * shape.rows, (slot + 1) * shape.rows)
    mine = x[rows].cpu()
    expected = reference.delta_linear(
        mine, layer.canonical[slot : slot + 1, :, columns].cpu(), layer.row_scale[slot : slot + 1, :, columns].cpu()
    )
    if not name.startswith("delta"):
        expected = expected + mine.double() @ layer.weight[columns].double().cpu().T
    error = float((result[rows, columns].double().cpu() - expected).norm() / expected.norm())
    require(error < 8e-3, f"{name} is off by {error:.2g} for tenant {slot} of {shape}")
