"""One decode step of a Llama-3-8B-shaped model of random weights for 16 tenants, beside 16 models and the base alone.

The decoder is written out below rather than taken from transformers: one layer is compiled once and called for every
layer, and the whole step is one CUDA graph, which is what a server would replay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.kernels import layout
from bitdelta_compile.lowering import ops
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from . import gpu_timing
from .gpu_ways import compiled, on_device
from .plots import bars
from .registry import Record, Run, case, require

Packed = tuple[Tensor, Tensor]  # signs in the device's layout, row_scale fp32 [T, 1, N]


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decoder; the defaults are those of Llama-3-8B."""

    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 32
    vocabulary: int = 128256
    context: int = 512

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """N x K of a layer's linears."""
        kv = self.kv_heads * self.head_size
        return {
            "q": (self.hidden, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.inner, self.hidden),
            "up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


@dataclasses.dataclass
class Model:
    """Random weights bf16, and a delta per tenant for every linear, the head among them, and for the table."""

    config: Config
    layers: list[dict[str, Tensor]]
    deltas: list[dict[str, Packed]]
    table: Tensor
    head: Tensor
    table_delta: Packed
    head_delta: Packed
    layout: str

    @classmethod
    def random(cls, config: Config, tenants: int, where: torch.device) -> Model:
        generator = torch.Generator(where).manual_seed(0)
        names: list[str] = []

        def weight(outputs: int, features: int) -> Tensor:
            fresh = torch.empty(outputs, features, device=where, dtype=torch.bfloat16)
            return fresh.normal_(0, features**-0.5, generator=generator)

        def packed(outputs: int, features: int) -> Packed:
            shape = (tenants, 1, outputs, layout.words(features))
            words = torch.randint(-(2**31), 2**31, shape, generator=generator, device=where).to(torch.int32)
            signs, name = on_device(words, features)
            names.append(name)
            scale = torch.rand(tenants, 1, outputs, generator=generator, device=where) * (0.2 * features**-0.5)
            return signs, scale

        sizes = config.linears
        return cls(
            config,
            [{name: weight(*size) for name, size in sizes.items()} for _ in range(config.layers)],
            [{name: packed(*size) for name, size in sizes.items()} for _ in range(config.layers)],
            weight(config.vocabulary, config.hidden),
            weight(config.vocabulary, config.hidden),
            packed(config.vocabulary, config.hidden),
            packed(config.vocabulary, config.hidden),
            names[0],
        )


@dataclasses.dataclass
class State:
    """Of `rows` sequences that decode their `position`-th token: ids [B], key and value caches [B, heads, C, D]."""

    ids: Tensor
    tenant: Tensor | None
    caches: list[tuple[Tensor, Tensor]]
    position: Tensor
    rotation: Tensor  # [D / 2], the angles at this position

    @classmethod
    def random(cls, config: Config, rows: int, tenant: Tensor | None, where: torch.device) -> State:
        generator = torch.Generator(where).manual_seed(1)
        shape = (rows, config.kv_heads, config.context, config.head_size)

        def cache() -> Tensor:
            return torch.empty(shape, device=where, dtype=torch.bfloat16).normal_(generator=generator)

        half = torch.arange(config.head_size // 2, device=where)
        return cls(
            torch.randint(config.vocabulary, (rows,), generator=generator, device=where),
            tenant,
            [(cache(), cache()) for _ in range(config.layers)],
            torch.tensor([config.context - 1], device=where),
            (config.context - 1) * 500000.0 ** (-half / half.numel()),
        )


def apply(x: Tensor, weight: Tensor, packed: Packed | None, tenant: Tensor | None, sign_layout: str) -> Tensor:
    """A linear, with each row's delta where there are any."""
    y = linear(x, weight)
    if packed is None:
        return y
    return y + ops.delta_linear(x, packed[0], packed[1], None, None, None, tenant, layout=sign_layout)


def decoder_layer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    deltas: Mapping[str, Packed],
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    rotation: Tensor,
    tenant: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    sign_layout: str,
) -> Tensor:
    """One layer at one position: [B, hidden] -> [B, hidden]; writes the position's key and value into the caches."""

    def through(y: Tensor, name: str) -> Tensor:
        return apply(y, weights[name], deltas.get(name), tenant, sign_layout)

    def rotated(y: Tensor) -> Tensor:
        cosine, sine = rotation.cos().to(y.dtype), rotation.sin().to(y.dtype)
        first, second = y.chunk(2, -1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)

    rows, hidden = x.shape
    normed = rms_norm(x, (hidden,))
    query = rotated(through(normed, "q").view(rows, heads, 1, -1))
    keys.index_copy_(2, position, rotated(through(normed, "k").view(rows, kv_heads, 1, -1)))
    values.index_copy_(2, position, through(normed, "v").view(rows, kv_heads, 1, -1))
    attended = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    x = x + through(attended.reshape(rows, hidden), "o")
    normed = rms_norm(x, (hidden,))
    return x + through(silu(through(normed, "gate")) * through(normed, "up"), "down")


def first_layer_input(model: Model, state: State, with_deltas: bool) -> Tensor:
    x = embedding(state.ids, model.table)
    if not with_deltas:
        return x
    return x + ops.delta_embedding(
        state.ids, *model.table_delta, None, None, None, state.tenant, embedding_dim=model.config.hidden,
        dtype=x.dtype, layout=model.layout,
    )  # fmt: skip


def logits(model: Model, x: Tensor, state: State, with_deltas: bool) -> Tensor:
    normed = rms_norm(x, (model.config.hidden,))
    return apply(normed, model.head, model.head_delta if with_deltas else None, state.tenant, model.layout)


def step(
    model: Model, state: State, with_deltas: bool, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
) -> Callable[[], Tensor]:
    """The decode step as a call: logits [B, vocabulary]. `wrap` compiles the pieces."""
    config = model.config

    def start(model: Model, state: State) -> Tensor:
        return first_layer_input(model, state, with_deltas)

    def layer(*given: Any) -> Tensor:
        return decoder_layer(*given, heads=config.heads, kv_heads=config.kv_heads, sign_layout=model.layout)

    def end(model: Model, x: Tensor, state: State) -> Tensor:
        return logits(model, x, state, with_deltas)

    first, middle, last = wrap(start), wrap(layer), wrap(end)

    def run() -> Tensor:
        x = first(model, state)
        for weights, deltas, (keys, values) in zip(model.layers, model.deltas, state.caches, strict=True):
            given = deltas if with_deltas else {}
            x = middle(x, weights, given, keys, values, state.position, state.rotation, state.tenant)
        return last(model, x, state)

    return run


def uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


def plot(records: list[Record], path: Path) -> None:
    (found,) = records
    names = {"base alone": "base", "base + deltas": "tenants", "separate models": "separate"}
    bars(
        list(names),
        {f"{found['tenants']} rows": [found[f"{key}_tokens_s"] for key in names.values()]},
        "tokens per second",
        "Decode step, Llama-3-8B shapes, one row per tenant",
        path,
        log=True,
    )


@case(
    "gpu-generate",
    "a Llama-3-8B-shaped model decoding for 16 tenants on a GPU, beside 16 models in turn and the base alone",
    columns=("tenants", "layers", "base_ms", "tenants_ms", "one_model_ms", "speedup", "ratio", "weights_gb", "bank_gb"),
    plot=plot,
)
def measure(run: Run) -> list[Record]:
    where = gpu_timing.device()
    config = Config(hidden=512, inner=1024, heads=4, kv_heads=2, layers=2, vocabulary=1000) if run.quick else Config()
    tenants = 16
    with torch.no_grad():
        model = Model.random(config, tenants, where)
        index = torch.arange(tenants, dtype=torch.int32, device=where)
        together = State.random(config, tenants, index, where)
        one = State.random(config, 1, None, where)
        calls = {
            "tenants": step(model, together, True, compiled),
            "base": step(model, together, False, compiled),
            "one": step(model, one, False, compiled),
        }
        _require_right(model, together, calls["tenants"]())
        seconds = gpu_timing.graph_seconds(
            {name: (call, 1) for name, call in calls.items()}, repeats=5 if run.quick else 20
        )
    packed = [*model.deltas, {"table": model.table_delta, "head": model.head_delta}]
    bank = sum(signs.nbytes + scale.nbytes for each in packed for signs, scale in each.values())
    weights = sum(weight.nbytes for each in model.layers for weight in each.values())
    weights += model.table.nbytes + model.head.nbytes
    return [
        {**dataclasses.asdict(config), **figures(tenants, seconds), "weights_gb": weights / 1e9, "bank_gb": bank / 1e9}
    ]


def figures(tenants: int, seconds: Mapping[str, float]) -> Record:
    """Sixteen dense models do not fit on one card: one is timed and its time counted once for each tenant."""
    separate = tenants * seconds["one"]
    return {
        "tenants": tenants,
        "form": "decoder written out, one compiled layer for all, one CUDA graph; separate = one model x tenants",
        "base_ms": seconds["base"] * 1e3,
        "tenants_ms": seconds["tenants"] * 1e3,
        "one_model_ms": seconds["one"] * 1e3,
        "base_tokens_s": tenants / seconds["base"],
        "tenants_tokens_s": tenants / seconds["tenants"],
        "separate_tokens_s": tenants / separate,
        "speedup": separate / seconds["tenants"],
        "ratio": seconds["tenants"] / seconds["base"],
    }


def _require_right(model: Model, state: State, found: Tensor) -> None:
    """Compiled and eager agree, and the deltas matter."""
    expected = step(model, state, True, uncompiled)().float()
    without = step(model, state, False, uncompiled)().float()
    gap = (without - expected).norm()
    error = float((found.float() - expected).norm() / gap)
    require(error < 0.1, f"the compiled step is off by {error:.2g} of what the deltas change")
