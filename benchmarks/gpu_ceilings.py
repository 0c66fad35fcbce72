"""What the device can do at most: bytes read, binary and bf16 tensor core operations, all measured."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from . import gpu_timing
from .plots import bars
from .registry import Record, Run, case, require

_WARPS = 8


@functools.cache
def hbm_bytes_per_second(where: torch.device, nbytes: int = 8 << 30) -> float:
    """The best rate at which one kernel reads memory that no cache holds."""
    from .gpu_kernels import read_all

    nbytes = min(nbytes, torch.cuda.mem_get_info(where)[0] // 4)
    block, best = 4096, 0.0
    data = torch.ones(nbytes // 4 // (block * 4096) * (block * 4096), dtype=torch.int32, device=where)
    for programs in (1024, 4096):
        each = data.numel() // programs
        sums = torch.empty(programs, dtype=torch.int32, device=where)

        def read(each: int = each, sums: torch.Tensor = sums, programs: int = programs) -> None:
            read_all[(programs,)](data, sums, each, BLOCK=block, num_warps=8)

        seconds = gpu_timing.graph_seconds({"read": (read, 1)}, repeats=7)["read"]
        require(bool((sums == each).all()), "the kernel that reads memory has not read all of it")
        best = max(best, data.nbytes / seconds)
    return best


def copy_bytes_per_second(where: torch.device, nbytes: int = 4 << 30) -> float:
    """Bytes read and written by a copy."""
    nbytes = min(nbytes, torch.cuda.mem_get_info(where)[0] // 8)
    source = torch.zeros(nbytes // 4, dtype=torch.int32, device=where)
    target = torch.empty_like(source)
    seconds = gpu_timing.graph_seconds({"copy": (lambda: target.copy_(source), 1)}, repeats=7)["copy"]
    return 2 * source.nbytes / seconds


def binary_mma_per_second(where: torch.device, rounds: int = 4096) -> float:
    """mma.m16n8k256.b1 operations per second, from registers, on all multiprocessors."""
    from .gpu_kernels import BMMA_CHAINS, binary_mma_rate

    programs = 8 * torch.cuda.get_device_properties(where).multi_processor_count
    found = torch.empty(programs * 128 * _WARPS, dtype=torch.int32, device=where)

    def run() -> None:
        binary_mma_rate[(programs,)](found, rounds, WARPS=_WARPS, CHAINS=BMMA_CHAINS, num_warps=_WARPS)

    seconds = gpu_timing.graph_seconds({"bmma": (run, 1)}, repeats=5)["bmma"]
    require(bool(found.any()), "the binary tensor core has counted nothing")
    return programs * _WARPS * BMMA_CHAINS * rounds / seconds


def gemm_flops_per_second(where: torch.device, size: int = 8192) -> float:
    """bf16 multiply-adds, two each, of the vendor's matrix product."""
    left, right = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    seconds = gpu_timing.graph_seconds({"gemm": (lambda: torch.mm(left, right, out=out), 1)}, repeats=9)["gemm"]
    return 2 * size**3 / seconds


def plot(records: list[Record], path: Path) -> None:
    names = [f"{record['rate']}, {record['unit']}" for record in records]
    values = [record["value"] for record in records]
    bars(names, {"measured": values}, "rate", f"Ceilings of {records[0]['gpu']}", path, log=True)


@case(
    "gpu-ceilings",
    "rates of a GPU's memory, binary tensor core and bf16 GEMM",
    columns=("gpu", "rate", "value", "unit", "per_clock_sm", "weights_t_s_16_bit"),
    plot=plot,
)
def measure(run: Run) -> Iterator[Record]:
    from .gpu_kernels import BMMA_OPERATIONS

    where = gpu_timing.device()
    properties = torch.cuda.get_device_properties(where)
    clock = float(getattr(properties, "clock_rate", 0)) * 1e3 or None
    facts: Record = {
        "multiprocessors": properties.multi_processor_count,
        "l2_mb": gpu_timing.l2_bytes(where) >> 20,
        "clock_ghz": None if clock is None else clock / 1e9,
    }
    yield {**facts, "rate": "HBM read", "value": hbm_bytes_per_second(where) / 1e12, "unit": "TB/s"}
    bmma = binary_mma_per_second(where, 256 if run.quick else 4096)
    yield {
        **facts,
        "rate": "binary MMA",
        "value": bmma * BMMA_OPERATIONS / 1e12,
        "unit": "TOP/s",
        "per_clock_sm": None if clock is None else bmma / clock / properties.multi_processor_count,
        # One operation covers 16 x 256 weights and 8 of the 16 bit planes of one row.
        "weights_t_s_16_bit": bmma * 16 * 256 / 2 / 1e12,
    }
    gemm = gemm_flops_per_second(where, 2048 if run.quick else 8192)
    yield {**facts, "rate": "bf16 GEMM", "value": gemm / 1e12, "unit": "TFLOP/s"}
    yield {**facts, "rate": "HBM copy", "value": copy_bytes_per_second(where) / 1e12, "unit": "TB/s"}
