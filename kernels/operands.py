# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What the kernels read in place of x: made once for every x (and tenant, where columns are scaled), by small kernels.

Row m XP + p of an operand is row m of x as plane p sees it; XP is P with a `col_scale`, which belongs to plane and
tenant and is multiplied in here, and 1 without: then all linears that read the same x can share the operand. Rows
without a slot are left unwritten where they would depend on it. B = ceil(K / 256) blocks of features, as in `layout`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import COMPLEMENTED
from .tile_linear import slot_of_row


@triton.jit
def scaled_x(x_ptr, col_ptr, k, K, COL: tl.constexpr):
    """fp32 x[k] col[k], 0 past K."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if COL:
        x *= tl.load(col_ptr + k, mask=k < K, other=0.0)
    return x


@triton.jit
def bits_kernel(
    x_ptr, col_ptr, tenant_ptr, bits_ptr, scale_ptr, sums_ptr, x_stride, K, stored, chunks, entries, rows_per_entry,
    SLOTS, XP: tl.constexpr, COL: tl.constexpr, INDEXED: tl.constexpr, WIDE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`bits`, for one row of it and two blocks of features."""
    line = tl.program_id(0)
    chunk = tl.program_id(1)
    row = line // XP
    if COL:
        slot = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED)
        if slot < 0:
            return
        col_ptr += (slot.to(tl.int64) * XP + line % XP) * K
    x_ptr += row.to(tl.int64) * x_stride
    # As integers, magnitudes have the order of the numbers, and what is not finite comes after all that is. Each thread
    # keeps its own until the end: what reduces meets at barriers.
    magnitudes = tl.zeros((BK,), tl.int32)
    totals = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        part = scaled_x(x_ptr, col_ptr, start + tl.arange(0, BK), K, COL)
        magnitudes = tl.maximum(magnitudes, part.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if not WIDE:
            totals += tl.abs(part)
    most = tl.max(magnitudes, 0)
    largest = most.to(tl.float32, bitcast=True)
    # A power of two, so that whatever has no more bits than fit stays exact; x of 1e-30 and less counts as 0. Where one
    # entry towers over the others these are rounded anyway, and the finest step there is serves them better.
    TOP: tl.constexpr = 23 if WIDE else 15
    exponent = (tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) >> 23) + 1 - TOP
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if not WIDE:
        towers = largest * K > 16.0 * tl.sum(totals, 0)
        scale = tl.where(towers, largest / 32767.0, scale)
        inverse = tl.where(towers, 32767.0 / tl.maximum(largest, 1e-30), inverse)
    tiny = largest <= 1e-30
    inverse = tl.where(tiny, 0.0, inverse)
    word = tl.arange(0, 16)  # of two blocks
    bit = tl.arange(0, 32)
    k = chunk * 512 + word[:, None] * 32 + bit[None, :]
    x = scaled_x(x_ptr, col_ptr, k, K, COL) * inverse
    x = tl.where(x == x, x, 0.0)
    whole = tl.minimum(tl.maximum(tl.floor(x + 0.5), -1.0 * (1 << TOP)), (1 << TOP) - 1.0).to(tl.int32)  # [16, 32]
    low = whole
    if WIDE:
        low = whole & 0xFFFF
        tl.store(sums_ptr + (line * chunks + chunk) * 2 + 1, tl.sum(tl.sum(whole >> 16, 1), 0))
    tl.store(sums_ptr + (line * chunks + chunk) * 2, tl.sum(tl.sum(low, 1), 0))
    if chunk == 0:
        tl.store(scale_ptr + line, tl.where(most >= 0x7F800000, float("nan"), tl.where(tiny, 0.0, scale)))
    block = chunk * 2 + word // 8
    depth: tl.constexpr = 128 * (1 + WIDE)
    place = (line.to(tl.int64) * stored + block) * depth + word % 4 * 4 + word % 8 // 4
    made = tl.zeros((16, 32), tl.int32)  # [word, plane]
    for plane in tl.static_range(16 + 8 * WIDE):
        packed = tl.sum((whole >> plane & 1) << bit[None, :], 1)
        made = tl.where((bit == plane)[None, :], packed[:, None], made)
    place = place[:, None] + (bit // 16 * 128 + bit // 8 % 2 * 2 + bit % 8 * 16)[None, :]
    tl.store(bits_ptr + place, made, mask=(block < stored)[:, None] & (bit < 16 + 8 * WIDE)[None, :])


@triton.jit
def words_kernel(
    x_ptr, col_ptr, tenant_ptr, words_ptr, halves_ptr, x_stride, K, stored, entries, rows_per_entry, SLOTS,
    XP: tl.constexpr, COL: tl.constexpr, INDEXED: tl.constexpr, SPLITS: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """`words`, for one row of it and NB blocks of features."""
    line = tl.program_id(0)
    row = line // XP
    if COL:
        slot = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED)
        if slot < 0:
            return
        col_ptr += (slot.to(tl.int64) * XP + line % XP) * K
    block = tl.program_id(1) * NB + tl.arange(0, NB)
    bit = tl.arange(0, 16)
    word = tl.arange(0, 16)
    k = block[:, None, None] * 256 + word[None, None, :] * 16 + bit[None, :, None]
    left = scaled_x(x_ptr + row.to(tl.int64) * x_stride, col_ptr, k, K, COL)
    # 2^-33 over the number that `tile.bit_operand` makes of this bit, half of it for +-1, less than 0 for a complement.
    field = 1 << tl.where(bit >= 7, bit - 7, bit + 1)
    factor = (tl.where(bit == 15, 93, 221 - field) << 23).to(tl.float32, bitcast=True)
    sign = 1.0 - 2.0 * (COMPLEMENTED >> bit & 1)
    place = (line.to(tl.int64) * stored + block)[:, None, None] * (256 * SPLITS) + bit[None, :, None] * 16
    place += word[None, None, :]
    there = (block < stored)[:, None, None]
    total = tl.zeros((NB, 16, 16), tl.float32)
    for s in tl.static_range(SPLITS):
        part = left.to(tl.bfloat16).to(tl.float32)
        left -= part
        total += part
        tl.store(words_ptr + place + 256 * s, (part * (sign * factor)[None, :, None]).to(tl.bfloat16), mask=there)
    total *= tl.where(bit < 15, sign, 0.0)[None, :, None]
    # Bits first, most of which a thread holds itself. In one sum over both, Triton 3.6 adds up the wrong lanes.
    half = tl.sum(tl.sum(total, 1), 1) * 5.8207660913467407e-11  # 2^-34
    tl.store(halves_ptr + line.to(tl.int64) * stored + block, half, mask=block < stored)


@triton.jit
def inner_kernel(
    x_ptr, right_ptr, tenant_ptr, inner_ptr, x_stride, K, entries, rows_per_entry, SLOTS,
    RANK: tl.constexpr, RP: tl.constexpr, INDEXED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`inner`, for one row."""
    row = tl.program_id(0)
    slot = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED)
    if slot < 0:
        return
    r = tl.arange(0, RP)
    right = right_ptr + (slot.to(tl.int64) * RANK + r)[:, None] * K
    total = tl.zeros((RP,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_ptr + row.to(tl.int64) * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        factor = tl.load(right + k[None, :], mask=(r < RANK)[:, None] & (k < K)[None, :], other=0.0)
        total += tl.sum(factor.to(tl.float32) * x[None, :], 1)
    tl.store(inner_ptr + row * RANK + r, total, mask=r < RANK)


def index_arguments(tenant: Tensor | None, rows: int, slots: int, unused: Tensor) -> tuple[Tensor, int, int, int, bool]:
    """What every kernel takes of the row index: (tenant, R, M // R, T, whether there is one)."""
    if tenant is None:
        return unused, 1, max(rows, 1), slots, False
    entries = max(tenant.shape[0], 1)
    return tenant, entries, max(rows // entries, 1), slots, True


def bits(x: Tensor, col_scale: Tensor | None, tenant: Tensor | None, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x as integers times a power of two per row, bit plane by bit plane in the order of operand B.

    Args:
        x: [M, K], rows of any stride.  col_scale: fp32 [T, P, K] or None.  tenant: int32 [R] or None.
        wide: 24 bits instead of 16.

    Returns:
        bits int32 [M XP, B, 1 + wide, 128]: of a block's word 4 s + q, lane 4 g + q holds bit planes g and g + 8 (in
            the second 128: g + 16) at 4 lane + s and 4 lane + 2 + s.
        scale fp32 [M XP]: NaN for a row that is not finite.
        sums int32 [M XP, ceil(B / 2), 2]: of the integers, over two blocks; in 24 bits of the low 16 and of the rest.
    """
    rows, features = x.shape
    slots, planes = (1, 1) if col_scale is None else col_scale.shape[:2]
    stored, chunks = -(-features // 256), -(-features // 512)
    planes_of_x = torch.empty(rows * planes, stored, 1 + wide, 128, dtype=torch.int32, device=x.device)
    scale = torch.empty(rows * planes, dtype=torch.float32, device=x.device)
    sums = torch.empty(rows * planes, chunks, 2, dtype=torch.int32, device=x.device)
    index, entries, rows_per_entry, slots, indexed = index_arguments(tenant, rows, slots, x)
    bits_kernel[rows * planes, chunks](
        x, x if col_scale is None else col_scale, index, planes_of_x, scale, sums, x.stride(0), features, stored,
        chunks, entries, rows_per_entry, slots, XP=planes, COL=col_scale is not None, INDEXED=indexed, WIDE=int(wide),
        BK=min(2048, triton.next_power_of_2(features)), num_warps=4,
    )  # fmt: skip
    return planes_of_x, scale, sums


def words(x: Tensor, col_scale: Tensor | None, tenant: Tensor | None, splits: int) -> tuple[Tensor, Tensor]:
    """x in `splits` bf16 parts, scaled for `tile.bit_operand` and ordered by bit; arguments as in `bits`.

    Returns:
        words bf16 [M XP, B, splits, 16, 16]: feature 256 block + 16 w + j at [block, :, j, w].
        halves fp32 [M XP, B]: what the exact product takes away, by block.
    """
    rows, features = x.shape
    slots, planes = (1, 1) if col_scale is None else col_scale.shape[:2]
    stored = -(-features // 256)
    made = torch.empty(rows * planes, stored, splits, 16, 16, dtype=torch.bfloat16, device=x.device)
    halves = torch.empty(rows * planes, stored, dtype=torch.float32, device=x.device)
    index, entries, rows_per_entry, slots, indexed = index_arguments(tenant, rows, slots, x)
    words_kernel[rows * planes, triton.cdiv(stored, 4)](
        x, x if col_scale is None else col_scale, index, made, halves, x.stride(0), features, stored, entries,
        rows_per_entry, slots, XP=planes, COL=col_scale is not None, INDEXED=indexed, SPLITS=splits, NB=4, num_warps=4,
    )  # fmt: skip
    return made, halves


def inner(x: Tensor, right: Tensor, tenant: Tensor | None) -> Tensor:
    """right[slot(m)] @ x[m] in fp32, [M, r]: x [M, K], right [T, r, K]."""
    rows, features = x.shape
    rank = right.shape[1]
    made = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    index, entries, rows_per_entry, slots, indexed = index_arguments(tenant, rows, right.shape[0], x)
    inner_kernel[rows,](
        x, right, index, made, x.stride(0), features, entries, rows_per_entry, slots, RANK=rank,
        RP=triton.next_power_of_2(rank), INDEXED=indexed, BK=min(512, triton.next_power_of_2(features)), num_warps=4,
    )  # fmt: skip
    return made
