# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Eager launcher of the GPU kernel of `bitdelta::delta_embedding`; signs in the layout `FRAGMENTS`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import index_arguments
from .tile import sign_of
from .tile_linear import slot_of_row


@triton.jit
def embedding_kernel(
    y_ptr, ids_ptr, table_ptr, signs_ptr, row_scale_ptr, col_ptr, left_ptr, right_ptr, tenant_ptr, N, K, blocks,
    entries, rows_per_entry, SLOTS, P: tl.constexpr, COL: tl.constexpr, RANK: tl.constexpr, HALF: tl.constexpr,
    INDEXED: tl.constexpr, BASE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BK features of one lookup: y [M, K] = delta[slot, id] (+ table[id] where BASE); grid (M, ceil(K / BK))."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    token = tl.load(ids_ptr + row).to(tl.int64)
    slot = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED)
    known = (token >= 0) & (token < N)
    token = tl.where(known, token, 0)
    total = tl.zeros((BK,), tl.float32)
    if (slot >= 0) & known:
        tiles = (N + 15) // 16
        width = blocks * 128 + 64 * HALF
        for p in range(P):
            plane = slot.to(tl.int64) * P + p
            sign = sign_of(signs_ptr + plane * tiles * width, token, k, K, width, blocks, HALF)
            term = sign * tl.load(row_scale_ptr + plane * N + token)
            if COL:
                term *= tl.load(col_ptr + plane * K + k, mask=k < K, other=0.0)
            total += term
        for r in range(RANK):
            factor = tl.load(left_ptr + (slot.to(tl.int64) * N + token) * RANK + r).to(tl.float32)
            other = tl.load(right_ptr + (slot.to(tl.int64) * RANK + r) * K + k, mask=k < K, other=0.0)
            total += factor * other.to(tl.float32)
    if BASE:
        total += tl.load(table_ptr + token * K + k, mask=known & (k < K), other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * K + k, total.to(y_ptr.dtype.element_ty), mask=k < K)


def delta_embedding(
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    embedding_dim: int,
    dtype: torch.dtype,
    table: Tensor | None = None,
) -> Tensor:
    """`ops.delta_embedding`, with table[ids] added if there is a table; an id outside [0, N) gives zeros.

    Args:
        ids: int [*].  signs: int32 [T, P, *layout.packed_shape(N, K, FRAGMENTS)], contiguous.
        row_scale, col_scale, left, right, tenant: as in the op; fp32 scales.
        embedding_dim: K.  dtype: of the result.  table: [N, K] or None.

    Returns:
        [*, K] in `dtype`.
    """
    slots, planes, vocabulary = row_scale.shape
    flat = ids.reshape(-1).contiguous()
    y = torch.empty(flat.shape[0], embedding_dim, dtype=dtype, device=signs.device)
    halves = -(-embedding_dim // 128)
    index, entries, rows_per_entry, slots, indexed = index_arguments(tenant, flat.shape[0], slots, flat)
    block = min(1024, triton.next_power_of_2(embedding_dim))
    embedding_kernel[flat.shape[0], triton.cdiv(embedding_dim, block)](
        y, flat, y if table is None else table, signs, row_scale, y if col_scale is None else col_scale,
        y if left is None else left, y if right is None else right, index, vocabulary, embedding_dim, halves // 2,
        entries, rows_per_entry, slots, P=planes, COL=col_scale is not None, RANK=0 if left is None else left.shape[2],
        HALF=halves % 2, INDEXED=indexed, BASE=table is not None, BK=block, num_warps=4,
    )  # fmt: skip
    return y.reshape(*ids.shape, embedding_dim)
