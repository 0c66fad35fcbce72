"""Spending a budget of bytes: which matrix gets how many planes, which rank, or none at all.

Two measurements decide. What an encoding loses of a matrix's own output comes from fitting it in closed form, once for
every encoding on offer. What that loss does to the model comes from the model: a matrix whose delta is dropped moves
the outputs by so much (KL(tuned || x) of logits, relative squared distance of anything else), and near the tuned model
outputs move with the square of an error: an encoding that loses a share e of the delta's output does e^2 of the damage.

Choosing is then a knapsack, solved greedily on the lower convex hull of every matrix's (bytes, damage): the steps that
prevent the most damage per byte come first. Nothing is random; ties fall by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta
from ..encodings import Same
from ..errors import CalibrationError, UnsupportedError
from ..progress import Progress
from .encode import encode
from .settings import Allocation, Settings
from .streams import Run, Substitution
from .weights import FittedValues
from .workload import Workload

log = logging.getLogger(__name__)

# What a matrix may get beside nothing: planes and rank.
SIZES = ((1, 0), (1, 8), (2, 0), (2, 8), (3, 0), (4, 0))
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Offer:
    """One encoding of one matrix.

    Attributes:
        nbytes: of its tensors.
        damage: to the outputs, in the unit of `sensitivities`.
    """

    allocation: Allocation
    nbytes: int
    damage: float


def limit(bits: float | None, max_bytes: int | None, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The most bytes that a delta file may have; None where neither is given.

    Args:
        bits: of the file per weight of the tuned model.  shapes: of its parameters.

    Raises:
        UnsupportedError: both are given, or one is no number above 0.
    """
    if bits is not None and max_bytes is not None:
        raise UnsupportedError("bits and max_bytes are two ways to say one thing: give one of them")
    for name, value in (("bits", bits), ("max_bytes", max_bytes)):
        if value is not None and not 0 < value < math.inf:
            raise UnsupportedError(f"{name} must be a number above 0, got {value!r}")
    if bits is not None:
        return int(bits * sum(prod(shape) for shape in shapes.values()) / 8)
    return max_bytes


def choose(offers: Mapping[str, Sequence[Offer]], room: int) -> dict[str, Offer]:
    """The offers, one for each name, that together take at most `room` bytes and do little damage.

    Greedy: every matrix starts at its smallest offer, and steps along its hull are taken in order of the damage that a
    byte prevents; a matrix whose next step no longer fits stays where it is.

    Raises:
        ValueError: the smallest offers take more than `room`.
    """
    hulls = {name: _hull(found) for name, found in offers.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = room - sum(offer.nbytes for offer in chosen.values())
    if left < 0:
        raise ValueError(f"the smallest offers take {room - left} bytes, and there is room for {room}")
    steps = [
        (-(low.damage - high.damage) / (high.nbytes - low.nbytes), name, place, low, high)
        for name, hull in hulls.items()
        for place, (low, high) in enumerate(itertools.pairwise(hull))
    ]
    for _, name, _, low, high in sorted(steps, key=lambda step: step[:3]):
        if chosen[name] is low and high.nbytes - low.nbytes <= left:
            chosen[name] = high
            left -= high.nbytes - low.nbytes
    return chosen


def _hull(offers: Sequence[Offer]) -> list[Offer]:
    """The lower convex hull, by bytes: each step prevents less damage per byte than the one before."""
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda each: (each.nbytes, each.damage)):
        if found and offer.damage >= found[-1].damage:
            continue
        while len(found) > 1 and _slope(found[-2], offer) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(offer)
    return found


def _slope(low: Offer, high: Offer) -> float:
    return (high.damage - low.damage) / (high.nbytes - low.nbytes)


@torch.no_grad()
def sensitivities(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    workload: Workload,
    names: Sequence[str],
    progress: Progress | None = None,
) -> dict[str, float]:
    """How far the outputs of the first run move when one matrix's delta is dropped from the tuned model.

    Raises:
        CalibrationError: every token is masked.
    """
    run = next((run for run in workload.runs if run.mask is None or bool(run.mask.any())), None)
    if run is None:
        raise CalibrationError("every token of the calibration batches is masked: give some that count")
    kind = getattr(getattr(workload.model, "config", None), "problem_type", None)

    def outputs(values: FittedValues) -> tuple[Tensor, bool]:
        with Substitution(workload.handles, lambda use: None, values):
            found, logits = _rows(run.call(), run)
        odds = logits and found.shape[-1] > 1 and kind not in ("regression", "multi_label_classification")
        return found.log_softmax(-1) if odds else found, odds

    expected, odds = outputs(FittedValues(base, tuned, workload.device))
    apart = _divergence if odds else _distance
    found: dict[str, float] = {}
    for done, name in enumerate(names):
        if progress is not None:
            progress("measure", done, len(names))
        without = FittedValues(base, tuned, workload.device)
        without.encodings = {name: Same(tuple(tuned[name].shape), tuned[name].dtype)}
        found[name] = apart(expected, outputs(without)[0])
    if progress is not None:
        progress("measure", len(names), len(names))
    return found


def _rows(output: Any, run: Run) -> tuple[Tensor, bool]:
    """Logits or hidden states of the tokens that count, fp32 [*, V] or [*, H], and whether they are logits."""
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else getattr(output, "last_hidden_state", output)
    if not isinstance(found, Tensor):
        raise UnsupportedError(
            "a budget is spent by what the model's outputs lose, and it gives neither logits nor hidden states: "
            "give allocation= instead of bits or max_bytes"
        )
    found = found.float()
    if run.mask is not None and run.mask.shape == found.shape[:2]:
        found = found[run.mask]
    return found, logits is not None


