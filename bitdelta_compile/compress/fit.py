"""Fitting sign planes: which sign each weight's delta gets, and the scales that lose the least of the layer's output.

Notation: d [N, K] is tuned - base, X the layer's inputs, H = X^T X. A plane is q = sign * col_scale; with q fixed,
the row scales a that minimise |X (d - sum_p a_p q_p)^T|^2 solve, for each row, sum_p' (q_p H q_p') a_p' = d H q_p.
Neither H nor d is ever held whole: everything accumulates over tokens and over blocks of rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one block of a delta in fp32: bounds the memory beyond the checkpoints (1 MiB per temporary).
BLOCK_ELEMENTS = 1 << 18
BLOCK_TOKENS = 2048
ENOUGH_TOKENS = 256  # inputs of shorter calls are gathered: every pass unpacks the whole delta
# Damping H + 0.01 mean(diag H) I, as in GPTQ (arXiv 2210.17323): directions that calibration never showed still count
# a little.
DAMPING = 0.01


@dataclasses.dataclass(frozen=True)
class DeltaMatrix:
    """The delta of one matrix, read block by block.

    Attributes:
        base, tuned: the parameter as both models store it, [N, K], or [K, N] when `transposed`; row counts N may
            differ.
        transposed: both are stored [K, N].
    """

    base: Tensor
    tuned: Tensor
    transposed: bool = False

    @property
    def rows(self) -> int:
        """N of the base: what the planes span. Rows that only the tuned model has are no part of a delta."""
        return self.base.shape[1 if self.transposed else 0]

    @property
    def features(self) -> int:
        return self.base.shape[0 if self.transposed else 1]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 [n, K]) over all rows; rows that the tuned model lacks are zero."""
        base, tuned = (t.T if self.transposed else t for t in (self.base.detach(), self.tuned.detach()))
        height = max(1, BLOCK_ELEMENTS // max(1, self.features))
        for first in range(0, self.rows, height):
            ours = base[first : first + height]
            theirs = tuned[first : first + ours.shape[0]]
            block = torch.zeros(ours.shape, dtype=torch.float32, device=tuned.device)
            torch.sub(theirs.float(), ours[: theirs.shape[0]].float().to(tuned.device), out=block[: theirs.shape[0]])
            yield first, block


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


class Planes:
    """Cuts a delta into P residual planes by the weights alone; the scales found here only steer the later signs.

    Plane p takes the sign of what the planes before it left, and, if asked, a column scale: the mean of |residual|
    over the rows, normalised to a mean of 1, so that row scales stay comparable with and without it.

    Args:
        matrix: the delta.
        count: P.
        columns: give each plane a column scale.
        one_scale: scale each plane by one number, the mean of |residual| over the whole matrix (BitDelta, arXiv
            2402.10193, eq. 3), instead of each row by its least-squares scale.
    """

    def __init__(self, matrix: DeltaMatrix, count: int, *, columns: bool = False, one_scale: bool = False) -> None:
        self.matrix = matrix
        self.count = 0
        self.one_scale = one_scale
        self.col_scale: Tensor | None = None
        self.scalars: list[float] = []
        for _ in range(count if columns or one_scale else 0):
            self._measure(columns)
        self.count = count

    def _measure(self, columns: bool) -> None:
        """Column means and overall mean of the next plane: one pass over the delta."""
        rows, features = max(1, self.matrix.rows), max(1, self.matrix.features)
        total = torch.zeros(self.matrix.features, dtype=torch.float64, device=self.matrix.tuned.device)
        for first, block in self.matrix.blocks():
            _, _, residual = self.cut(block, first)
            total += residual.abs_().sum(0, dtype=torch.float64)
        mean = float(total.sum()) / rows / features
        if self.one_scale:
            self.scalars.append(mean)
        if columns:
            scale = (total / rows / mean if mean > 0 else torch.ones_like(total)).float().unsqueeze(0)
            self.col_scale = scale if self.col_scale is None else torch.cat([self.col_scale, scale])
        self.count += 1

    def cut(self, block: Tensor, first_row: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """One block of rows -> the planes' signs (bool [n, K]), their weight-only scales fp32 [n, P], the residual."""
        residual = block.clone()
        signs: list[Tensor] = []
        scales = torch.zeros(block.shape[0], self.count, device=block.device)
        for plane in range(self.count):
            positive = choose_signs(residual, first_row)
            signs.append(positive)
            q = self.values(positive, plane)
            if self.one_scale:
                scales[:, plane] = self.scalars[plane]
            else:
                scales[:, plane] = (residual * q).sum(-1) / q.square().sum(-1).clamp_min(torch.finfo(q.dtype).tiny)
            residual.addcmul_(q, scales[:, plane, None], value=-1)
        return signs, scales, residual

    def values(self, positive: Tensor, plane: int) -> Tensor:
        """q of one plane: bool [n, K] -> fp32 [n, K]."""
        q = positive.float().mul_(2).sub_(1)
        return q if self.col_scale is None else q.mul_(self.col_scale[plane])

    def residual(self, block: Tensor, first_row: int, row_scale: Tensor) -> tuple[list[Tensor], Tensor]:
        """One block with the final `row_scale` [P, N] -> the planes' signs, and what they leave, fp32 [n, K]."""
        signs, _, _ = self.cut(block, first_row)
        left_over = block.clone()
        for plane, positive in enumerate(signs):
            scale = row_scale[plane, first_row : first_row + block.shape[0], None].to(block.device)
            left_over.addcmul_(self.values(positive, plane), scale, value=-1)
        return signs, left_over


@dataclasses.dataclass
class _Statistics:
    """Sums over inputs: cross [N, P] = d H q, gram [N, P, P] = q H q, energy = sum of (X d)^2. fp64."""

    cross: Tensor
    gram: Tensor
    energy: float = 0.0

    @classmethod
    def zeros(cls, rows: int, planes: int, device: torch.device) -> _Statistics:
        zeros = torch.zeros(rows, planes, planes, dtype=torch.float64, device=device)
        return cls(zeros[:, 0].clone(), zeros)


@dataclasses.dataclass
class Scales:
    """What a fit found.

    Attributes:
        row_scale: fp32 [P, N].
        energy, lost: squared output of the delta, and of what the planes leave of it, each use weighted as below.
        input_weight, row_weight: of the inputs the matrix multiplied, and of its rows being looked up.
    """

    row_scale: Tensor
    energy: float
    lost: float
    input_weight: float
    row_weight: float


class ScaleFit:
    """Row scales of a matrix from the inputs it met, streamed: it holds [N, P (P + 1)] numbers however many tokens."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.matrix = planes.matrix
        self.tokens = 0
        self.input_energy = 0.0
        self.embedding = False
        self._pending: list[Tensor] = []  # inputs of short calls, until there are enough of them to be worth a pass
        device = self.matrix.tuned.device
        self._inputs = _Statistics.zeros(self.matrix.rows, planes.count, device)
        self._identity = _Statistics.zeros(self.matrix.rows, planes.count, device)
        for first, block in self.matrix.blocks():
            signs, _, _ = planes.cut(block, first)
            values = [planes.values(positive, plane) for plane, positive in enumerate(signs)]
            self._add(self._identity, first, block, values)

    @staticmethod
    def _add(into: _Statistics, first: int, delta: Tensor, values: list[Tensor]) -> None:
        """Add products along the last dimension of delta [n, *] and of each plane's values [n, *]."""
        rows = slice(first, first + delta.shape[0])
        for p, mine in enumerate(values):
            into.cross[rows, p] += (delta * mine).sum(-1)
            for other in range(p + 1):
                into.gram[rows, p, other] += (mine * values[other]).sum(-1)
                into.gram[rows, other, p] = into.gram[rows, p, other]
        into.energy += float(delta.square().sum(dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add inputs x [*, K] of one call of the layer."""
        flat = x.detach().reshape(-1, self.matrix.features)
        self.tokens += flat.shape[0]
        if flat.shape[0] < ENOUGH_TOKENS:
            self._pending.append(flat.clone())
            if sum(short.shape[0] for short in self._pending) >= ENOUGH_TOKENS:
                self._flush()
        else:
            self._accumulate(flat)

    def _flush(self) -> None:
        if self._pending:
            short, self._pending = torch.cat(self._pending), []
            self._accumulate(short)

    def _accumulate(self, flat: Tensor) -> None:
        for chunk in flat.split(BLOCK_TOKENS):
            tokens = chunk.float().T  # [K, t]
            self.input_energy += float(tokens.square().sum(dtype=torch.float64))
            for first, block in self.matrix.blocks():
                signs, _, _ = self.planes.cut(block, first)
                values = [self.planes.values(positive, plane) @ tokens for plane, positive in enumerate(signs)]
                self._add(self._inputs, first, block @ tokens, values)

    def update_embedding(self) -> None:
        """Note that rows are looked up: each then counts by its own least squares, named by a token or not."""
        self.embedding = True

    def solve(self) -> Scales:
        """The row scales, 0 where a row's delta is 0.

        Inputs count with damping; with no inputs, inputs that are all zero, or lookups only, the weights alone
        decide. Where a tied matrix is both multiplied and looked up, both count equally, each relative to its own
        energy.
        """
        self._flush()
        inputs, identity = self._inputs, self._identity
        shown = 1 / inputs.energy if self.input_energy > 0 and inputs.energy > 0 else 0.0
        alone = 1 / identity.energy if identity.energy > 0 else 1.0
        multiplied_only = shown > 0 and not self.embedding
        damping = shown * DAMPING * self.input_energy / self.matrix.features if multiplied_only else alone
        cross = shown * inputs.cross + damping * identity.cross
        gram = shown * inputs.gram + damping * identity.gram
        if self.planes.one_scale:
            scale = torch.tensor(self.planes.scalars, dtype=torch.float64, device=cross.device).expand_as(cross).clone()
        elif self.planes.count == 1:
            scale = cross / gram[..., 0].clamp_min(torch.finfo(torch.float64).tiny)
        else:
            scale = (torch.linalg.pinv(gram, hermitian=True) @ cross.unsqueeze(-1)).squeeze(-1)
        scale[identity.cross[:, 0] == 0] = 0  # the plane's sum of |d| over the row
        row_scale = scale.float()
        found = Scales(row_scale.T.contiguous(), 0.0, 0.0, shown, 0.0 if multiplied_only else alone)
        a = row_scale.double()
        for weight, part in ((found.input_weight, inputs), (found.row_weight, identity)):
            if weight:
                explained = (a * (2 * part.cross - torch.einsum("npq,nq->np", part.gram, a))).sum()
                found.energy += weight * part.energy
                found.lost += weight * (part.energy - float(explained))
        return found
