"""Resident memory against the number of tenants: one base and packed deltas beside a dense model for each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.delta import Delta

from .fleet import Fleet, fleet
from .plots import lines
from .registry import Record, Run, case, require

LIMIT = 0.10  # of base + T * delta bytes: what may come on top
MEGABYTE = 1e6

Stages = dict[str, dict[str, int]]


def plot(records: list[Record], path: Path) -> None:
    series = {
        "attached: weights": "resident_mb",
        "attached: weights and compiled graph": "serving_mb",
        "base + T deltas, bytes": "expected_mb",
        "T dense models: weights": "separate_mb",
    }
    lines(records, None, "tenants", series, ("tenants = slots", "resident MB"), "Memory of T fine-tunes, fp32", path)


@case(
    "tenants-memory",
    "MiniLM: resident memory with T tenants over base + T * delta bytes, and of T separate dense models",
    columns=("tenants", "expected_mb", "resident_mb", "excess", "graph_mb", "base_graph_mb", "separate_mb", "factor"),
    plot=plot,
)
def measure(run: Run) -> list[Record]:
    counts = (1, 4) if run.quick else (1, 2, 4, 8, 16, 32, 64)
    most = fleet(run, max(counts))
    base_bytes = _bytes(most.base)
    records = []
    for count in counts:
        some = Fleet(most.base, most.files[:count])
        deltas = sum(Delta.load(file).nbytes for file in some.files)
        attached = _child("attached", some)
        # Half of what is available: other processes, and this one, need some too.
        separate = _child("separate", some) if count * base_bytes < available() / 2 else None
        record = {"tenants": count, **figures((base_bytes + deltas) / MEGABYTE, attached, separate)}
        records.append(record)
        print(f"  {count} tenants: {record['resident_mb']:.1f} MB, {record['excess']:.1%} over", flush=True)
        # Of a model as small as that of a quick run, allocators' granularity is more than a tenth.
        require(run.quick or record["excess"] < LIMIT, f"{count} tenants take {record['excess']:.1%} over their bytes")
    return records


def figures(expected: float, attached: Stages, separate: Stages | None) -> Record:
    """MB of one number of tenants.

    Args:
        expected: MB of base and deltas.
        attached, separate: stages of both ways, as `resident` prints them.
    """
    resident = held(attached, "before", "loaded") + held(attached, "compiled", "tenants")
    graph = held(attached, "tenants", "serving")
    dense = None
    if separate is not None:
        dense = held(separate, "before", "loaded") + held(separate, "compiled", "tenants")
    return {
        "expected_mb": expected,
        "resident_mb": resident,
        "excess": resident / expected - 1,
        "graph_mb": graph,  # what compiling for tenants leaves behind, beside what compiling the base alone does
        "base_graph_mb": held(attached, "loaded", "compiled"),
        "serving_mb": resident + graph,
        "separate_mb": dense,
        "factor": None if dense is None else dense / resident,
        "stages": {"attached": attached, "separate": separate},
    }


def held(stages: Stages, earlier: str, later: str) -> float:
    """MB of anonymous pages and mapped weights by which two stages differ; code belongs to no tenant."""
    before, after = stages[earlier], stages[later]
    return sum(after[kind] - before[kind] for kind in ("anonymous", "weights")) / MEGABYTE


def available() -> int:
    """Bytes that a process can take without swapping."""
    text = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in text if line.startswith("MemAvailable"))


def _child(way: str, some: Fleet) -> Stages:
    command = [sys.executable, "-m", "benchmarks.resident", way, str(some.base), *map(str, some.files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    require(done.returncode == 0, f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    found: Stages = json.loads(done.stdout.splitlines()[-1])
    return found


def _bytes(folder: Path) -> int:
    """Of a checkpoint's parameters in fp32, tied ones once."""
    checkpoint = open_checkpoint(folder)
    return sum(checkpoint.tensor(name).numel() for name in checkpoint.names()) * torch.float32.itemsize
