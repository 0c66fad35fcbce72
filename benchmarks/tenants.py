"""Latency against the number of tenants in a batch, and what adding a tenant to a running model costs."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.lowering.torch_internals import compiled_so_far
from torch import Tensor, nn

import bitdelta_compile as bdc

from .fleet import batch, check_rows, fleet, hidden
from .plots import bars, lines
from .registry import Record, Run, case, require
from .tenants_memory import available
from .timing import side_by_side

TOKENS = 16
Ways = dict[str, Callable[[], object]]


def plot_latency(records: list[Record], path: Path) -> None:
    series = {
        "attached": "attached_ms",
        "base alone, compiled": "base_ms",
        "T dense models, compiled": "separate_ms",
        "one compiled model, weights swapped": "swap_ms",
    }
    title = f"MiniLM, fp32, {TOKENS} tokens a row"
    lines(records, "batch", "tenants", series, ("tenants in the batch", "ms per batch"), title, path)


@case(
    "tenants-latency",
    "time of a batch against the number of its tenants, beside dense models apart and dense weights swapped",
    columns=("batch", "tenants", "base_ms", "attached_ms", "ratio", "separate_ratio", "swap_ratio", "error_of_gap"),
    plot=plot_latency,
)
def latency(run: Run) -> list[Record]:
    """All dense ways run graphs that torch.compile made of one model: it shares them among models of one shape.

    So their weights are inputs of one graph, as the tenants' are, and no compilation is timed anywhere. The weights of
    the dense models lie in memory, in their final dtype: a swap is a copy within memory.
    """
    count = 4 if run.quick else 64
    torch._dynamo.reset()
    some = fleet(run, count)
    base = some.load()
    size = sum(parameter.nbytes for parameter in base.parameters())
    dense = [some.dense(file) for file in some.files[: max(1, min(count, available() // 2 // size))]]
    if len(dense) < count:
        print(f"  {len(dense)} of {count} dense models fit into memory: no figures of theirs beyond", flush=True)
    model = bdc.attach(base, some.named, slots=count)
    swapped = some.load()
    compiled = [torch.compile(each, dynamic=True) for each in (base, swapped, *dense)]
    for rows in (1, 2):
        ways = _ways(batch(rows, TOKENS), ["t0"] * rows, model, compiled, dense)
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            print(f"  {name}, {rows} rows: first call {time.perf_counter() - start:.1f} s", flush=True)
    before = compiled_so_far()
    records = []
    for rows in (4,) if run.quick else (8, 64):
        for tenants in (each for each in (1, 2, 4, 8, 16, 32, 64) if each <= min(rows, count)):
            names = [f"t{row * tenants // rows}" for row in range(rows)]
            inputs = batch(rows, TOKENS)
            error = _check(batch(rows, TOKENS), names, model, base, dense)
            ways = _ways(inputs, names, model, compiled, dense)
            seconds = side_by_side(ways, repeats=_repeats(ways, quick=run.quick), warmup=1)
            records.append({"batch": rows, "tenants": tenants, "error_of_gap": error, **_figures(seconds)})
            print(f"  batch {rows}, {tenants} tenants: {records[-1]['ratio']:.2f} times the base", flush=True)
    more = compiled_so_far() - before
    require(not any(more), f"something was compiled between the figures: {more}")
    return records


def _ways(
    inputs: dict[str, Tensor],
    names: list[str],
    model: bdc.TenantModel,
    compiled: Sequence[Callable[..., Any]],
    dense: Sequence[nn.Module],
) -> Ways:
    """One batch, by each way; `compiled` is the base, the model whose weights are swapped, and the dense models."""
    base, swapped, *apart = compiled
    groups = [int(name[1:]) for name in dict.fromkeys(names)]
    share = len(names) // len(groups)
    parts = [{key: value[at * share : (at + 1) * share] for key, value in inputs.items()} for at in range(len(groups))]

    @torch.no_grad()
    def call(function: Callable[..., Any], some: dict[str, Tensor]) -> object:
        return function(**some)

    @torch.no_grad()
    def swap() -> None:
        target: Any = swapped
        for group, part in zip(groups, parts, strict=True):
            for ours, theirs in zip(target.parameters(), dense[group].parameters(), strict=True):
                ours.copy_(theirs)
            swapped(**part)

    ways: Ways = {"base": lambda: call(base, inputs), "attached": lambda: model(**inputs, tenants=names)}
    if max(groups) < len(dense):
        ways["separate"] = lambda: [call(apart[group], part) for group, part in zip(groups, parts, strict=True)]
        ways["swap"] = swap
    return ways


def _check(
    inputs: dict[str, Tensor], names: list[str], model: bdc.TenantModel, base: nn.Module, dense: Sequence[nn.Module]
) -> float:
    """Every row of the attached model against its tenant's dense model; the largest error."""
    kept = [row for row, name in enumerate(names) if int(name[1:]) < len(dense)]
    with torch.no_grad():
        found, before = (hidden(each)[kept] for each in (model(**inputs, tenants=names), base(**inputs)))
        alone = [{key: value[row : row + 1] for key, value in inputs.items()} for row in kept]
        expected = torch.cat([hidden(dense[int(names[row][1:])](**one)) for row, one in zip(kept, alone, strict=True)])
    return check_rows(found, expected, before, f"{len(names)} rows of {len(set(names))} tenants")


