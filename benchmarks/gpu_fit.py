"""Choosing the signs of one matrix on a GPU: our kernels against a PyTorch call per column and step, side by side."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdelta_compile.compress.fit import DeltaMatrix, fit
from bitdelta_compile.compress.metric import Metric
from bitdelta_compile.compress.precision import full_precision
from bitdelta_compile.compress.settings import Settings

from . import gpu_timing
from .plots import bars
from .registry import Record, Run, case, require
from .timing import side_by_side, wall

signs: Any = importlib.import_module("bitdelta_compile.compress.signs")

SHAPES = ((1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336))  # N, K
SECONDS = 16
ALIKE = 0.9  # of the signs: one that rounding turns has those after it follow, in its row
SAME_COST = 1e-3


@dataclasses.dataclass(frozen=True)
class Problem:
    """A matrix to be fitted, as `signs` takes it: target [K, n], scale [1, n], h and upper [K, K]."""

    target: Tensor
    scale: Tensor
    h: Tensor
    upper: Tensor

    @classmethod
    def random(cls, rows: int, features: int, where: torch.device) -> Problem:
        """Inputs of which some directions are strong, as a layer's are."""
        generator = torch.Generator(where).manual_seed(rows + features)
        x = torch.randn(2 * features, features, device=where, generator=generator)
        x *= torch.logspace(0, -1, features, device=where)
        h = x.T @ x / len(x)
        h.diagonal().add_(0.01 * float(h.diagonal().mean()))
        upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        target = torch.randn(features, rows, device=where, generator=generator)
        return cls(target, target.abs().mean(0, keepdim=True), h, upper)

    def feed(self) -> Tensor:
        found: Tensor = signs.feed_errors(self.target, self.scale, None, self.upper)
        return found

    def flip(self, start: Tensor) -> Tensor:
        found = start.clone()
        signs.flip_signs(self.target, found, self.scale, None, self.h)
        return found

    def cost(self, found: Tensor) -> float:
        """Sum of r H r."""
        rest = self.target - signs.values(found, self.scale, None)
        return float((rest * (self.h @ rest)).sum(dtype=torch.float64))


def in_pytorch(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The way as it goes where there are no kernels."""

    def run() -> Tensor:
        kernels, signs.device.column_kernels = signs.device.column_kernels, lambda place: None
        try:
            return way()
        finally:
            signs.device.column_kernels = kernels

    return run


def check(problem: Problem, step: str, found: Tensor, expected: Tensor) -> None:
    """The correctness gate: next to the same signs, and no worse."""
    same = float((found == expected).float().mean())
    require(same >= ALIKE, f"{step}: {same:.5f} of the signs are those of plain PyTorch")
    ours, theirs = problem.cost(found), problem.cost(expected)
    require(abs(ours - theirs) <= SAME_COST * theirs, f"{step}: r H r is {ours:.6g} and {theirs:.6g} in plain PyTorch")


def figures(rows: int, features: int, step: str, seconds: dict[str, float]) -> Record:
    record: Record = {"rows": rows, "features": features, "step": step, "seconds": seconds["kernels"]}
    record["ns_per_weight"] = seconds["kernels"] / (rows * features) * 1e9
    if "pytorch" in seconds:
        record |= {"pytorch_seconds": seconds["pytorch"], "ratio": seconds["pytorch"] / seconds["kernels"]}
    return record


def plot(records: list[Record], path: Path) -> None:
    shown = [record for record in records if "ratio" in record]
    names = [f"{record['step']}\n[{record['rows']}, {record['features']}]" for record in shown]
    series = {"kernels": [record["ratio"] for record in shown]}
    bars(names, series, "times faster than a call per column", "Choosing signs on a GPU", path, log=True)


def waited(way: Callable[[], object], where: torch.device) -> Callable[[], None]:
    """The way until the device is done, launching included: that is most of the time."""

    def run() -> None:
        way()
        if where.type == "cuda":
            torch.cuda.synchronize(where)

    return run


def measure_shape(rows: int, features: int, where: torch.device, repeats: int) -> Iterator[Record]:
    problem = Problem.random(rows, features, where)
    start = problem.feed()
    steps: dict[str, Callable[[], Tensor]] = {"error feedback": problem.feed, "flips": lambda: problem.flip(start)}
    for step, way in steps.items():
        slow = in_pytorch(way)
        check(problem, step, way(), slow())
        ways = {"kernels": waited(way, where), "pytorch": waited(slow, where)}
        seconds = side_by_side(ways, repeats=repeats, warmup=0, clock=wall)
        yield figures(rows, features, step, seconds)
    base = torch.randn(rows, features, device=where)
    matrix = DeltaMatrix(base, base + 0.01 * problem.target.T)
    metric = Metric(problem.h, torch.arange(features, device=where), problem.upper)
    settings = Settings(method="sequential")

    def whole() -> None:
        require(0 < fit(matrix, metric, settings, planes=1, rank=0).error < 0.6, "the fit has lost the delta")

    seconds = side_by_side({"kernels": waited(whole, where)}, repeats=repeats, warmup=1, clock=wall)
    yield figures(rows, features, "fit of `best`", seconds)


@case(
    "gpu-fit",
    "seconds of error feedback, sign flips and a whole fit of one matrix on a GPU, kernels against PyTorch",
    columns=("rows", "features", "step", "seconds", "ns_per_weight", "pytorch_seconds", "ratio"),
    plot=plot,
)
def measure(run: Run) -> Iterator[Record]:
    where = gpu_timing.device()
    with full_precision():
        for rows, features in gpu_timing.within(SHAPES[:1] if run.quick else SHAPES, SECONDS):
            yield from measure_shape(rows, features, where, 3)
