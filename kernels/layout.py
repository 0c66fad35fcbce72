"""The one definition of how signs lie in memory: bit order, packing, unpacking, shape checks.

Canonical layout, used on disk, in `Delta` and by the reference: `signs` int32 [..., N, W] with W = ceil(K / 32). Bit j
of word w is input feature k = 32 w + j; 1 means +1 and 0 means -1. Bits past K are 0 and never stand for a sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32
CANONICAL = "canonical"


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


def check_bank(
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    features: int,
) -> None:
    """Check the shapes of one parameter's stacked delta; sizes may be symbolic.

    Args:
        signs: int32 [T, P, N, W].
        row_scale: float [T, P, N].
        col_scale: float [T, P, K] or None.
        left, right: [T, N, r] and [T, r, K], both or neither.
        features: K.

    Raises:
        ValueError: naming the tensor, its shape and the shape expected.
    """
    if signs.dim() != 4:
        raise ValueError(f"signs must be int32 [T, P, N, W], got {list(signs.shape)}")
    check_words(signs, features)
    slots, planes, rows, _ = signs.shape
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
