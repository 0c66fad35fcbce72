"""The one definition of how signs lie in memory: bit order, packing, unpacking, shape checks.

Canonical layout, used on disk, in `Delta` and by the reference: `signs` int32 [..., N, W] with W = ceil(K / 32). Bit j
of word w is input feature k = 32 w + j; 1 means +1 and 0 means -1. Bits past K are 0 and never stand for a sign.

Device layout `FRAGMENTS`, used by every kernel of kernels/tile.py: the same words in the order in which the matrix
instructions of a GPU want them, int32 [..., ceil(N / 16), 64 ceil(K / 128)]. Words of 16 output rows lie together, in
blocks of 256 features; of a block, the 32 lanes of a warp hold 4 words each, one 128-bit load. With row n = 16 tile +
8 h + g and word w = 8 block + 4 s + q, where g < 8, h < 2, s < 2, q < 4,

    place = 128 block + 4 (4 g + q) + 2 s + h

which is operand A of `mma.m16n8k256` over bits and, read as pairs of 16-bit words, operand A of `mma.m16n8k16` over
(half) words (PTX ISA, matrix fragments). Where ceil(K / 128) is odd, the last block has no s = 1: its words lie at
128 block + 2 (4 g + q) + h. Rows past N and words past W are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
CANONICAL = "canonical"
FRAGMENTS = "fragments_16x256"
TILE_ROWS = 16
BLOCK_FEATURES = 256
_HALF_WORDS = 4  # words per row of half a block


def words(features: int) -> int:
    """Words per packed row: W = ceil(features / 32)."""
    return -(-features // WORD_BITS)


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(WORD_BITS, dtype=torch.int32, device=device)


def pack(positive: Tensor) -> Tensor:
    """Pack booleans into sign words.

    Semantics:
        signs[..., w] = sum_j positive[..., 32 w + j] << j      (bits past K are 0)

    Args:
        positive: bool [..., K], true where the sign is +1.

    Returns:
        int32 [..., W].
    """
    if positive.dtype != torch.bool:
        raise TypeError(f"pack takes booleans (true for +1), got {positive.dtype}")
    features = positive.shape[-1]
    if positive.numel() == 0:  # no bytes to view as words
        return torch.zeros(*positive.shape[:-1], words(features), dtype=torch.int32, device=positive.device)
    ragged = words(features) * WORD_BITS - features
    bits = torch.nn.functional.pad(positive, (0, ragged)) if ragged else positive
    octets = bits.reshape(*positive.shape[:-1], -1, 8).to(torch.uint8)
    weights = (1 << torch.arange(8, dtype=torch.int32, device=positive.device)).to(torch.uint8)
    packed = (octets * weights).sum(-1, dtype=torch.uint8)  # [..., 4 W], little-endian bytes of the words
    return packed.view(torch.int32)


def unpack(signs: Tensor, features: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        signs: int32 [..., W].
        features: K, with W = ceil(K / 32).

    Returns:
        bool [..., K], true for +1.
    """
    check_words(signs, features)
    bits = (signs.unsqueeze(-1) >> _bit_positions(signs.device)) & 1
    return bits.flatten(-2)[..., :features].to(torch.bool)