def _repeats(ways: Ways, *, quick: bool) -> int:
    """As many rounds as take about ten seconds."""
    start = time.perf_counter()
    for way in ways.values():
        way()
    return 2 if quick else max(3, min(25, int(10 / (time.perf_counter() - start))))


def _figures(seconds: dict[str, float]) -> Record:
    figures: Record = {f"{name}_ms": seconds[name] * 1e3 for name in ("base", "attached")}
    for name in ("separate", "swap"):
        figures[f"{name}_ms"] = seconds[name] * 1e3 if name in seconds else None
        figures[f"{name}_ratio"] = seconds[name] / seconds["base"] if name in seconds else None
    return {**figures, "ratio": seconds["attached"] / seconds["base"]}


def plot_hot_add(records: list[Record], path: Path) -> None:
    names = ("read_cold_ms", "add_cold_ms", "read_warm_ms", "add_warm_ms", "replace_ms", "remove_ms")
    series = {name.removesuffix("_ms").replace("_", " "): [record[name] for record in records] for name in names}
    groups = [f"{record['file_bytes'] / 1e6:.2f} MB, {record['slots']} slots" for record in records]
    bars(groups, series, "ms (log)", "A tenant from its file into a running model", path, log=True)


@case(
    "hot-add",
    "add, replace and remove of a tenant's file in a compiled model, beside reading the file's bytes",
    columns=(
        "slots", "file_bytes", "read_cold_ms", "add_cold_ms", "read_warm_ms", "add_warm_ms", "replace_ms", "remove_ms",
        "add_over_read", "compiled_more",
    ),
    plot=plot_hot_add,
)  # fmt: skip
def hot_add(run: Run) -> list[Record]:
    """`cold` files are not in the system's page cache; removing costs nothing but a name."""
    some = fleet(run, 3)
    base = some.load()
    dense = [some.dense(file) for file in some.files[:2]]
    inputs = batch(4, TOKENS)
    with torch.no_grad():
        before, first, second = (hidden(each(**inputs)) for each in (base, *dense))
    records = []
    for slots in (4,) if run.quick else (4, 16):
        torch._dynamo.reset()
        model = bdc.attach(base, {"stays": some.files[2]}, slots=slots)
        model(**inputs, tenants=["stays", None] * 2)
        print(f"  compiled for {slots} slots", flush=True)
        compiled = compiled_so_far()
        with tempfile.TemporaryDirectory(dir=run.cache) as scratch:
            files = [Path(scratch) / file.name for file in some.files[:2]]
            for copy, file in zip(files, some.files, strict=False):
                copy.write_bytes(file.read_bytes())

            def rows_are(expected: Tensor, model: bdc.TenantModel = model) -> None:
                mixed = torch.where(torch.tensor([True, False, True, False])[:, None, None], expected, before)
                check_rows(hidden(model(**inputs, tenants=["new", None] * 2)), mixed, before, "rows after a change")

            times: dict[str, list[float]] = {}
            for _ in range(3 if run.quick else 9):
                _round(model, files, (first, second), rows_are, times)
        more = compiled_so_far() - compiled
        require(not any(more), f"tenants came and went, and there were compilations: {more}")
        figures = {f"{name}_ms": sorted(values)[len(values) // 2] * 1e3 for name, values in times.items()}
        records.append(
            {
                "slots": slots,
                "file_bytes": some.files[0].stat().st_size,
                **figures,
                "add_over_read": figures["add_cold_ms"] / figures["read_cold_ms"],
                "compiled_more": sum(more),
            }
        )
    return records


def _round(
    model: bdc.TenantModel,
    files: Sequence[Path],
    expected: Sequence[Tensor],
    rows_are: Callable[[Tensor], None],
    times: dict[str, list[float]],
) -> None:
    """One measurement of each operation, rows checked after each that changes what they should be."""

    def timed(name: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        times.setdefault(name, []).append(time.perf_counter() - start)

    for name in ("cold", "warm"):
        if name == "cold":
            _evict(files[0])
        timed(f"read_{name}", files[0].read_bytes)
        if name == "cold":
            _evict(files[0])
        timed(f"add_{name}", functools.partial(model.add, "new", files[0]))
        rows_are(expected[0])
        if name == "cold":
            timed("remove", functools.partial(model.remove, "new"))
    timed("replace", functools.partial(model.replace, "new", files[1]))
    rows_are(expected[1])
    model.remove("new")


def _evict(file: Path) -> None:
    """Drop a file from the page cache, as far as the system does as it is told."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
