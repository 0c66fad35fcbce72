# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton device functions from the products of `tile` to tiles of a delta's result: which rows, planes and scales.

Sizes as everywhere; XP is P where x was scaled per plane and tenant (`col_scale`), else 1: row m of x and plane p are
row m XP + min(p, XP - 1) of what `operands` made of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import binary_product, exact_product


@triton.jit
def slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED: tl.constexpr):
    """The slot of row(s) `row`, -1 where it is none; without an index all rows use slot 0."""
    if INDEXED:
        slot = tl.load(tenant_ptr + tl.minimum(row // rows_per_entry, entries - 1))
        return tl.where((slot >= 0) & (slot < SLOTS), slot, -1)
    return row * 0


@triton.jit
def led_rows(
    tenant_ptr, row, M, entries, rows_per_entry, SLOTS, INDEXED: tl.constexpr, G: tl.constexpr, MP: tl.constexpr
):
    """The group of at most G rows of one slot that `row` leads: its members share one reading of the signs.

    Rows of a slot are counted in their order in the batch; every G-th leads itself and the next ones.

    Args:
        row: this program's row.  MP: a power of two, at least M; any where G is 1 or there is no index.

    Returns:
        (slot, -1 unless `row` leads a group; rows int32 [G], M or more where the group is smaller).
    """
    slot = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED)
    rows = row + tl.arange(0, G)
    if G > 1 and not INDEXED:
        slot = tl.where(row % G == 0, slot, -1)
    elif G > 1:
        every = tl.arange(0, MP)
        slots = slot_of_row(tenant_ptr, every, entries, rows_per_entry, SLOTS, INDEXED)
        mine = ((slots == slot) & (every < M)).to(tl.int32)
        place = tl.cumsum(mine, 0) - 1
        before = tl.sum(tl.where(every < row, mine, 0), 0)
        wanted = (mine[None, :] > 0) & (place[None, :] == before + tl.arange(0, G)[:, None])
        found = tl.sum(wanted.to(tl.int32), 1)
        rows = tl.where(found > 0, tl.sum(tl.where(wanted, every[None, :], 0), 1), M)
        slot = tl.where(before % G == 0, slot, -1)
    return slot, rows


@triton.jit
def rows_or_first(rows, M):
    """`rows`, where there is none (M or more) the first: whatever is read there is finite and in the cache."""
    return tl.where(rows < M, rows, tl.min(rows, 0))


@triton.jit
def low_rank(left_ptr, inner_ptr, slot, rows, n, M, N, RANK: tl.constexpr, ROWS_FIRST: tl.constexpr):
    """The low-rank part of a tile, fp32 [rows, n] (`ROWS_FIRST`) or [n, rows]; left [T, N, r], inner fp32 [M, r]."""
    row = rows_or_first(rows, M)
    left = left_ptr + (slot.to(tl.int64) * N + tl.minimum(n, N - 1)) * RANK
    if ROWS_FIRST:
        total = tl.zeros((rows.shape[0], n.shape[0]), tl.float32)
    else:
        total = tl.zeros((n.shape[0], rows.shape[0]), tl.float32)
    for r in range(RANK):
        factor = tl.load(left + r).to(tl.float32)
        other = tl.load(inner_ptr + row * RANK + r)
        if ROWS_FIRST:
            total += other[:, None] * factor[None, :]
        else:
            total += factor[:, None] * other[None, :]
    return total


@triton.jit
def is_live(row_scale, MAY_LACK: tl.constexpr):
    """0 where the tenant lacks this plane, which all of its row scales being zero says, else 1."""
    if MAY_LACK:
        return (tl.max(tl.abs(row_scale), 0) != 0).to(tl.int32)
    return 1


@triton.jit
def binary_delta(
    signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr, slot, rows, tile, M, N,
    blocks, chunks,
    R: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, CP: tl.constexpr, P: tl.constexpr, XP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The delta's share of 16 R WN outputs of the G rows of one group, by the binary path.

    Args:
        signs_ptr: int32 [T, P, tiles, width].  row_scale_ptr: fp32 [T, P, N].  left_ptr: [T, N, RANK].
        bits_ptr, scale_ptr, sums_ptr: `operands.x_bits`.  inner_ptr: fp32 [M, RANK], x @ right.T.
        slot: a slot.  rows: int32 [G], M or more where there is none.  tile: the first tile.
        blocks, chunks, R, G, WN, WK, U, WIDE, HALF, EVEN, CP: as in `tile.binary_product`.

    Returns:
        fp32 [G, 16 R WN], outputs from 16 tile on; meaningless past N and at rows of M or more.
    """
    tiles = (N + 15) // 16
    width = blocks * 128 + 64 * HALF
    n = tile * 16 + tl.arange(0, WN * R * 16)
    row = rows_or_first(rows, M)
    total = tl.zeros((G, WN * R * 16), tl.float32)
    for p in range(P):
        plane = slot.to(tl.int64) * P + p
        row_scale = tl.load(row_scale_ptr + plane * N + n, mask=n < N, other=0.0)
        x_row = row * XP + tl.minimum(p, XP - 1)
        live = is_live(row_scale, P > 1)
        product = binary_product(
            signs_ptr + plane * tiles * width, bits_ptr, sums_ptr, x_row, tile, tiles, width, blocks, chunks, live,
            R, G, WN, WK, U, WIDE, HALF, EVEN, CP,
        )  # fmt: skip
        product = tl.reshape(tl.permute(product, (2, 0, 1, 4, 3)), (G, WN * R * 16))
        share = product * tl.load(scale_ptr + x_row)[:, None] * row_scale[None, :]
        if P > 1:
            share = tl.where(row_scale[None, :] != 0, share, 0.0)
        total += share
    if RANK > 0:
        total += low_rank(left_ptr, inner_ptr, slot, rows, n, M, N, RANK, True)
    return total


@triton.jit
def exact_delta(
    signs_ptr, row_scale_ptr, left_ptr, words_ptr, halves_ptr, inner_ptr, slot, rows, tile, M, N, blocks,
    R: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, P: tl.constexpr, XP: tl.constexpr, RANK: tl.constexpr, FORM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The delta's share of 16 R W outputs of BM rows of one slot, by the exact path: fp32 [16 R W, BM].

    Args: as `binary_delta`, with words_ptr and halves_ptr from `operands.x_words` and the rest as in
        `tile.exact_product`.
    """
    DEPTH: tl.constexpr = 2 if P > 1 and D > 2 else D  # see configs.Exact
    tiles = (N + 15) // 16
    width = blocks * 128 + 64 * HALF
    n = tile * 16 + tl.arange(0, R * W * 16)
    row = rows_or_first(rows, M)
    total = tl.zeros((R * W * 16, BM), tl.float32)
    for p in range(P):
        plane = slot.to(tl.int64) * P + p
        row_scales = row_scale_ptr + plane * N + n
        live = is_live(tl.load(row_scales, mask=n < N, other=0.0), P > 1)
        product = exact_product(
            signs_ptr + plane * tiles * width, words_ptr, halves_ptr, row * XP + tl.minimum(p, XP - 1), tile, tiles,
            width, blocks, live, R, W, U, BM, DEPTH, SPLITS, HALF, EVEN, FORM, STAGES,
        )  # fmt: skip
        row_scale = tl.load(row_scales, mask=n < N, other=0.0)  # here, so that the loop has its registers
        share = product * row_scale[:, None]
        if P > 1:
            share = tl.where(row_scale[:, None] != 0, share, 0.0)
        total += share
    if RANK > 0:
        total += low_rank(left_ptr, inner_ptr, slot, rows, n, M, N, RANK, False)
    return total


@triton.jit
def with_base(y, x_ptr, weight_ptr, rows, n, M, N, K, x_stride, FORM: tl.constexpr):
    """y + weight[n] @ x[rows].T, fp32 [n, rows]: the base in the exact kernel's launch; weight [N, K]."""
    # With steps of 64 features ptxas runs the matrix instructions of both loops one by one, even for 32 rows.
    return base_product(y, x_ptr, weight_ptr, rows, n, M, N, 0, K, K, x_stride, 32, FORM, 3)


@triton.jit
def base_product(
    acc, x_ptr, weight_ptr, rows, n, M, N, first, last, K, x_stride,
    BK: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """acc + weight[n, first:last] @ x[rows, first:last].T, fp32 [n, rows]; weight [N, K] and x of one dtype."""
    k = tl.arange(0, BK)
    weights = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + rows_or_first(rows, M).to(tl.int64)[None, :] * x_stride + k[:, None]
    for start in tl.range(first, last, BK, num_stages=STAGES):
        weight = tl.load(weights + start, mask=(start + k < last)[None, :], other=0.0)
        x = tl.load(x_ptrs + start, mask=(start + k < last)[:, None], other=0.0)
        if FORM == "interpreted":
            weight = weight.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(weight, x, acc, input_precision="ieee")
    return acc
