"""Tables that are looked up: what those get that have moved far, and what tied ones weigh a lookup and a product."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..encodings import Sign
from .fit import DeltaMatrix
from .metric import Moments

# What a table gets that has moved far, as nearly all of its rows then have moved the same way, and few of them are most
# of what is read: a rank, and this share of its rows outright (of 16 bits each, a sixth of the bytes of a plane).
FAR_RANK = 1
FAR_ROWS = 1 / 96
# Where a tied table's two uses are weighed by how often its rows are used: what all rows count together in any case.
UNUSED = 0.05


def moved(matrix: DeltaMatrix) -> float:
    """|d| over the norm of the tuned matrix."""
    energy = matrix.tuned_energy()
    found = sum(float(block.square().sum(dtype=torch.float64)) for _, block in matrix.blocks())
    return (found / energy) ** 0.5 if energy > 0 else math.inf if found > 0 else 0.0


def most_used(matrix: DeltaMatrix, sign: Sign, uses: Tensor) -> Tensor:
    """The rows whose errors are met most often, int64, ascending: FAR_ROWS of those that the tuned table has.

    Args:
        uses: int64 [N] on the CPU, how often each row is looked up.
    """
    lost = torch.zeros(matrix.rows)
    for first, block in matrix.blocks():
        rows = slice(first, first + block.shape[0])
        lost[rows] = (block - sign.rows(rows, device=block.device)).square_().sum(-1).cpu() * uses[rows]
    lost = lost[: matrix.tuned.shape[0]]
    count = min(int(FAR_ROWS * lost.numel()), int((lost > 0).sum()))
    return lost.argsort(descending=True, stable=True)[:count].sort().values


def balance(matrix: DeltaMatrix, moments: Moments, uses: Tensor | None) -> float:
    """What to add to H's diagonal so that lookups and products of a tied table count equally, each relative to its own
    energy.

    Rows count as often as they are used, and those never used a little. What they have in common moves all logits
    alike, which no probability shows: that is no part of the energy of the products.

    Args:
        uses: int64 [N], how often each row is looked up; None where that is not known.
    """
    weight = torch.full((matrix.rows,), 1 / max(1, matrix.rows), device=matrix.place)
    if uses is not None and bool(uses.any()):
        weight = UNUSED * weight + (1 - UNUSED) * uses.to(matrix.place, torch.float32) / int(uses.sum())
    multiplied = looked_up = 0.0
    common = torch.zeros(matrix.features, dtype=torch.float64, device=matrix.place)
    for first, block in matrix.blocks():
        share = weight[first : first + block.shape[0]].unsqueeze(-1)
        multiplied += float(((block @ moments.gram) * block * share).sum(dtype=torch.float64))
        looked_up += float((block.square() * share).sum(dtype=torch.float64))
        common += (block * share).sum(0, dtype=torch.float64)
    multiplied -= float(common @ moments.gram.double() @ common)
    return max(0.0, multiplied) / max(1, moments.tokens) / looked_up if looked_up > 0 else 0.0
