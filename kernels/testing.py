"""Random operands of the ops, for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout

Bank = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def random_bank(
    slots: int,
    planes: int,
    outputs: int,
    features: int,
    *,
    column: bool = False,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Bank:
    """One parameter's stacked tensors in the canonical layout, the same for the same N and K.

    Args:
        column: with column scales.
        rank: r of the low-rank part; 0: without one.
        dtype: of the scales; of the low-rank part too where it is not fp32, else that is bf16.

    Returns:
        signs int32 [T, P, N, W], row_scale [T, P, N], col_scale [T, P, K] or None, left [T, N, r] and right [T, r, K]
        or None.
    """
    generator = torch.Generator().manual_seed(outputs * 1000 + features)
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    signs = layout.pack(torch.rand(slots, planes, outputs, features, generator=generator) < 0.5)
    row_scale = (torch.rand(slots, planes, outputs, generator=generator) + 0.1).to(dtype)
    col_scale = (torch.rand(slots, planes, features, generator=generator) + 0.5).to(dtype) if column else None
    left = torch.randn(slots, outputs, rank, generator=generator).to(low) if rank else None
    right = torch.randn(slots, rank, features, generator=generator).to(low) if rank else None
    return signs, row_scale, col_scale, left, right
