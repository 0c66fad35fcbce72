"""From two sets of tensors to encodings: what changed, how the model uses it, which encoding pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..encodings import Dense, Encoding, Rows, Same
from ..progress import Progress
from . import tables
from .changes import Change, check_finite, compare
from .fit import DeltaMatrix, Fitted, fit
from .metric import Metric, Moments, measure
from .precision import full_precision
from .sequence import Arrival, arrivals, collect
from .settings import Settings
from .streams import Run
from .survey import Survey, Usage, survey
from .uses import Use
from .weights import FittedValues, TunedValues
from .workdir import WorkDir


class _Matrices:
    """The candidates for sign planes, fitted one by one.

    Attributes:
        encodings, report: of those done.
        vectors: biases that make up for the mean of what planes lose, by name.
        pending: those that are to be fitted to inputs, and are not yet.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        changes: Mapping[str, Change],
        settings: Settings,
        copy: bool,
        work: WorkDir | None,
        device: torch.device | None,
    ) -> None:
        self.base, self.tuned, self.changes, self.settings = base, tuned, changes, settings
        self.copy, self.work, self.device = copy, work, device
        self.encodings: dict[str, Encoding] = {}
        self.report: dict[str, Any] = {}
        self.pending: set[str] = set()
        self.usage: dict[str, Usage] = {}
        self.vectors: dict[str, Tensor] = {}
        self._others: Mapping[str, int] = {}
        self._bias_of: dict[str, str] = {}  # by matrix, the vector that was changed with it
        self._metric: Metric | None = None

    def transposed(self, name: str) -> bool:
        return bool(self.usage[name].transposed) if name in self.usage else False

    def _matrix(self, name: str) -> DeltaMatrix:
        return DeltaMatrix(self.base[name], self.tuned[name], self.transposed(name), self.device)

    def features(self, name: str) -> int:
        return self.tuned[name].shape[0 if self.transposed(name) else 1]

    def prepare(self, names: set[str], seen: Survey | None) -> None:
        """Settle what needs no fit; the rest is pending if the run reaches it."""
        self.usage, self._others = (dict(seen.usage), dict(seen.others)) if seen is not None else ({}, {})
        for name in sorted(names):
            why = self.usage[name].refused if name in self.usage else None
            found = self._dense(name, why) if why else self._unfitted(name)
            if found is not None:
                self._settle(name, *found)
            elif name in self.usage and self.settings.method != "mean_abs":
                self.pending.add(name)

    def _settle(self, name: str, encoding: Encoding, figures: dict[str, Any]) -> None:
        self.encodings[name], self.report[name] = encoding, figures
        self.pending.discard(name)

    def _dense(self, name: str, why: str) -> tuple[Encoding, dict[str, Any]]:
        tuned = self.tuned[name]
        return Dense(tuple(tuned.shape), tuned.dtype, keep(tuned, self.copy)), {"why": why}

    def refuse(self, use: Use) -> None:
        """A use that no earlier run had shown."""
        if use.name in self.pending or use.name in self.encodings:
            self.vectors.pop(self._bias_of.pop(use.name, ""), None)
            self._settle(use.name, *self._dense(use.name, f"used by {use.op}"))

    def _grown(self, name: str) -> Tensor:
        """Rows that only the tuned matrix has, int64."""
        side = 1 if self.transposed(name) else 0
        ours, theirs = self.changes[name].shape[side], self.tuned[name].shape[side]
        return torch.arange(ours, max(ours, theirs))

    def _row_bytes(self, name: str) -> int:
        return 8 + self.features(name) * self.tuned[name].element_size()

    def _unfitted(self, name: str) -> tuple[Encoding, dict[str, Any]] | None:
        """The encoding of a matrix that sign planes are not for; None where they are."""
        tuned, change, transposed = self.tuned[name], self.changes[name], self.transposed(name)
        given = self.settings.allocation.get(name)
        if given is not None and given.encoding == "dense":
            return self._dense(name, "asked for")
        if given is not None and given.encoding == "same" and change.shape == tuned.shape:
            return Same(tuple(tuned.shape), tuned.dtype), {"why": "asked for"}
        side = 0 if transposed else 1
        if change.shape[side] != tuned.shape[side]:
            return self._dense(name, f"the base has shape {list(change.shape)}")
        grown = self._grown(name)
        listed = torch.cat([change.columns if transposed else change.rows, grown])
        rows_bytes = listed.numel() * self._row_bytes(name)
        planes_bytes = self.settings.sign_bytes(change.shape[1 - side], self.features(name), name)
        if rows_bytes < min(tuned.nbytes, planes_bytes + grown.numel() * self._row_bytes(name)):
            return _rows(tuned, listed, None, transposed), {"rows": listed.numel()}
        return None

    def fit(self, name: str, metric: Metric | None, uses: Tensor | None = None, bias: str | None = None) -> None:
        """Planes for a matrix, unless they come out too far off or too large; kept in the work folder at once.

        Args:
            uses: of a table, int64 [N] on the CPU: how often each row is looked up.
            bias: the vector that may be changed with it, see `Metric.mean`.
        """
        planes, rank = self.settings.size(name)
        matrix = self._matrix(name)
        far = uses is not None and self._may_be_far(name) and tables.moved(matrix) > self.settings.far
        rank = max(rank, tables.FAR_RANK) if far else rank
        done = self.work.load(name) if self.work is not None else None
        if done is None:
            weight = None if uses is None else (uses + 1).float().to(matrix.place)
            done = fit(matrix, metric, self.settings, planes=planes, rank=rank, rank_first=far, weight=weight)
            if done.weight_error > self.settings.max_error and self.settings.method == "sequential":
                # Error feedback moves errors to where these inputs do not see them, and so does making up for earlier
                # layers; the delta's own signs do not.
                own = dataclasses.replace(self.settings, method="closed_form")
                still = None if metric is None else metric.unshifted()
                other = fit(matrix, still, own, planes=planes, rank=rank, weight=weight)
                done = min(done, other, key=lambda each: each.weight_error)
            if self.work is not None:
                done = self.work.store(name, done)
        self._settle(name, *self._judge(name, done, uses if far else None))
        if bias is not None and done.lacking is not None and self.encodings[name] is done.sign:
            tuned = self.tuned[bias].detach()
            self.vectors[bias] = (tuned.float() + done.lacking.to(tuned.device)).to(tuned.dtype)
            self._bias_of[name] = bias

    def _may_be_far(self, name: str) -> bool:
        """Whether more than planes is for us to give."""
        return self.settings.method == "sequential" and name not in self.settings.allocation

    def _judge(self, name: str, done: Fitted, uses: Tensor | None) -> tuple[Encoding, dict[str, Any]]:
        tuned, settings, grown = self.tuned[name], self.settings, self._grown(name)
        if done.weight_error > settings.max_error:
            figure = f"{done.weight_error:.3g}"
            encoding, why = self._dense(name, f"planes leave {figure} of its norm, more than {settings.max_error:g}")
            return encoding, why | {"weight_error": float(figure)}
        often = grown[:0] if uses is None else tables.most_used(self._matrix(name), done.sign, uses)
        listed = torch.cat([often, grown])
        if done.sign.nbytes + listed.numel() * self._row_bytes(name) >= tuned.nbytes:
            return self._dense(name, "planes take no fewer bytes")
        figures = {"error": done.error, "weight_error": done.weight_error, "energy": done.energy}
        rounded: dict[str, Any] = {key: float(f"{figure:.4g}") for key, figure in figures.items()}
        rounded |= {"rows": often.numel()} if often.numel() else {}
        if not listed.numel() and done.sign.shape == tuned.shape:
            return done.sign, rounded
        return _rows(tuned, listed, done.sign, self.transposed(name)), rounded

    def arrive(self, at: Arrival, shared: Mapping[str, Moments]) -> None:
        """Fit the matrix that the streams stand before."""
        name, settings = at.name, self.settings
        bias = at.bias if at.bias is not None and self._free(at.bias) else None
        uses = None
        if at.looked_up:
            height = self.changes[name].shape[0]
            uses = torch.bincount(at.ids(), minlength=height)[:height]
        if self.work is not None and name in self.work:
            self._metric = None if at.fresh else self._metric
            return self.fit(name, None, uses, bias)
        factor = settings.method == "sequential" or settings.ranked
        if name in shared:
            moments = shared[name]
            extra = tables.balance(self._matrix(name), moments, uses) if self.usage[name].looked_up else 0.0
            self._metric = None
            return self.fit(name, measure(moments, factor=factor, extra=extra), uses)
        if at.looked_up:
            return self.fit(name, None, uses)
        centered = bias is not None
        if at.fresh or self._metric is None or centered != (self._metric.mean is not None):
            self._metric = None
            self._metric = measure(at.moments(self.features(name)), factor=factor, centered=centered)
        self.fit(name, self._metric, bias=bias)

    def _free(self, bias: str) -> bool:
        """Whether a bias is stored outright anyway, and nothing but its one product uses it."""
        return bias in self.changes and not self.changes[bias].equal and self._others.get(bias) == 1


