"""Prompts of many tenants on a GPU: enough rows that the tensor cores set the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from . import gpu_timing, gpu_ways
from .gpu_ceilings import gemm_flops_per_second
from .gpu_decode import SIZES
from .plots import panels
from .registry import Record, Run, case

SECONDS = 45.0  # for all settings


def shapes(quick: bool) -> list[gpu_ways.Shape]:
    """All settings, what the claim is about first: the time of a case is limited."""
    if quick:
        return [gpu_ways.Shape("q, o", 512, 512, 2, 64)]
    pairs = [(4, 4096), (1, 4096), (16, 4096), (64, 4096), (4, 1024), (16, 1024), (4, 256), (16, 256)]
    names = ("q, o", "gate, up", "down", "k, v")
    return [gpu_ways.Shape(name, *SIZES[name], tenants, total // tenants) for tenants, total in pairs for name in names]


def plot(records: list[Record], path: Path) -> None:
    series = {
        "base + delta": "ratio",
        "delta alone": "delta_ratio",
        "separate linears": "separate_ratio",
        "bmm of unpacked deltas": "bmm_ratio",
        "LoRA, rank 64": "lora_64_ratio",
    }
    shown = [{**record, "together": f"{record['rows']} rows in all"} for record in records]
    shown.sort(key=lambda record: (record["rows"], record["tenants"]))
    labels = ("tenants", "time / time of the base GEMM")
    panels(shown, ("layer", "together"), "tenants", series, labels, "Prompts of many tenants, bf16", path)


@case(
    "gpu-prefill",
    "time of base + delta over the base GEMM for prompts of T tenants on a GPU",
    columns=(
        "layer", "tenants", "rows", "base_us", "delta_us", "both_us", "ratio", "delta_ratio", "speedup",
        "delta_of_gemm",
    ),
    plot=plot,
)  # fmt: skip
def measure(run: Run) -> Iterator[Record]:
    where = gpu_timing.device()
    gemm = gemm_flops_per_second(where, 2048 if run.quick else 8192)
    for shape in gpu_timing.within(shapes(run.quick), SECONDS):
        yield _measure(run, shape, where, gemm)


def _measure(run: Run, shape: gpu_ways.Shape, where: torch.device, gemm: float) -> Record:
    torch._dynamo.reset()
    with torch.no_grad():
        many = gpu_ways.layers(shape, where, most=4)  # products of this size are not limited by what a cache holds
        tenant = torch.arange(shape.tenants, dtype=torch.int32, device=where).repeat_interleave(shape.rows)
        x = torch.randn(shape.tenants * shape.rows, shape.features, device=where, dtype=torch.bfloat16)
        found = gpu_ways.ways(shape, many, x, tenant)
        gpu_ways.require_right(shape, many, x, found)
        seconds = gpu_timing.graph_seconds(found, repeats=3 if run.quick else 9)
    del many, found
    torch.cuda.empty_cache()
    return figures(shape, seconds, gemm)


def figures(shape: gpu_ways.Shape, seconds: dict[str, float], gemm: float) -> Record:
    """What is derived from the seconds of each way; `gemm` in operations per second."""
    base, both = seconds["base"], seconds["base + delta"]
    alone = min(seconds["delta"], seconds["delta, eager"])
    operations = 2 * shape.tenants * shape.rows * shape.outputs * shape.features

    def beside_base(name: str) -> float | None:
        return seconds[name] / base if name in seconds else None

    return {
        "layer": shape.name,
        "outputs": shape.outputs,
        "features": shape.features,
        "dtype": "bfloat16",
        "tenants": shape.tenants,
        "rows_each": shape.rows,
        "rows": shape.tenants * shape.rows,
        "seconds": seconds,
        "base_us": base * 1e6,
        "delta_us": alone * 1e6,
        "both_us": both * 1e6,
        "base_of_gemm": operations / base / gemm,
        "delta_of_gemm": operations / alone / gemm,
        "ratio": both / base,
        "delta_ratio": alone / base,
        "speedup": seconds["separate"] / both if "separate" in seconds else None,
        "separate_ratio": beside_base("separate"),
        "bmm_ratio": beside_base("bmm"),
        **{f"lora_{rank}_ratio": beside_base(f"lora {rank}") for rank in gpu_ways.RANKS},
    }
