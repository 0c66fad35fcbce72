"""Decoding for many tenants on a GPU: few rows of each, so that the time is that of reading weights and bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from . import gpu_timing, gpu_ways
from .gpu_ceilings import hbm_bytes_per_second
from .plots import panels
from .registry import Record, Run, case

# N x K of the linears of Llama-3-8B and Mistral-7B, which share them but for the heads.
SIZES = {
    "q, o": (4096, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
    "k, v": (1024, 4096),
    "head, Mistral": (32000, 4096),
    "head, Llama-3": (128256, 4096),
}
_LEADING = ("q, o", "gate, up")
SECONDS = 70.0  # for all settings


def shapes(quick: bool) -> list[gpu_ways.Shape]:
    """All settings, what the claims are about first: the time of a case is limited."""
    if quick:
        return [gpu_ways.Shape("q, o", 512, 512, tenants, 2) for tenants in (1, 4)]

    def shape(name: str, tenants: int, rows: int) -> gpu_ways.Shape:
        return gpu_ways.Shape(name, *SIZES[name], tenants, rows)

    found = [shape(name, tenants, 1) for name in _LEADING for tenants in (16, 1)]
    found += [shape(name, tenants, 1) for tenants in (4, 64, 2, 8, 32) for name in _LEADING]
    found += [shape(name, 16, 1) for name in SIZES]
    found += [shape(name, tenants, rows) for name in _LEADING for rows in (4, 16, 64) for tenants in (1, 4, 16, 64)]
    found += [shape(name, tenants, 1) for name in SIZES for tenants in (1, 4, 64)]
    return list(dict.fromkeys(found))


def plot(records: list[Record], path: Path) -> None:
    shown = [
        {**record, "each": f"{record['rows_each']} rows each"} for record in records if record["layer"] in _LEADING
    ]
    shown.sort(key=lambda record: (record["layer"], record["rows_each"], record["tenants"]))
    series = {
        "base + delta": "ratio",
        "separate linears": "separate_ratio",
        "bmm of unpacked deltas": "bmm_ratio",
        "the paper's kernel": "original_ratio",
        "LoRA, rank 64": "lora_64_ratio",
    }
    labels = ("tenants", "time / time of one base linear")
    panels(shown, ("layer", "each"), "tenants", series, labels, "Decoding for many tenants, cold weights, bf16", path)


@case(
    "gpu-decode",
    "time and rate of one linear for T tenants on a GPU, cold weights, beside every other way to run it",
    columns=(
        "layer", "tenants", "rows_each", "base_us", "delta_us", "both_us", "one_launch_us", "apart_us", "packed_gb_s",
        "packed_of_hbm", "both_of_hbm", "ratio", "speedup", "original_ratio",
    ),
    plot=plot,
)  # fmt: skip
def measure(run: Run) -> Iterator[Record]:
    where = gpu_timing.device()
    hbm = hbm_bytes_per_second(where)
    for shape in gpu_timing.within(shapes(run.quick), SECONDS):
        yield _measure(run, shape, where, hbm)


def _measure(run: Run, shape: gpu_ways.Shape, where: torch.device, hbm: float) -> Record:
    torch._dynamo.reset()
    with torch.no_grad():
        many = gpu_ways.layers(shape, where)
        tenant = torch.arange(shape.tenants, dtype=torch.int32, device=where).repeat_interleave(shape.rows)
        x = torch.randn(shape.tenants * shape.rows, shape.features, device=where, dtype=torch.bfloat16)
        found = gpu_ways.ways(shape, many, x, tenant)
        gpu_ways.require_right(shape, many, x, found)
        seconds = gpu_timing.graph_seconds(found, repeats=5 if run.quick else 15)
    del many, found
    torch.cuda.empty_cache()
    return {**figures(shape, seconds, hbm), "hbm_tb_s": hbm / 1e12}


def figures(shape: gpu_ways.Shape, seconds: dict[str, float], hbm: float) -> Record:
    """What is derived from the seconds of each way; `hbm` in bytes per second. Ways left out give None."""
    base, both = seconds["base"], seconds["base + delta"]
    alone = min(seconds["delta"], seconds["delta, eager"])

    def beside_base(name: str) -> float | None:
        return seconds[name] / base if name in seconds else None

    return {
        "layer": shape.name,
        "outputs": shape.outputs,
        "features": shape.features,
        "dtype": "bfloat16",
        "tenants": shape.tenants,
        "rows_each": shape.rows,
        "seconds": seconds,
        "base_us": base * 1e6,
        "delta_us": alone * 1e6,
        "both_us": both * 1e6,
        "one_launch_us": seconds["one launch"] * 1e6 if "one launch" in seconds else None,
        "apart_us": seconds["apart"] * 1e6 if "apart" in seconds else None,
        "base_of_hbm": shape.base_bytes / base / hbm,
        "packed_gb_s": shape.packed_bytes / alone / 1e9,
        "packed_of_hbm": shape.packed_bytes / alone / hbm,
        "both_of_hbm": (shape.packed_bytes + shape.base_bytes) / both / hbm,
        "ratio": both / base,
        "delta_ratio": alone / base,
        "speedup": seconds["separate"] / both if "separate" in seconds else None,
        "separate_ratio": beside_base("separate"),
        "bmm_ratio": beside_base("bmm"),
        "original_ratio": beside_base("original"),
        **{f"lora_{rank}_ratio": beside_base(f"lora {rank}") for rank in gpu_ways.RANKS},
    }
