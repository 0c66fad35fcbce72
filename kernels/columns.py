# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Signs of a few columns of weights chosen one after another, for fitting on a GPU.

A program has a row of weights per lane, and FIT_COLUMNS columns of each in registers, so that the chain from one column
to the next crosses neither lanes nor memory; their signs are the bits of a word. What these columns do to later ones is
a matrix product, and the caller's. Tensors are transposed as in `compress/signs.py`: [K, n], contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FIT_COLUMNS

LANES = 64 if torch.version.hip else 32  # rows of weights: one warp

# If Triton knew n to be a multiple of 16, it would give a lane four rows, and spread the columns of a row over lanes.
_launched = triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["n"])


@triton.jit
def _row(tile, j, ROWS: tl.constexpr):
    """Row j of [ROWS, LANES], 32 bits each: a register. Summed as integers, so that -0 stays what it is."""
    mine = (tl.arange(0, ROWS) == j)[:, None]
    found = tl.sum(tl.where(mine, tile.to(tl.uint32, bitcast=True), 0), 0)
    return found.to(tile.dtype, bitcast=True)


@triton.jit
def _sizes(scale_ptr, at, n, P: tl.constexpr, PP: tl.constexpr):
    """Scales of LANES rows, fp32 [PP, LANES]; 0 past P and n."""
    p = tl.arange(0, PP)[:, None]
    return tl.load(scale_ptr + p * n + at[None, :], mask=(p < P) & (at < n)[None, :], other=0.0)


@triton.jit
def _size(sizes, col_ptr, p, k, last, K, PP: tl.constexpr, COL: tl.constexpr):
    """The size of plane p's values at column k, fp32 [LANES]."""
    size = _row(sizes, p, PP)
    if COL:
        size *= tl.load(col_ptr + p * K + k, mask=k < last, other=0.0)
    return size


@triton.jit
def _store_signs(planes_ptr, words, place, inside, n, K, P: tl.constexpr, PP: tl.constexpr, LEAF: tl.constexpr):
    """The bits of uint32 [PP, LANES] as +-1, 1 being -1, at `place` [LEAF, LANES] of each plane."""
    bit = tl.arange(0, LEAF).to(tl.uint32)[:, None]
    for p in tl.static_range(P):
        negative = _row(words, p, PP)[None, :] >> bit & 1
        tl.store(planes_ptr + p * K * n + place, 1.0 - 2.0 * negative, mask=inside)


