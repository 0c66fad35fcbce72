# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton device functions on sign planes in the layout `FRAGMENTS`: the arithmetic that every GPU kernel shares.

Called by the launchers of this folder and by the Inductor templates. Words as in `layout`: a tile is 16 output rows, a
block 256 features, whose 128 words lie together in the order of a warp's matrix fragment. N, K, T, P, M as everywhere.

Two ways to multiply. *Binary*: x as integers times a power of two, one bit plane after the other against the sign bits
as they lie in memory (`mma.m16n8k256.b1.and.popc`): sum_k sign_k x_k = 2 sum_j 2^j popc(signs & plane_j) - sum_k x_k,
in exact integers. *Exact*: a masked bit of a 16-bit word is, read as bf16, zero or a power of two; x is scaled by its
inverse beforehand, so that one logical instruction makes two operands of an ordinary `tl.dot`. Of x times 0 or 1 a
half is taken away beforehand, for all features at once; about half of the bits enter as 1 - bit, times -x, so that
these halves add up to no more than the products themselves do, whatever the mean of x.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _binary_mma(pair: int) -> tl.constexpr:
    """One binary MMA; operands: sums 0-3 (out), signs 4-7, planes 8-11, of which `pair` picks two, sums 12-15."""
    planes = f"{{${8 + 2 * pair}, ${9 + 2 * pair}}}"
    return tl.constexpr(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
        f"{{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {planes}, {{$12, $13, $14, $15}};"
    )


_BINARY_MMA_LOW = _binary_mma(0)
_BINARY_MMA_HIGH = _binary_mma(1)
_BINARY_OPERANDS = tl.constexpr(",".join(["=r"] * 4 + ["r"] * 12))


