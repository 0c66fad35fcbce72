# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels that the GPU cases compare with: bare rates of the hardware, and the paper's own kernel.

Importing this needs triton; the cases do so once they know that there is a device.
"""

from __future__ import annotations

import triton
import triton.language as tl

BMMA_CHAINS = 8
BMMA_OPERATIONS = 2 * 16 * 8 * 256  # of one mma.m16n8k256, an AND and an addition each
_BMMA = tl.constexpr(
    "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$12,$13,$14,$15};"
)
_BMMA_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 12))


@triton.jit
def read_all(data, sums, words_each, BLOCK: tl.constexpr):
    """Read int32 words, each program `words_each` of them in a row; their sums keep the loads alive."""
    at = tl.program_id(0).to(tl.int64) * words_each + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, words_each, BLOCK):
        total += tl.load(data + at + start)
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def binary_mma_rate(found, rounds, WARPS: tl.constexpr, CHAINS: tl.constexpr):
    """`rounds` times CHAINS independent binary tensor core operations in every warp, from registers."""
    lane = tl.arange(0, 128 * WARPS)
    total = tl.zeros((128 * WARPS,), tl.int32)
    c0, c1, c2, c3 = total, total, total, total
    c4, c5, c6, c7 = total, total, total, total
    for _ in range(rounds):
        c0 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c0], dtype=tl.int32, is_pure=False, pack=4)
        c1 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c1], dtype=tl.int32, is_pure=False, pack=4)
        c2 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c2], dtype=tl.int32, is_pure=False, pack=4)
        c3 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c3], dtype=tl.int32, is_pure=False, pack=4)
        c4 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c4], dtype=tl.int32, is_pure=False, pack=4)
        c5 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c5], dtype=tl.int32, is_pure=False, pack=4)
        c6 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c6], dtype=tl.int32, is_pure=False, pack=4)
        c7 = tl.inline_asm_elementwise(_BMMA, _BMMA_OPERANDS, [lane, lane, c7], dtype=tl.int32, is_pure=False, pack=4)
    total = c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7
    tl.store(found + tl.program_id(0) * 128 * WARPS + lane, total)


@triton.jit
def original_bitdelta(x, words, scale, y, rows, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The formulation of BitDelta (arXiv 2402.10193, section 3.3): every element's word and bit found by its index.

    Semantics:
        y[t] = scale[t] * x[t] @ (2 * bit - 1),   bit[t, k, n] = words[t, k // 32, n] >> (k % 32) & 1

    Args:
        x: [T, rows, K].  words: int32 [T, K / 32, N].  scale: fp32 [T].  y: [T, rows, N].
        rows: at most BM; K: a multiple of BK; N: a multiple of BN.
    """
    slot = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        part = tl.load(x + (slot * rows + m[:, None]) * K + k[None, :], mask=(m < rows)[:, None], other=0.0)
        word = tl.load(words + (slot * (K // 32) + k[:, None] // 32) * N + n[None, :])
        sign = ((word >> (k[:, None] % 32)) & 1) * 2 - 1
        total = tl.dot(part, sign.to(part.dtype), total)
    total *= tl.load(scale + slot)
    tl.store(y + (slot * rows + m[:, None]) * N + n[None, :], total.to(y.dtype.element_ty), mask=(m < rows)[:, None])