@_launched
def feed_kernel(
    rest_ptr, planes_ptr, scale_ptr, col_ptr, upper_ptr, first, last, n, K, across, along,
    P: tl.constexpr, PP: tl.constexpr, COL: tl.constexpr, LEAF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`feed`, for LANES rows of weights; grid (ceil(n / LANES),)."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    js = tl.arange(0, LEAF)
    ps = tl.arange(0, PP)[:, None]
    place = (first + js)[:, None] * n + at[None, :]
    inside = (first + js < last)[:, None] & (at < n)[None, :]
    tile = tl.load(rest_ptr + place, mask=inside, other=0.0)
    sizes = _sizes(scale_ptr, at, n, P, PP)
    words = tl.zeros((PP, LANES), tl.uint32)
    upper_ptr += first.to(tl.int64) * (across + along)
    for j in tl.static_range(LEAF):
        w = _row(tile, j, LEAF)
        for p in tl.static_range(P):
            size = _size(sizes, col_ptr, p, first + j, last, K, PP, COL)
            negative = w.to(tl.int32, bitcast=True) < 0
            words = tl.where((ps == p) & negative[None, :], words | (1 << j), words)
            w -= tl.where(negative, -size, size)
        w = tl.math.div_rn(w, tl.load(upper_ptr + j * (across + along), mask=first + j < last, other=1.0))
        later = tl.load(upper_ptr + j * across + js * along, mask=(js > j) & (first + js < last), other=0.0)
        tile = tl.where((js == j)[:, None], w[None, :], tile - later[:, None] * w[None, :])
    tl.store(rest_ptr + place, tile, mask=inside)
    _store_signs(planes_ptr, words, place, inside, n, K, P, PP, LEAF)


@_launched
def flip_kernel(
    slope_ptr, planes_ptr, scale_ptr, col_ptr, h_ptr, first, last, n, K, across, along,
    P: tl.constexpr, PP: tl.constexpr, COL: tl.constexpr, LEAF: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """`flip`, for LANES rows of weights; grid (ceil(n / LANES),)."""
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    js = tl.arange(0, LEAF)
    ps = tl.arange(0, PP)[:, None]
    within = js[:, None] * n + at[None, :]
    place = first * n + within
    inside = (first + js < last)[:, None] & (at < n)[None, :]
    tile = tl.load(slope_ptr + within, mask=inside, other=0.0)
    sizes = 2.0 * _sizes(scale_ptr, at, n, P, PP)
    words = tl.zeros((PP, LANES), tl.uint32)
    for p in tl.static_range(P):
        negative = tl.load(planes_ptr + p * K * n + place, mask=inside, other=0.0) < 0
        bits = tl.sum(negative.to(tl.uint32) << js[:, None].to(tl.uint32), 0)
        words = tl.where(ps == p, bits[None, :], words)
    h_ptr += first.to(tl.int64) * (across + along)
    for j in tl.static_range(LEAF):
        curvature = tl.load(h_ptr + j * (across + along), mask=first + j < last, other=0.0)
        slope = _row(tile, j, LEAF)
        added = tl.zeros((LANES,), tl.float32)
        for p in tl.static_range(P):
            size = _size(sizes, col_ptr, p, first + j, last, K, PP, COL)
            step = tl.where((_row(words, p, PP) >> j & 1) != 0, -size, size)
            better = step * (slope + step * (curvature / 2)) < 0
            step = tl.where(better, step, 0.0)
            words = tl.where((ps == p) & better[None, :], words ^ (1 << j), words)
            slope += curvature * step
            added += step
        later = tl.load(h_ptr + j * across + js * along, mask=(js > j) & (first + js < last), other=0.0)
        tile = tl.where((js == j)[:, None], added[None, :], tile + later[:, None] * added[None, :])
    tl.store(slope_ptr + within, tile, mask=inside)
    _store_signs(planes_ptr, words, place, inside, n, K, P, PP, LEAF)


def feed(
    rest: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, upper: Tensor, first: int, last: int
) -> None:
    """Error feedback over columns `first` to `last` of `rest`, at most FIT_COLUMNS, whose errors reach no further.

    Args:
        rest: fp32 [K, n]; in these columns becomes the error of each, divided by its pivot.
        signs: fp32 [P, K, n]; written in these columns.
        scale: fp32 [P, n].  columns: fp32 [P, K] or None.
        upper: fp32 [K, K], any strides; see `compress.metric.Metric`.
    """
    _launch(feed_kernel, (rest, signs), signs, scale, columns, upper, first, last)


def flip(slope: Tensor, signs: Tensor, scale: Tensor, columns: Tensor | None, h: Tensor, first: int, last: int) -> None:
    """Turn signs of columns `first` to `last`, at most FIT_COLUMNS, each that alone makes the error r H r smaller.

    Args:
        slope: fp32 [last - first, n], H r in these columns; becomes what their turns add to r.
        signs: fp32 [P, K, n], changed in these columns.
        scale, columns: as in `feed`.  h: fp32 [K, K], any strides.
    """
    _launch(flip_kernel, (slope, signs), signs, scale, columns, h, first, last)


def _launch(kernel, changed, signs, scale, columns, matrix, first, last):
    planes, features, n = signs.shape
    with torch.cuda.device_of(signs):
        kernel[triton.cdiv(n, LANES),](
            *changed, scale, scale if columns is None else columns, matrix, first, last, n, features, *matrix.stride(),
            P=planes, PP=triton.next_power_of_2(planes), COL=columns is not None, LEAF=FIT_COLUMNS, LANES=LANES,
            num_warps=1,
        )  # fmt: skip