def unpack_signs(signs: Tensor, features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs as numbers: int32 [..., W] -> +1 / -1 of `dtype`, [..., K]."""
    return unpack(signs, features).to(dtype).mul_(2).sub_(1)


def check_words(signs: Tensor, features: int) -> None:
    """Raise ValueError unless `signs` is int32 with ceil(features / 32) words in its last dimension."""
    if signs.dtype != torch.int32:
        raise ValueError(f"signs must be int32, got {signs.dtype}")
    if signs.dim() < 1 or signs.shape[-1] != words(features):
        raise ValueError(
            f"signs of shape {list(signs.shape)} cannot hold {features} features: expected {words(features)} "
            "words per row"
        )


def check_ragged_bits(signs: Tensor, features: int) -> None:
    """Raise ValueError if a bit past `features` is set: the file or the packer broke the canonical layout."""
    ragged = features % WORD_BITS
    if ragged and signs.numel() and bool((signs[..., -1] >> ragged & ((1 << (WORD_BITS - ragged)) - 1)).any()):
        raise ValueError(f"signs carry bits past feature {features}: not the canonical layout")


def packed_shape(outputs: int, features: int, layout: str) -> tuple[int, int]:
    """The last two sizes of the signs of N x K weights in `layout`; sizes may be symbolic.

    Raises:
        ValueError: an unknown layout.
    """
    if layout == CANONICAL:
        return outputs, words(features)
    if layout == FRAGMENTS:
        return -(-outputs // TILE_ROWS), TILE_ROWS * _HALF_WORDS * -(-features // (_HALF_WORDS * WORD_BITS))
    raise ValueError(f"unknown sign layout {layout!r}: this build has {CANONICAL!r} and {FRAGMENTS!r}")


def layout_of(signs: Tensor, outputs: int, features: int) -> str:
    """The layout of the signs of N x K weights, by their sizes: no two layouts share them.

    Raises:
        ValueError: sizes of no layout.
    """
    for layout in (CANONICAL, FRAGMENTS):
        if tuple(signs.shape[-2:]) == packed_shape(outputs, features, layout):
            return layout
    raise ValueError(f"signs of shape {list(signs.shape)} are those of no layout of {outputs} x {features} weights")


def padding_bytes(outputs: int, features: int, layout: str) -> int:
    """Bytes that one plane of N x K signs takes in `layout` beyond its canonical words."""
    rows, columns = packed_shape(outputs, features, layout)
    return 4 * (rows * columns - outputs * words(features))


def to_layout(signs: Tensor, features: int, layout: str) -> Tensor:
    """Canonical signs int32 [..., N, W] in `layout`, contiguous, on the same device; `from_layout` is the inverse."""
    check_words(signs, features)
    *batch, outputs, width = signs.shape
    rows, columns = packed_shape(outputs, features, layout)
    if layout == CANONICAL:
        return signs.contiguous()
    padded = columns // TILE_ROWS
    signs = torch.nn.functional.pad(signs, (0, padded - width, 0, rows * TILE_ROWS - outputs))
    tiles = signs.reshape(*batch, rows, 2, 8, padded)  # [..., tile, h, g, word]
    whole = padded // (2 * _HALF_WORDS)
    blocks = tiles[..., : whole * 2 * _HALF_WORDS].unflatten(
        -1, (whole, 2, _HALF_WORDS)
    )  # [..., tile, h, g, block, s, q]
    blocks = blocks.movedim((-3, -5, -4, -1, -2), (-5, -1, -4, -3, -2)).flatten(-5)  # block, g, q, s, h
    half = tiles[..., whole * 2 * _HALF_WORDS :]  # [..., tile, h, g, q or nothing]
    return torch.cat([blocks, half.movedim(-3, -1).flatten(-3)], -1).contiguous()


def from_layout(signs: Tensor, outputs: int, features: int, layout: str) -> Tensor:
    """Signs of N x K weights in `layout` as canonical words, int32 [..., N, W].

    Raises:
        ValueError: a shape that is not that of N x K weights in `layout`.
    """
    check_packed(signs, outputs, features, layout)
    if layout == CANONICAL:
        return signs
    rows, columns = packed_shape(outputs, features, layout)
    padded = columns // TILE_ROWS
    whole = padded // (2 * _HALF_WORDS)
    split = whole * 2 * _HALF_WORDS * TILE_ROWS
    blocks = signs[..., :split].unflatten(-1, (whole, 8, _HALF_WORDS, 2, 2))  # [..., tile, block, g, q, s, h]
    blocks = blocks.movedim((-5, -1, -4, -3, -2), (-3, -5, -4, -1, -2)).flatten(-3)  # [..., tile, h, g, word]
    half = signs[..., split:].unflatten(-1, (8, padded - 2 * _HALF_WORDS * whole, 2)).movedim(-1, -3)
    tiles = torch.cat([blocks, half], -1).reshape(*signs.shape[:-2], rows * TILE_ROWS, padded)
    return tiles[..., :outputs, : words(features)].contiguous()


def check_packed(signs: Tensor, outputs: int, features: int, layout: str) -> None:
    """Raise ValueError unless `signs` is int32 [..., *packed_shape]."""
    if layout == CANONICAL:
        check_words(signs, features)
    expected = packed_shape(outputs, features, layout)
    if signs.dtype != torch.int32 or signs.dim() < 2 or tuple(signs.shape[-2:]) != expected:
        raise ValueError(
            f"signs of {outputs} x {features} weights in layout {layout!r} must be int32 [..., {expected[0]}, "
            f"{expected[1]}], got {signs.dtype} {list(signs.shape)}"
        )


def check_bank(
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    features: int,
    layout: str = CANONICAL,
) -> None:
    """Check the shapes of one parameter's stacked delta; sizes may be symbolic.

    Args:
        signs: int32 [T, P, N, W] in the canonical layout, [T, P, *packed_shape] in another.
        row_scale: float [T, P, N].
        col_scale: float [T, P, K] or None.
        left, right: [T, N, r] and [T, r, K], both or neither.
        features: K.  layout: of the signs.

    Raises:
        ValueError: naming the tensor, its shape and the shape expected.
    """
    if signs.dim() != 4:
        raise ValueError(f"signs must be int32 [T, P, N, W], got {list(signs.shape)}")
    slots, planes, rows, _ = signs.shape
    if layout == CANONICAL:
        check_words(signs, features)
    elif row_scale.dim() != 3:
        raise ValueError(f"row_scale must be [{slots}, {planes}, N], got {list(row_scale.shape)}")
    else:
        rows = row_scale.shape[2]
        check_packed(signs, rows, features, layout)
    if tuple(row_scale.shape) != (slots, planes, rows):
        raise ValueError(
            f"row_scale must be {[slots, planes, rows]} to match signs {list(signs.shape)}, got {list(row_scale.shape)}"
        )
    if col_scale is not None and tuple(col_scale.shape) != (slots, planes, features):
        raise ValueError(f"col_scale must be {[slots, planes, features]}, got {list(col_scale.shape)}")
    if (left is None) != (right is None):
        raise ValueError("left and right are the two factors of one low-rank part: give both or neither")
    if left is not None and right is not None:
        if left.dim() != 3 or tuple(left.shape[:2]) != (slots, rows):
            raise ValueError(f"left must be [{slots}, {rows}, r], got {list(left.shape)}")
        if tuple(right.shape) != (slots, left.shape[2], features):
            raise ValueError(f"right must be {[slots, left.shape[2], features]}, got {list(right.shape)}")
