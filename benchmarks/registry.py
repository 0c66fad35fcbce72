"""The one list of benchmark cases, and what every case gets: where to write, how long to take, what machine it is."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one case.

    Attributes:
        out: folder for JSONL and plots.
        quick: smaller shapes and fewer repetitions: shows that the case works, not a figure to quote.
        cache: folder for downloaded or trained material.
    """

    out: Path
    quick: bool
    cache: Path


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark: `measure` gives records, having checked that what it times is right; `plot` draws them.

    A `measure` that yields them one by one has each on disk before the next is measured.
    """

    name: str
    help: str
    measure: Callable[[Run], Iterable[Record]]
    plot: Callable[[list[Record], Path], None] | None = None
    columns: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def case(
    name: str, help: str, *, columns: tuple[str, ...], plot: Callable[[list[Record], Path], None] | None = None
) -> Callable[[Callable[[Run], Iterable[Record]]], Callable[[Run], Iterable[Record]]]:
    """Register a case under `name`; `columns` are the fields its table shows."""

    def register(measure: Callable[[Run], Iterable[Record]]) -> Callable[[Run], Iterable[Record]]:
        CASES[name] = Case(name, help, measure, plot, columns)
        return measure

    return register


class WrongResultError(AssertionError):
    """What was about to be timed gives a wrong result; no figure is printed."""


class SkippedError(Exception):
    """A case that this machine cannot run; the message says what it lacks."""


def require(condition: bool, what: str) -> None:
    """The correctness gate: raise WrongResultError unless `condition`."""
    if not condition:
        raise WrongResultError(what)


def machine() -> Record:
    """The machine's kind, for the record; nothing that identifies the machine itself."""
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "l3_mb": last_level_cache() >> 20,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def last_level_cache() -> int:
    """Bytes of the largest CPU cache; 32 MB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_records(path: Path, records: list[Record]) -> None:
    """JSONL, written to a temporary name and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)