def keep(tensor: Tensor, copy: bool) -> Tensor:
    """The tensor on the CPU, its own memory if `copy`."""
    kept = tensor.detach().cpu()
    return kept.clone() if copy else kept


def _rows(tuned: Tensor, index: Tensor, over: Any, transposed: bool) -> Rows:
    by_row = tuned.detach().T if transposed else tuned.detach()
    values = by_row[index.to(tuned.device)].cpu().contiguous()
    return Rows(tuple(tuned.shape), tuned.dtype, index, values, over, transposed)


def check_values(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    """Raise BitDeltaError naming the parameter where one of either model holds NaN or infinite values."""
    for name, tensor in tuned.items():
        check_finite(name, tensor, "tuned")
        if name in base:
            check_finite(name, base[name], "base")


@full_precision()
def encode(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    runs: Sequence[Run] | Callable[[], object] | None,
    settings: Settings,
    *,
    handles: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    copy: bool = True,
    checked: bool = False,
    work: WorkDir | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Encoding], dict[str, Any]]:
    """Encode every tuned tensor against its base.

    Semantics, first rule that holds:
        same   the base, in the tuned dtype, equals the tuned tensor
        dense  not a floating-point matrix, unknown to the base, under `min_elements`, or of other features
        dense  some use of it is not a plain product or lookup
        rows   the rows that differ or are new, stored outright, take fewer bytes than sign planes
        dense  the planes are too far off (`max_error`) or not smaller
        sign   P planes; under `rows` with the new rows where the matrix grew, and with the most used rows of a table
               that has moved `far`, which also gets a low-rank part

    Args:
        base, tuned: tensors by the tuned model's names; names that the base lacks are new.
        runs: the tuned model on each calibration batch; for `mean_abs` only the first is run, to show uses, meta
            tensors included. A function is one run. None: every matrix counts as an [N, K] linear weight, scales from
            the weights.
        settings: see `Settings`.
        handles: the tensors that runs use, by the same names, where they are not `tuned` itself (a model on the meta
            device).
        device: where matrices are fitted and runs compute, weights being put there for as long as they are used; None:
            where the tuned tensors are. Runs bring their own inputs there.
        copy: dense values are copied; False where `tuned` is mapped from a file that stays.
        checked: `check_values` has been called.
        work: where each fitted matrix is kept, so that an interrupted run goes on from there.
        progress: called with ("fit", done, total), counting matrices.

    Returns:
        Encodings by name, and the report: per sign-encoded matrix `error` (relative error of the delta's output on
        the calibration data, or of the delta itself where there was none), `weight_error` (of the tuned matrix's
        norm) and `energy` (the squared output of the whole delta, per token); per dense matrix `why`, and
        `weight_error` where that is the reason.

    Raises:
        BitDeltaError: a parameter holds NaN or infinite values.  CalibrationError: a layer's inputs do.
    """
    handles = tuned if handles is None else handles
    runs = [] if runs is None else [Run(runs)] if callable(runs) else list(runs)
    if not checked:
        check_values(base, tuned)
    changes = {name: compare(base[name], tensor) for name, tensor in tuned.items() if name in base}
    candidates = {
        name
        for name, change in changes.items()
        if not change.equal
        and tuned[name].is_floating_point()
        and tuned[name].dim() == len(change.shape) == 2
        and tuned[name].numel() >= settings.min_elements
        and prod(change.shape) > 0
    }
    matrices = _Matrices(base, tuned, changes, settings, copy, work, device)
    values = TunedValues(tuned, device)
    seen = survey(runs, handles, candidates, values) if runs and candidates else None
    matrices.prepare(candidates, seen)

    def report(done: int) -> None:
        if progress is not None:
            progress("fit", done, len(candidates))

    report(len(matrices.encodings))
    with torch.no_grad():
        if seen is not None and matrices.pending:
            _fit_to_inputs(matrices, runs, handles, values, seen, report)
        for name in sorted(candidates - matrices.encodings.keys()):
            matrices.fit(name, None)
            report(len(matrices.encodings))
    encodings: dict[str, Encoding] = {}
    for name, tensor in tuned.items():
        if name in changes and changes[name].equal:
            encodings[name] = Same(tuple(tensor.shape), tensor.dtype)
        elif name in candidates:
            encodings[name] = matrices.encodings[name]
        else:
            kept = matrices.vectors.get(name, tensor)
            encodings[name] = Dense(tuple(tensor.shape), tensor.dtype, keep(kept, copy))
    return encodings, {name: matrices.report[name] for name in tuned if name in matrices.report}


