"""Matrix instructions of a warp: which element each lane's registers hold, after the tables of the PTX ISA.

Registers come as unsigned arrays [warps, 32, registers]. Products are made in fp64 and rounded to fp32 at the end; the
hardware adds in fp32, in an order of its own.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def to_float(words: Array) -> Array:
    """bf16 in uint16 as fp32."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float(numbers: Array) -> Array:
    """fp32 as bf16 in uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _halves(registers: Array, kind: str) -> Array:
    """Pairs of 16-bit numbers as fp64: [warps, 32, registers, 2]."""
    words = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    return (to_float(words) if kind == "bf16" else words.view(np.float16)).astype(np.float64)


def operand_a(registers: Array, kind: str) -> Array:
    """[warps, 32, 4] of m16n8k16 as [warps, 16, 16]."""
    # lane = 4 g + t, register = h + 2 s, pair: row 8 h + g, column 8 s + 2 t + pair
    split = _halves(registers, kind).reshape(-1, 8, 4, 2, 2, 2)  # w, g, t, s, h, pair
    return split.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def operand_b(registers: Array, kind: str) -> Array:
    """[warps, 32, 2] of m16n8k16 as [warps, 16, 8]."""
    split = _halves(registers, kind).reshape(-1, 8, 4, 2, 2)  # w, g, t, s, pair: row 8 s + 2 t + pair, column g
    return split.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)


def accumulator(registers: Array) -> Array:
    """[warps, 32, columns / 2] as [warps, 16, columns], whatever their type."""
    chunks = registers.shape[2] // 4
    split = registers.reshape(-1, 8, 4, chunks, 2, 2)  # w, g, t, c, h, pair: row 8 h + g, column 8 c + 2 t + pair
    return split.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8 * chunks)


def from_accumulator(matrix: Array) -> Array:
    """The inverse of `accumulator`."""
    chunks = matrix.shape[2] // 8
    split = matrix.reshape(-1, 2, 8, chunks, 4, 2)  # w, h, g, c, t, pair
    return split.transpose(0, 2, 4, 3, 1, 5).reshape(-1, 32, 4 * chunks)


def multiply(a: Array, b: Array, c: Array) -> Array:
    """fp32 a @ b + c."""
    return (a @ b + c).astype(np.float32)


def multiply_bits(a: Array, b: Array, c: Array) -> Array:
    """m16n8k256 of bits with `and` and `popc`: registers [warps, 32, 4], [warps, 32, 2] and [warps, 32, 4]."""
    rows = a.reshape(-1, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2).reshape(-1, 16, 8)  # w, g, t, s, h: 8 h + g, 4 s + t
    columns = b.reshape(-1, 8, 4, 2).transpose(0, 1, 3, 2).reshape(-1, 8, 8)  # w, g, t, s: column g, word 4 s + t
    counts = np.bitwise_count(rows[:, :, None] & columns[:, None]).astype(np.uint32).sum(-1, dtype=np.uint32)
    return c + from_accumulator(counts)


def from_rows(rows: Array, turned: bool) -> Array:
    """What ldmatrix gives: rows uint16 [warps, matrices, 8, 8] as registers uint32 [warps, 32, matrices]."""
    if turned:
        rows = rows.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(rows).view(np.uint32)  # w, m, row, t: lane 4 row + t
    return pairs.reshape(*rows.shape[:2], 32).transpose(0, 2, 1)


def to_rows(registers: Array, turned: bool) -> Array:
    """What stmatrix writes: the inverse of `from_rows`."""
    pairs = np.ascontiguousarray(registers.transpose(0, 2, 1)).reshape(len(registers), -1, 8, 4)
    rows = pairs.view(np.uint16)
    return rows.transpose(0, 1, 3, 2) if turned else rows


def described(descriptor: int, rows: int) -> Array:
    """Where the 32 bytes of each row are that a wgmma reads of an operand whose rows lie along K: int [rows, 2, 16].

    Args:
        descriptor: its start, the distance of eight rows, and how 16-byte units are swizzled.

    Raises:
        NotImplementedError: no swizzle, in which such an operand lies otherwise.
    """
    start = (descriptor & 0x3FFF) << 4
    distance = (descriptor >> 32 & 0x3FFF) << 4
    mode = descriptor >> 62
    if mode == 0 or descriptor >> 49 & 7:
        raise NotImplementedError("an operand of wgmma without a swizzle, or with an offset of its own")
    pitch = {1: 128, 2: 64, 3: 32}[mode]
    row = np.arange(rows)
    at = start + (row // 8 * distance + row % 8 * pitch)[:, None] + np.arange(0, 32, 16)  # [rows, 2]
    at ^= (at >> 7 & (pitch // 16 - 1)) << 4
    return at[:, :, None] + np.arange(16)
