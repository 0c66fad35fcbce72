"""From the delta of one matrix to sign planes, scales and a low-rank part.

Notation: d [N, K] is tuned - base, X the layer's inputs, H = X^T X; an error r in a row of weights costs r H r. Rows
are independent given H, so everything here goes over blocks of rows and the delta is never held whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..encodings import Sign
from ..kernels import layout
from . import signs as choice
from .lowrank import LowRank
from .metric import Metric
from .settings import Settings

# Elements of one block of a delta in fp32: bounds the memory beyond the checkpoints (1 MiB per temporary).
BLOCK_ELEMENTS = 1 << 18
# The same where H is there: its products want more rows at once, and the chain over columns costs the same for any. A
# GPU has a warp for every 32 rows, and is filled by thousands.
FIT_ELEMENTS = 1 << 22
FIT_ELEMENTS_ON_GPU = 1 << 25


@dataclasses.dataclass(frozen=True)
class DeltaMatrix:
    """The delta of one matrix, read block by block.

    Attributes:
        base, tuned: the parameter as both models store it, [N, K], or [K, N] when `transposed`; row counts N may
            differ.
        transposed: both are stored [K, N].
        device: where it is fitted; None: where `tuned` is.
    """

    base: Tensor
    tuned: Tensor
    transposed: bool = False
    device: torch.device | None = None

    @property
    def place(self) -> torch.device:
        return self.device or self.tuned.device

    @property
    def rows(self) -> int:
        """N of the base: what the planes span. Rows that only the tuned model has are no part of a delta."""
        return self.base.shape[1 if self.transposed else 0]

    @property
    def features(self) -> int:
        return self.base.shape[0 if self.transposed else 1]

    def blocks(self, elements: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 [n, K]) over all rows; rows that the tuned model lacks are zero.

        Args:
            elements: about how many a block holds; BLOCK_ELEMENTS by default.
        """
        base, tuned = (t.T if self.transposed else t for t in (self.base.detach(), self.tuned.detach()))
        height = max(1, (elements or BLOCK_ELEMENTS) // max(1, self.features))
        for first in range(0, self.rows, height):
            ours = base[first : first + height]
            theirs = tuned[first : first + ours.shape[0]]
            block = torch.zeros(ours.shape, dtype=torch.float32, device=self.place)
            ours = ours[: theirs.shape[0]].to(self.place)
            torch.sub(theirs.to(self.place).float(), ours.float(), out=block[: theirs.shape[0]])
            yield first, block

    def rows_of_tuned(self, rows: slice) -> Tensor:
        """The tuned matrix, fp32 [n, K]; rows that it lacks are zero."""
        tuned = self.tuned.detach().T if self.transposed else self.tuned.detach()
        found = tuned[rows].to(self.place).float()
        return torch.nn.functional.pad(found, (0, 0, 0, rows.stop - rows.start - found.shape[0]))

    def tuned_energy(self) -> float:
        """The squared norm of the tuned matrix."""
        total = 0.0
        for first in range(0, self.tuned.shape[0], height := max(1, BLOCK_ELEMENTS // max(1, self.tuned.shape[1]))):
            total += float(self.tuned.detach()[first : first + height].float().square().sum(dtype=torch.float64))
        return total


def choose_signs(values: Tensor, first_row: int = 0) -> Tensor:
    """Signs of `values` fp32 [n, K], true for +1.

    A zero has no sign, and one bit cannot say zero: the zeros of a row take turns, + and -, starting with + in even
    rows, so that they cancel in the row (to within one) and between rows. `first_row` is the row's place in the matrix.
    """
    positive = values > 0
    zero = values == 0
    if bool(zero.any()):
        rows = torch.arange(first_row, first_row + values.shape[0], device=values.device).unsqueeze(-1)
        turn = zero.cumsum(-1, dtype=torch.int32).add_(rows)
        positive |= zero & (turn % 2 == 1)
    return positive


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The planes of one matrix.

    Attributes:
        sign: the encoding.
        error: of the delta's output: |X (d - found)^T| over |X d^T|; of the delta itself where there was no metric.
        weight_error: |d - found| over |tuned|, infinite where the tuned matrix is zero.
        energy: d H d, per token: the squared output of the delta.
        lacking: fp32 [N], what the mean output lacks of the tuned model's, where the metric leaves that to a bias.
    """

    sign: Sign
    error: float
    weight_error: float
    energy: float
    lacking: Tensor | None = None


def column_means(matrix: DeltaMatrix, planes: int, weight: Tensor | None = None) -> Tensor:
    """Column scales from the weights alone, fp32 [P, K]: the mean of |residual| over rows, each plane's mean being 1.

    Args:
        weight: fp32 [N] or None: how much each row counts.
    """
    found = torch.empty(0, matrix.features, device=matrix.place)
    for plane in range(planes):
        total = torch.zeros(matrix.features, dtype=torch.float64, device=matrix.place)
        for first, block in matrix.blocks():
            rest = block.T.contiguous()
            for before in range(plane):
                _peel(rest, found[before], first, None)
            rest.abs_()
            total += (rest if weight is None else rest * weight[first : first + block.shape[0]]).sum(1).double()
        mean = float(total.mean()) if total.numel() else 0.0
        scale = (total / mean if mean > 0 else torch.ones_like(total)).float()
        found = torch.cat([found, scale.unsqueeze(0)])
    return found


def plane_means(matrix: DeltaMatrix, planes: int) -> list[float]:
    """One scale per plane, the mean of |residual| over the whole matrix (BitDelta, arXiv 2402.10193, eq. 3)."""
    found: list[float] = []
    for _ in range(planes):
        total = 0.0
        for first, block in matrix.blocks():
            for scalar in found:
                block -= torch.where(choose_signs(block, first), scalar, -scalar)
            total += float(block.abs_().sum(dtype=torch.float64))
        found.append(total / max(1, matrix.rows * matrix.features))
    return found


def _peel(rest: Tensor, columns: Tensor | None, first_row: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take one plane with the target's own signs off `rest` [K, n], in place: signs fp32 [1, K, n], scale [1, n]."""
    signs = own_signs(rest, first_row)
    column = None if columns is None else columns.unsqueeze(0)
    scale = choice.fit_scale(rest, signs, column, h)
    rest -= choice.values(signs, scale, column)
    return signs, scale


def own_signs(rest: Tensor, first_row: int) -> Tensor:
    """The signs of [K, n], as fp32 [1, K, n]."""
    return choose_signs(rest.T, first_row).T.float().mul_(2).sub_(1).unsqueeze(0)


def _block_of_means(target: Tensor, first_row: int, means: list[float], silent: Tensor) -> tuple[Tensor, Tensor]:
    """Signs and scales of a block, each plane's scale given; rows `silent`, bool [n], have the scale 0."""
    rest, parts = target.clone(), []
    scale = torch.tensor(means, device=target.device).unsqueeze(-1).expand(-1, target.shape[1])
    scale = scale.masked_fill(silent, 0.0)
    for plane in range(len(means)):
        parts.append(own_signs(rest, first_row))
        rest -= parts[-1][0] * scale[plane]
    return torch.cat(parts), scale


def _fit_block(
    target: Tensor,
    first_row: int,
    columns: Tensor | None,
    metric: Metric | None,
    settings: Settings,
    planes: int,
    fed: bool,
) -> tuple[Tensor, Tensor]:
    """Signs fp32 [P, K, n] and scale [P, n] of target [K, n], both in the metric's order."""
    h = None if metric is None else metric.h
    rest = target.clone()
    parts = [_peel(rest, None if columns is None else columns[plane], first_row, h) for plane in range(planes)]
    signs = torch.cat([part[0] for part in parts]).contiguous()
    scale = choice.fit_scale(target, signs, columns, h) if planes > 1 else parts[0][1]
    if not fed or metric is None or metric.upper is None or h is None:
        return signs, scale
    for _ in range(settings.passes):
        signs = choice.feed_errors(target, scale, columns, metric.upper)
        scale = choice.fit_scale(target, signs, columns, h)
    for _ in range(settings.sweeps):
        choice.flip_signs(target, signs, scale, columns, h)
        scale = choice.fit_scale(target, signs, columns, h)
    return signs, scale


class _Planes:
    """Signs and scales of one matrix while they are fitted, block of rows by block; [K, n] is in the metric's order.

    Attributes:
        signs: int32 [P, N, W], features as the matrix has them.
        scale: fp32 [P, N].
        columns: fp32 [P, K] or None, features as the matrix has them.
        fed: signs come from error feedback.
    """

    def __init__(
        self, matrix: DeltaMatrix, metric: Metric | None, settings: Settings, planes: int, weight: Tensor | None
    ) -> None:
        self._matrix, self._settings, self._planes = matrix, settings, planes
        self.columns = column_means(matrix, planes, weight) if settings.scales_columns else None
        self._means = plane_means(matrix, planes) if settings.method == "mean_abs" else None
        self.order = torch.arange(matrix.features, device=matrix.place) if metric is None else metric.order
        self.metric = None if metric is None else dataclasses.replace(metric, h=metric.ordered)
        self._columns = None if self.columns is None else self.columns[:, self.order]
        self.fed = settings.method == "sequential" and metric is not None and metric.upper is not None
        self.signs = torch.empty(planes, matrix.rows, layout.words(matrix.features), dtype=torch.int32)
        self.scale = torch.empty(planes, matrix.rows)

    def targets(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, their delta [n, K] as it is, what is to be fitted [K, n]: the delta and what the metric adds)."""
        shift = None if self.metric is None else self.metric.shift
        elements = BLOCK_ELEMENTS
        if self.metric is not None:
            elements = FIT_ELEMENTS if self._matrix.place.type == "cpu" else FIT_ELEMENTS_ON_GPU
        for first, delta in self._matrix.blocks(elements):
            rows = slice(first, first + delta.shape[0])
            wanted = delta if shift is None else delta + self._matrix.rows_of_tuned(rows) @ shift
            yield rows, delta, wanted.T[self.order]

    def fit(self, rows: slice, delta: Tensor, target: Tensor) -> Tensor:
        """Signs and scales of these rows; what they amount to, fp32 [K, n]."""
        if self._means is not None:
            return self._keep(rows, *_block_of_means(target, rows.start, self._means, (delta == 0).all(-1)))
        return self._keep(
            rows,
            *_fit_block(target, rows.start, self._columns, self.metric, self._settings, self._planes, self.fed),
        )

    def refit(self, rows: slice, delta: Tensor, target: Tensor) -> Tensor:
        """`fit` once more, to what a low-rank part leaves of what these rows were fitted to."""
        if self.fed:
            return self.fit(rows, delta, target)
        signs, scale = self._found(rows)
        if self._means is None:  # the delta's own signs stay: those of what the low-rank part leaves are worse
            scale = choice.fit_scale(target, signs, self._columns, None if self.metric is None else self.metric.h)
        return self._keep(rows, signs, scale)

    def values(self, rows: slice) -> Tensor:
        """What was found amounts to, fp32 [K, n]."""
        return choice.values(*self._found(rows), self._columns)

    def _found(self, rows: slice) -> tuple[Tensor, Tensor]:
        device = self._matrix.place
        signs = layout.unpack_signs(self.signs[:, rows].to(device), self._matrix.features, torch.float32)
        return signs.transpose(1, 2)[:, self.order], self.scale[:, rows].to(device)

    def _keep(self, rows: slice, signs: Tensor, scale: Tensor) -> Tensor:
        back = torch.empty_like(signs)
        back[:, self.order] = signs
        for plane in range(self._planes):
            self.signs[plane, rows] = layout.pack(back[plane].T > 0).cpu()
        self.scale[:, rows] = scale.cpu()
        return choice.values(signs, scale, self._columns)


def fit(
    matrix: DeltaMatrix,
    metric: Metric | None,
    settings: Settings,
    *,
    planes: int,
    rank: int,
    rank_first: bool = False,
    weight: Tensor | None = None,
) -> Fitted:
    """Planes, and a low-rank part, that lose the least under `metric`.

    Args:
        metric: what errors cost; None: every weight counts alike.
        rank_first: fit the low-rank part to the delta and the planes to what it leaves, as suits a delta of which a
            few directions are most; else it is fitted to what planes leave.
        weight: fp32 [N] or None: how much each row counts for the column scales.
    """
    found = _Planes(matrix, metric, settings, planes, weight)
    rank = min(rank, matrix.rows, matrix.features)
    left = right = low_rank = None
    if rank:
        low_rank = LowRank(rank, matrix.features, found.metric, matrix.place)
        for rows, delta, target in found.targets():
            low_rank.add(target if rank_first else target - found.fit(rows, delta, target))
        left, right = torch.empty(matrix.rows, rank), low_rank.right()
    lacking = means_of_x = None
    if metric is not None and metric.mean is not None and metric.offset is not None:
        means_of_x = metric.mean[found.order], metric.offset
        lacking = torch.empty(matrix.rows)
    lost = energy = apart = 0.0
    for rows, delta, target in found.targets():
        if low_rank is not None and left is not None and right is not None:
            factor = low_rank.left(target if rank_first else target - found.values(rows))
            target -= (factor @ right).T
            left[rows] = factor.cpu()
        again = rank > 0 and not rank_first
        rest = target - (found.refit if again else found.fit)(rows, delta, target)
        lost += _cost(rest, found.metric)
        energy += _cost(delta.T[found.order], found.metric)
        apart += _cost(rest, None)
        if means_of_x is not None and lacking is not None:
            mean, offset = means_of_x
            lacking[rows] = (rest.T @ mean + matrix.rows_of_tuned(rows) @ offset).cpu()
    if right is not None:
        right = torch.empty_like(right).index_copy_(1, found.order, right)
    sign = Sign(
        tuple(matrix.base.shape),
        matrix.tuned.dtype,
        found.signs,
        found.scale,
        None if found.columns is None else found.columns.cpu(),
        None if left is None else left.bfloat16(),
        None if right is None else right.bfloat16().cpu(),
        matrix.transposed,
    )
    of_tuned = matrix.tuned_energy()
    weight_error = math.inf if apart > 0 and not of_tuned > 0 else _ratio(apart, of_tuned)
    return Fitted(sign, _ratio(lost, energy), weight_error, energy, lacking)


def _cost(rest: Tensor, metric: Metric | None) -> float:
    """Sum over rows of r H r, for errors [K, n]."""
    weighed = rest if metric is None else metric.h @ rest
    return float((rest * weighed).sum(dtype=torch.float64))


def _ratio(lost: float, energy: float) -> float:
    return float((max(0.0, lost) / energy) ** 0.5) if energy > 0 else 0.0
