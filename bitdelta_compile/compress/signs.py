"""Choosing signs and scales of a block of rows under a metric: error feedback, single flips, least squares.

Here everything is transposed, so that a column of weights is contiguous: target [K, n] is the delta of n rows, signs
[P, K, n] are +-1 as fp32, scale [P, n], and columns [P, K] are column scales or None. What P planes amount to is
sum_p scale[p] * columns[p][:, None] * signs[p].

Columns are settled one after another, which is a chain of K small steps; halving the range again and again turns all
but LEAF columns' worth of their effect on later columns into matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAF = 16
BLOCK = 128


def levels(scale: Tensor, columns: Tensor | None, plane: int, place: int) -> Tensor:
    """The size of one plane's values at one column, [n]."""
    return scale[plane] if columns is None else scale[plane] * columns[plane, place]


def values(signs: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
    """What the planes amount to, [K, n]."""
    total = torch.zeros_like(signs[0])
    for plane in range(signs.shape[0]):
        q = signs[plane] if columns is None else signs[plane] * columns[plane].unsqueeze(-1)
        total.addcmul_(q, scale[plane])
    return total


def feed_errors(target: Tensor, scale: Tensor, columns: Tensor | None, upper: Tensor) -> Tensor:
    """Signs by error feedback: each column takes the nearest value, and later columns make up for its error.

    Semantics (GPTQ, arXiv 2210.17323, with sign planes as the grid), for k in order:
        for p: signs[p, k] = sign(w[k]); w[k] -= scale[p] * columns[p, k] * signs[p, k]
        w[j] -= upper[k, j] * w[k] / upper[k, k]      for j > k

    Args:
        target: fp32 [K, n], in the metric's order; not changed.
        scale: fp32 [P, n], not negative.  columns: fp32 [P, K] or None.  upper: see `Metric`.

    Returns:
        fp32 [P, K, n].
    """
    feedback = _Feedback(target, scale, columns, upper)
    feedback.settle(0, target.shape[0])
    return feedback.signs


class _Feedback:
    """The columns still to be settled, and the signs of those that are. No closure: one that calls itself is a cycle,
    which keeps its tensors until the garbage is collected."""

    def __init__(self, target: Tensor, scale: Tensor, columns: Tensor | None, upper: Tensor) -> None:
        self.scale, self.columns, self.upper = scale, columns, upper
        self.rest = target.clone()
        self.signs = torch.empty(scale.shape[0], *target.shape, device=target.device)
        self._pivots = upper.diagonal().tolist()
        self._one = torch.ones_like(scale[0])
        self._rests, self._by_plane = self.rest.unbind(0), [plane.unbind(0) for plane in self.signs]

    def settle(self, first: int, last: int) -> None:
        """Columns `first` to `last`, whose errors reach no further."""
        rest, upper = self.rest, self.upper
        if last - first > LEAF:
            middle = first + (last - first) // (2 * LEAF) * LEAF if last - first >= 2 * LEAF else first + LEAF
            self.settle(first, middle)
            rest[middle:last].addmm_(upper[first:middle, middle:last].T, rest[first:middle], alpha=-1)
            self.settle(middle, last)
            return
        for k in range(first, last):
            w = self._rests[k]
            for plane, taken in enumerate(self._by_plane):
                torch.copysign(self._one, w, out=taken[k])
                w.addcmul_(taken[k], levels(self.scale, self.columns, plane, k), value=-1)
            w.div_(self._pivots[k])
            if k + 1 < last:
                rest[k + 1 : last].addr_(upper[k, k + 1 : last], w, alpha=-1)


def flip_signs(target: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, h: Tensor) -> None:
    """One sweep over all signs, changing in place each one whose change alone makes the error r H r smaller.

    Args:
        target, signs, scale, columns: as elsewhere, columns in any one order.  h: fp32 [K, K] in that order.
    """
    rest = target - values(signs, scale, columns)
    curvature = h.diagonal().tolist()
    rests, by_plane = rest.unbind(0), [plane.unbind(0) for plane in signs]
    twice = 2 * scale
    for start in range(0, rest.shape[0], BLOCK):
        end = min(start + BLOCK, rest.shape[0])
        slope = h[start:end] @ rest
        for first in range(start, end, LEAF):
            last = min(first + LEAF, end)
            before = rest[first:last].clone()
            for k in range(first, last):
                g = slope[k - start]
                for plane, taken in enumerate(by_plane):
                    step = taken[k] * levels(twice, columns, plane, k)
                    worse = step * torch.add(g, step, alpha=curvature[k] / 2) >= 0
                    step.masked_fill_(worse, 0)
                    taken[k].mul_(worse.float().mul_(2).sub_(1))
                    rests[k].add_(step)
                    slope[k - start : last - start].addr_(h[k, k:last], step)
            if last < end:
                slope[last - start :].addmm_(h[last:end, first:last], rest[first:last] - before)


def fit_scale(target: Tensor, signs: Tensor, columns: Tensor | None, h: Tensor | None) -> Tensor:
    """The scales that leave the least error with these signs, by least squares, each row by itself; fp32 [P, n].

    Where a scale comes out negative its plane's signs are turned, in place.

    Args:
        h: fp32 [K, K], or None: every weight counts alike.
    """
    planes = signs.shape[0]
    qs = [signs[p] if columns is None else signs[p] * columns[p].unsqueeze(-1) for p in range(planes)]
    cross = torch.zeros(target.shape[1], planes, dtype=torch.float64, device=target.device)
    gram = torch.zeros(*cross.shape, planes, dtype=torch.float64, device=target.device)
    for p, q in enumerate(qs):
        weighed = q if h is None else h @ q
        cross[:, p] = (target * weighed).sum(0)
        for other in range(p + 1):
            gram[:, p, other] = gram[:, other, p] = (qs[other] * weighed).sum(0)
    if planes == 1:
        scale = cross / gram[..., 0].clamp_min(torch.finfo(torch.float32).tiny)
    else:
        scale = (torch.linalg.pinv(gram, hermitian=True) @ cross.unsqueeze(-1)).squeeze(-1)
    turned = (scale < 0).T
    if bool(turned.any()):
        signs.mul_(torch.where(turned, -1.0, 1.0).unsqueeze(1))
    return scale.abs().float().T.contiguous()