@triton.jit
def sign_of(signs_ptr, n, k, K, width, blocks, HALF: tl.constexpr):
    """Signs as fp32 +-1 of weights (n, k) of one slot and plane, int32 [tiles, width]; 0 past K."""
    lane = n % 8 * 4 + k // 32 % 4
    block = k // 256
    row_half = n % 16 // 8
    place = lane * 4 + k // 128 % 2 * 2 + row_half
    if HALF:
        place = tl.where(block == blocks, lane * 2 + row_half, place)
    word = tl.load(signs_ptr + n // 16 * width + block * 128 + place, mask=k < K, other=0)
    return tl.where(k < K, ((word >> (k % 32)) & 1) * 2.0 - 1.0, 0.0)


@triton.jit
def binary_mma(sums, signs, planes, HIGH: tl.constexpr):
    """sums + popc(signs & planes) in fragment order: int32 [..., 128] each; `HIGH` picks the second pair of planes."""
    if HIGH:
        return tl.inline_asm_elementwise(_BINARY_MMA_HIGH, _BINARY_OPERANDS, [signs, planes, sums], tl.int32, False, 4)
    return tl.inline_asm_elementwise(_BINARY_MMA_LOW, _BINARY_OPERANDS, [signs, planes, sums], tl.int32, False, 4)


@triton.jit
def weigh_bits(counts, TOP: tl.constexpr, SHIFT: tl.constexpr):
    """Counts of 8 bit planes, int32 [W, R, G, 128] in fragment order, weighed: int32 [W, R, G, 8, 4, 2].

    Bit plane j counts 2^(j + SHIFT), and bit plane 7 -2^(7 + SHIFT) where it is the sign (`TOP`).
    """
    f = tl.arange(0, 128)
    plane = (f // 4) % 4 * 2 + f % 2
    weight = (1 << (plane + SHIFT)).to(tl.int32)
    if TOP:
        weight = tl.where(plane == 7, -weight, weight)
    weighed = counts * weight[None, None, None, :]
    W: tl.constexpr = counts.shape[0]
    R: tl.constexpr = counts.shape[1]
    G: tl.constexpr = counts.shape[2]
    return tl.sum(tl.reshape(weighed, (W, R, G, 8, 4, 2, 2)), 6)  # w, r, group, g, q, h


@triton.jit
def sum_of_planes(weighed, WN: tl.constexpr, WK: tl.constexpr):
    """What `weigh_bits` gives, over all lanes and warps that share an output: int32 [WN, R, G, 8, 2]."""
    R: tl.constexpr = weighed.shape[1]
    G: tl.constexpr = weighed.shape[2]
    # Flat, so that lanes lie beside each other in the shared memory where warps meet, and not in one bank.
    warps = tl.sum(tl.reshape(tl.sum(weighed, 4), (WN, WK, R * G * 16)), 1)
    return tl.reshape(warps, (WN, R, G, 8, 2))


@triton.jit
def binary_product(
    signs_ptr, bits_ptr, sums_ptr, bits_row, tile, tiles, width, blocks, chunks, live,
    R: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, U: tl.constexpr,
    WIDE: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """Integer products of WN R tiles of signs and G rows of x.

    Args:
        signs_ptr: of one slot and plane, int32 [tiles, width].
        bits_ptr, sums_ptr: `x_bits` of all rows, int32 [rows, ceil(K / 256), 1 + WIDE, 128] and [rows, chunks, 2].
        bits_row: int32 [G], rows of them.
        tile: the first tile.  blocks: whole blocks of 256 features in a tile.
        live: 0 for a plane that is absent, whose result is then meaningless, else 1.
        WN, WK: warps along N and along K.  U: blocks per step of a warp.
        WIDE: 24 bits of x instead of 16.  HALF: a half block ends the tile.  EVEN: WK U divides blocks.
        CP: power of two, at least chunks.

    Returns:
        fp32 [WN, R, G, 8, 2], row 16 (tile + R wn + r) + 8 h + g of N at [wn, r, :, g, h], not yet scaled.
    """
    warp = tl.arange(0, WN * WK)
    lane = tl.arange(0, 128)
    tile_of = tl.minimum(tile + (warp // WK * R)[:, None] + tl.arange(0, R)[None, :], tiles - 1)  # [W, R]
    # Pointers have all four dimensions, so that loads come in the layout of the fragments and stay in it.
    signs = signs_ptr + (tile_of * width)[:, :, None, None] + lane[None, None, None, :]  # [W, R, 1, 128]
    depth: tl.constexpr = 128 * (1 + WIDE)
    stored = blocks + HALF
    bits = bits_ptr + (bits_row * (stored * depth))[None, None, :, None] + lane[None, None, None, :]  # [1, 1, G, 128]
    low = tl.zeros((WN * WK, R, G, 128), tl.int32)
    high = low
    top = low
    first = warp % WK * U
    for step in range(0, live * ((blocks + WK * U - 1) // (WK * U))):
        for u in tl.static_range(U):
            block = (first + step * (WK * U) + u)[:, None, None, None]
            if EVEN:
                a = tl.load(signs + block * 128)
                b = tl.load(bits + block * depth)
            else:
                a = tl.load(signs + block * 128, mask=block < blocks, other=0)
                b = tl.load(bits + block * depth, mask=block < blocks, other=0)
            a = tl.broadcast_to(a, (WN * WK, R, G, 128))
            b = tl.broadcast_to(b, (WN * WK, R, G, 128))
            if WIDE:
                if EVEN:
                    t = tl.load(bits + block * depth + 128)
                else:
                    t = tl.load(bits + block * depth + 128, mask=block < blocks, other=0)
                top = binary_mma(top, a, tl.broadcast_to(t, (WN * WK, R, G, 128)), False)
            low = binary_mma(low, a, b, False)
            high = binary_mma(high, a, b, True)
    if HALF:
        there = ((warp % WK == 0) & (live > 0))[:, None, None, None] & (lane % 4 < 2)[None, None, None, :]
        place = tl.where(lane % 4 < 2, lane // 4 * 2 + lane % 4, 0)[None, None, None, :]
        a = tl.load(signs_ptr + (tile_of * width + blocks * 128)[:, :, None, None] + place, mask=there, other=0)
        a = tl.broadcast_to(a, (WN * WK, R, G, 128))
        last = bits + blocks * depth + (warp * 0)[:, None, None, None]
        b = tl.broadcast_to(tl.load(last), (WN * WK, R, G, 128))
        if WIDE:
            top = binary_mma(top, a, tl.broadcast_to(tl.load(last + 128), (WN * WK, R, G, 128)), False)
        low = binary_mma(low, a, b, False)
        high = binary_mma(high, a, b, True)
    count = sum_of_planes(weigh_bits(low, False, 0) + weigh_bits(high, not WIDE, 8), WN, WK)
    chunk = tl.arange(0, CP)
    sums = sums_ptr + (bits_row * (chunks * 2))[:, None] + (chunk * 2)[None, :]
    held = (chunk < chunks)[None, :]
    low_sum = tl.sum(tl.load(sums, mask=held, other=0), 1)  # [G]
    # int32 is enough: 2 count and the sum wrap around alike, and their difference fits for K <= 32768
    product = (2 * count - low_sum[None, None, :, None, None]).to(tl.float32)
    if WIDE:
        top_sum = tl.sum(tl.load(sums + 1, mask=held, other=0), 1)
        count = sum_of_planes(weigh_bits(top, True, 0), WN, WK)
        product += (2 * count - top_sum[None, None, :, None, None]).to(tl.float32) * 65536.0
    return product


COMPLEMENTED = tl.constexpr(0x6996)  # bits that enter as 1 - bit: those with an odd number of ones in their number

_LOGIC_TOP = tl.constexpr("lop3.b32 $0, $1, 0x80008000, 0xBF80BF80, 0x6A;")  # (a & b) ^ c
_LOGIC_UPPER = tl.constexpr("and.b32 $0, $1, $2;")
_LOGIC_LOWER = tl.constexpr("{.reg .b32 t; shl.b32 t, $1, 8; and.b32 $0, t, $2;}")
_LOGIC_UPPER_NOT = tl.constexpr("lop3.b32 $0, $1, $2, 0, 0x0C;")  # ~a & b
_LOGIC_LOWER_NOT = tl.constexpr("{.reg .b32 t; shl.b32 t, $1, 8; lop3.b32 $0, t, $2, 0, 0x0C;}")


@triton.jit
def bit_operand(words, J: tl.constexpr, FORM: tl.constexpr):
    """Bit J of int16 words as numbers: +-1 for J = 15, else 2^(f - 127) or 0, f = 2^(J - 7), or 2^(J + 1) below J = 7.

    Of the bits that `COMPLEMENTED` has, 0 gives the power of two and 1 gives 0.

    FORM: "asm", one instruction (two below J = 7) for a pair in PTX; "plain", the same in Triton; "interpreted",
    that and then fp32, since the interpreter has no bf16 products.
    """
    NOT: tl.constexpr = COMPLEMENTED >> J & 1
    if FORM == "asm":
        if J == 15:
            return tl.inline_asm_elementwise(_LOGIC_TOP, "=r,r", [words], tl.bfloat16, True, 2)
        if J >= 7:
            mask = tl.full(words.shape, 1 << J, tl.int16)
            return tl.inline_asm_elementwise(
                _LOGIC_UPPER_NOT if NOT else _LOGIC_UPPER, "=r,r,r", [words, mask], tl.bfloat16, True, 2
            )
        mask = tl.full(words.shape, 1 << (J + 8), tl.int16)
        return tl.inline_asm_elementwise(
            _LOGIC_LOWER_NOT if NOT else _LOGIC_LOWER, "=r,r,r", [words, mask], tl.bfloat16, True, 2
        )
    source = ~words if NOT else words
    if J == 15:
        bits = (source & -32768) ^ -16512
    elif J >= 7:
        bits = source & (1 << J)
    else:
        bits = (source << 8) & (1 << (J + 8))
    number = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    if FORM == "interpreted":
        return number.to(tl.float32)
    return number


@triton.jit
def word_matrix(words, R: tl.constexpr, W: tl.constexpr, U: tl.constexpr):
    """int16 [W, R, U, 256] in fragment order as [16 R W, 16 U].

    Row 16 (W r + w) + 8 h + g, column 16 u + 8 s + 2 q + half of the word.

    On NVIDIA this moves nothing: every lane already holds what operand A of its MMAs wants.
    """
    split = tl.reshape(words, (W, R, U, 8, 4, 2, 2, 2))  # w, r, u, g, q, s, h, half
    return tl.reshape(tl.permute(split, (1, 0, 6, 3, 2, 5, 4, 7)), (R * W * 16, 16 * U))


@triton.jit
def bit_operands(words, J: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """Bits J, J + STEP, ... of int16 words [BN, BW] as numbers [BN, BW, 2, ..., 2], D of them in order."""
    if D == 1:
        numbers = bit_operand(words, J, FORM)
    else:
        even = bit_operands(words, J, 2 * STEP, D // 2, FORM)
        numbers = tl.join(even, bit_operands(words, J + STEP, 2 * STEP, D // 2, FORM))
    return numbers


@triton.jit
def exact_step(
    acc, words, x_ptrs, x_mask, U: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """acc + words @ x for the 16 bits of int16 words [BN, 16 U], D at a time.

    x_ptrs [16 D U, columns]: of the first D bits; bit d of word 16 u + w is row 16 (D u + d) + w.
    """
    for j in tl.static_range(0, 16, D):
        # On NVIDIA this moves nothing: what a lane holds for D instructions it holds for one that is D times as deep.
        bits = tl.reshape(bit_operands(words, j, 1, D, FORM), (words.shape[0], U, 16, D))
        operand = tl.reshape(tl.permute(bits, (0, 1, 3, 2)), (words.shape[0], 16 * D * U))
        x = tl.load(x_ptrs + 16 * j, mask=x_mask, other=0.0) if MASKED else tl.load(x_ptrs + 16 * j)
        if FORM == "interpreted":
            x = x.to(tl.float32)
        acc = tl.dot(operand, x, acc, input_precision="ieee")
    return acc


@triton.jit
def exact_product(
    signs_ptr, words_ptr, halves_ptr, x_row, tile, tiles, width, blocks, live,
    R: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products of R W tiles of signs and BM rows of x, by tensor cores with fp32 sums.

    The parts of x are columns of one matrix, so that they share the unpacking and the matrix instruction: part s of row
    m is column BM s + m. Three parts take the place of four, the last of which is the third again and is not counted.

    Args:
        signs_ptr: of one slot and plane, int32 [tiles, width].
        words_ptr, halves_ptr: `x_words` of all rows, bf16 [rows, ceil(K / 256), SPLITS, 16, 16] and fp32
            [rows, ceil(K / 256)].
        x_row: int32 [BM], rows of them.
        tile, tiles, width, blocks, HALF: as in `binary_product`.  EVEN: U divides blocks.
        live: 0 for an absent plane, whose result is then meaningless, else 1.
        W: warps.  D: bits of a word that one product takes.

    Returns:
        fp32 [16 R W, BM], row 16 (tile + W r + w) + 8 h + g of N at 16 (W r + w) + 8 h + g, not yet scaled.
    """
    PARTS: tl.constexpr = 4 if SPLITS == 3 else SPLITS
    column = tl.arange(0, PARTS * BM)
    row_of = tl.reshape(tl.broadcast_to(x_row[None, :], (PARTS, BM)), (PARTS * BM,))
    warp = tl.arange(0, W)
    element = tl.arange(0, 256)
    halfwords = signs_ptr.to(tl.pointer_type(tl.int16))
    tile_of = tl.minimum(tile + warp[:, None] + tl.arange(0, R)[None, :] * W, tiles - 1)  # [W, R]
    unit = tl.arange(0, U)
    signs = halfwords + (tile_of * (2 * width))[:, :, None, None] + (unit * 256)[None, None, :, None]
    signs += element[None, None, None, :]  # [W, R, U, 256]
    stored = blocks + HALF
    depth: tl.constexpr = 256 * SPLITS
    feature = tl.arange(0, 16 * D * U)
    part = tl.minimum(column // BM, SPLITS - 1) * 256
    x_start = words_ptr + (row_of.to(tl.int64) * (stored * depth) + part)[None, :]
    x_ptrs = x_start + (feature // (16 * D) * depth + feature % (16 * D))[:, None]
    half = tl.zeros((16, PARTS * BM), tl.float32)
    for first in range(0, stored, 16):
        at = first + tl.arange(0, 16)
        wanted = (at < stored)[:, None] & (column < BM)[None, :]
        half += tl.load(halves_ptr + row_of[None, :] * stored + at[:, None], mask=wanted, other=0.0)
    acc = tl.zeros((R * W * 16, PARTS * BM), tl.float32) - tl.sum(half, 0)[None, :]
    for step in tl.range(0, live * ((blocks + U - 1) // U), num_stages=STAGES):
        block = step * U
        if EVEN:
            words = tl.load(signs + block * 256)
        else:
            words = tl.load(signs + block * 256, mask=(block + unit < blocks)[None, None, :, None], other=0)
        x_inside = (block + feature // (16 * D) < blocks)[:, None]
        acc = exact_step(acc, word_matrix(words, R, W, U), x_ptrs + block * depth, x_inside, U, D, not EVEN, FORM)
    if HALF:
        there = (element // 4 % 2 == 0) & (live > 0)
        place = tl.where(there, element // 8 * 4 + element % 4, 0)
        last = halfwords + (tile_of * (2 * width) + blocks * 256)[:, :, None, None] + place[None, None, None, :]
        words = word_matrix(tl.load(last, mask=there[None, None, None, :], other=0), R, W, 1)
        x_ptrs = x_start + (blocks * depth + tl.arange(0, 16 * D))[:, None]
        acc = exact_step(acc, words, x_ptrs, True, 1, D, False, FORM)
    if PARTS > 1:
        acc = tl.where((column < SPLITS * BM)[None, :], acc, 0.0)
        acc = tl.sum(tl.reshape(acc, (R * W * 16, PARTS, BM)), 1)
    return acc * 17179869184.0
