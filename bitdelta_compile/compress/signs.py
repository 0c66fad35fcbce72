"""Choosing signs and scales of a block of rows under a metric: error feedback, single flips, least squares.

Here everything is transposed, so that a column of weights is contiguous: target [K, n] is the delta of n rows, signs
[P, K, n] are +-1 as fp32, scale [P, n], and columns [P, K] are column scales or None. What P planes amount to is
sum_p scale[p] * columns[p][:, None] * signs[p].

Columns are settled one after another, which is a chain of K small steps; halving the range again and again turns all
but LEAF columns' worth of their effect on later columns into matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ..lowering import device

LEAF = 16
BLOCK = 128

# (rest or slope, signs, scale, columns, upper or h, first, last): `_feed` and `_flip`, or the kernels that do the same.
Leaf: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, int, int], None]


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
    rest, features = target.clone(memory_format=torch.contiguous_format), target.shape[0]
    signs = torch.empty(scale.shape[0], *target.shape, device=target.device)
    kernels = device.column_kernels(target.device)
    feed: Leaf = _feed if kernels is None else kernels.feed
    for first, middle, last in _halves(0, features):
        if middle == last:
            feed(rest, signs, scale, columns, upper, first, last)
        else:
            rest[middle:last].addmm_(upper[first:middle, middle:last].T, rest[first:middle], alpha=-1)
    return signs


def _halves(first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(first, middle, last) of steps that settle columns `first` to `last` in order: the first half's effect on the
    second, in between settling one and the other; `middle` is `last` for at most LEAF columns that are settled."""
    if last - first <= LEAF:
        yield first, last, last
        return
    middle = first + max(1, (last - first) // (2 * LEAF)) * LEAF
    yield from _halves(first, middle)
    yield first, middle, last
    yield from _halves(middle, last)


def _feed(
    rest: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, upper: Tensor, first: int, last: int
) -> None:
    """Settle at most LEAF columns, whose errors reach no further; in `rest` each becomes its error by its pivot."""
    pivots, one = upper.diagonal()[first:last].tolist(), torch.ones_like(scale[0])
    taken = [plane[first:last].unbind(0) for plane in signs]
    for j, w in enumerate(rest[first:last].unbind(0)):
        k = first + j
        for plane in range(signs.shape[0]):
            torch.copysign(one, w, out=taken[plane][j])
            w.addcmul_(taken[plane][j], levels(scale, columns, plane, k), value=-1)
        w.div_(pivots[j])
        if k + 1 < last:
            rest[k + 1 : last].addr_(upper[k, k + 1 : last], w, alpha=-1)


def flip_signs(target: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, h: Tensor) -> None:
    """One sweep over all signs, changing in place each one whose change alone makes the error r H r smaller.

    Args:
        target, signs, scale, columns: as elsewhere, columns in any one order.  h: fp32 [K, K] in that order.
    """
    rest = target - values(signs, scale, columns)
    kernels = device.column_kernels(target.device)
    flip: Leaf = _flip if kernels is None else kernels.flip
    for start in range(0, rest.shape[0], BLOCK):
        end = min(start + BLOCK, rest.shape[0])
        slope = h[start:end] @ rest
        for first in range(start, end, LEAF):
            last = min(first + LEAF, end)
            turned = slope[first - start : last - start]
            flip(turned, signs, scale, columns, h, first, last)
            if last < end:
                slope[last - start :].addmm_(h[last:end, first:last], turned)
        rest[start:end] += slope


def _flip(
    slope: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, h: Tensor, first: int, last: int
) -> None:
    """Turn signs of at most LEAF columns; `slope`, H r in these columns, becomes what is added to r there."""
    curvature, twice = h.diagonal()[first:last].tolist(), 2 * scale
    taken = [plane[first:last].unbind(0) for plane in signs]
    for j, g in enumerate(slope.unbind(0)):
        k = first + j
        added = torch.zeros_like(g)
        for plane in range(signs.shape[0]):
            step = taken[plane][j] * levels(twice, columns, plane, k)
            worse = step * torch.add(g, step, alpha=curvature[j] / 2) >= 0
            step.masked_fill_(worse, 0)
            taken[plane][j].mul_(worse.float().mul_(2).sub_(1))
            g.add_(step, alpha=curvature[j])
            added += step
        if k + 1 < last:
            slope[j + 1 :].addr_(h[k, k + 1 : last], added)
        g.copy_(added)


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