def _divergence(expected: Tensor, found: Tensor) -> float:
    """KL per row, of log probabilities."""
    total = float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
    return max(0.0, total / expected[..., 0].numel())


def _distance(expected: Tensor, found: Tensor) -> float:
    """Relative and squared."""
    apart, size = (float(each.square().sum(dtype=torch.float64)) for each in (expected - found, expected))
    return apart / max(size, torch.finfo(torch.float32).tiny)


def offers(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    workload: Workload,
    settings: Settings,
    progress: Progress | None = None,
) -> dict[str, list[Offer]]:
    """What can be had for every matrix that changed, measured on the workload."""
    fast = dataclasses.replace(settings, method="closed_form", columns=settings.scales_columns, allocation={})
    found: dict[str, list[Offer]] = {}
    damages: dict[str, float] = {}
    for done, (planes, rank) in enumerate(SIZES):
        if progress is not None:
            progress("offer", done, len(SIZES))
        sized = dataclasses.replace(fast, planes=planes, rank=rank)
        encodings, report = encode(
            base,
            tuned,
            workload.runs,
            sized,
            handles=workload.handles,
            device=workload.device,
            copy=False,
            checked=True,
        )
        if not found:
            damages = _damages(base, tuned, workload, report, progress)
        for name, figures in report.items():
            encoding = encodings[name]
            outright = "error" not in figures
            kind = "dense" if encoding.kind == "dense" else "sign"
            allocation = Allocation("dense") if kind == "dense" else Allocation("sign", planes, rank)
            damage = 0.0 if outright else damages[name] * float(figures["error"]) ** 2
            found.setdefault(name, []).append(Offer(allocation, encoding.nbytes, damage))
    for name, known in found.items():
        known.append(Offer(Allocation("dense"), tuned[name].nbytes, 0.0))
        if base[name].shape == tuned[name].shape:
            known.append(Offer(Allocation("same"), 0, damages[name]))
    if progress is not None:
        progress("offer", len(SIZES), len(SIZES))
    return found


def _damages(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    workload: Workload,
    report: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, float]:
    """What dropping each matrix's delta does: measured, or without anything to run its own squared output."""
    if workload.runs and workload.place.type != "meta":
        return sensitivities(base, tuned, workload, list(report), progress)
    return {name: float(figures.get("energy", 1e30)) for name, figures in report.items()}


def within(
    room: int,
    make: Callable[[Settings, Path | None], Delta],
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    workload: Workload,
    settings: Settings,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> Delta:
    """The delta whose file takes at most `room` bytes, each matrix encoded as `choose` has it.

    Args:
        make: a delta by settings, whose `allocation` is decided here, and by the folder where it keeps its work.
        work_dir: where those folders are made; None keeps nothing.

    Raises:
        UnsupportedError: no delta of this fine-tune is that small; the message names the smallest.
    """
    on_offer = offers(base, tuned, workload, settings, progress)
    # What a file takes beside its matrices is known once one has been made; of the cheapest kind, that takes no fit.
    smallest = {name: min(found, key=lambda each: each.nbytes) for name, found in on_offer.items()}
    size = file_bytes(delta := make(_allocated(settings, smallest), None))
    if size > room:
        raise UnsupportedError(
            f"no delta of this fine-tune fits in {room} bytes: the smallest takes {size}, since whatever is not a "
            f"matrix is kept; give at least max_bytes={size}"
        )
    left = room - size + sum(delta.encodings[name].nbytes for name in smallest)
    for attempt in range(_ROUNDS):
        chosen = choose(on_offer, left)
        delta = make(_allocated(settings, chosen), _part(work_dir, attempt))
        size = file_bytes(delta)
        if size <= room:
            log.info("%d of %d bytes: %s", size, room, _counted(chosen))
            return delta
        # Planes that came out too far off are stored outright, which no offer had foreseen.
        taken = {name: delta.encodings[name].nbytes for name in chosen}
        for name, offer in chosen.items():
            met = dataclasses.replace(offer, nbytes=taken[name])
            on_offer[name] = [met if each is offer else each for each in on_offer[name]]
        left = room - size + sum(taken.values())
    raise UnsupportedError(f"no delta was found that fits in {room} bytes: give more, or another quality")


def _allocated(settings: Settings, chosen: Mapping[str, Offer]) -> Settings:
    return dataclasses.replace(settings, allocation={name: offer.allocation for name, offer in chosen.items()})


def _part(work_dir: Path | None, attempt: int) -> Path | None:
    if work_dir is None:
        return None
    folder = work_dir / f"budget-{attempt}"
    folder.mkdir(exist_ok=True)
    return folder


def _counted(chosen: Mapping[str, Offer]) -> str:
    kinds: dict[str, int] = {}
    for offer in chosen.values():
        given = offer.allocation
        label = f"{given.planes} planes, rank {given.rank}" if given.encoding == "sign" else given.encoding
        kinds[label] = kinds.get(label, 0) + 1
    return "; ".join(f"{count} x {label}" for label, count in sorted(kinds.items()))


def file_bytes(delta: Delta) -> int:
    """What the delta takes on disk, header and side files included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "delta"
        delta.save(path)
        return path.stat().st_size