def _fit_to_inputs(
    matrices: _Matrices,
    runs: Sequence[Run],
    handles: Mapping[str, Tensor],
    values: TunedValues,
    seen: Survey,
    report: Callable[[int], None],
) -> None:
    several = {
        name: matrices.features(name)
        for name in matrices.pending
        if seen.usage[name].multiplied + seen.usage[name].looked_up > 1 and seen.usage[name].multiplied
    }
    shared = collect(runs, handles, values, several, seen)
    compressed = None
    if matrices.settings.method == "sequential":
        compressed = FittedValues(matrices.base, matrices.tuned, matrices.device)
        compressed.encodings, compressed.vectors = matrices.encodings, matrices.vectors
    for at in arrivals(runs, handles, matrices.pending, values, compressed, matrices.refuse):
        matrices.arrive(at, shared)
        shared.pop(at.name, None)
        report(len(matrices.encodings))


def unrelated(encodings: Mapping[str, Encoding], report: Mapping[str, Any], settings: Settings) -> list[str]:
    """The matrices that are not tiny, if each had to be stored outright and planes were too far off for some: the
    model is then no fine-tune of this base. Else none.

    Args:
        report: what `encode` gave beside the encodings.
    """
    found = [
        name
        for name, encoding in encodings.items()
        if len(encoding.shape) == 2 and encoding.shape[0] * encoding.shape[1] >= settings.min_elements
    ]
    far = any("weight_error" in report.get(name, {}) for name in found)
    return found if far and all(encodings[name].kind == "dense" for name in found) else []
