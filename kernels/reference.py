"""Every op in plain PyTorch, written to be read: the truth that all tests compare against.

Shapes use the words of `layout`: M rows, N out, K in, T slots, P planes, W = ceil(K / 32), R row-index length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import unpack_signs


def delta_weight(
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense delta of every slot.

    Semantics (BitDelta, arXiv 2402.10193, equation 2, with rows, columns, planes and a low-rank part):
        delta = sum_p row_scale[p][:, None] * sign[p] * col_scale[p][None, :] + left @ right

    Args:
        signs: int32 [T, P, N, W].  row_scale: [T, P, N].  col_scale: [T, P, K] or None.
        left: [T, N, r] or None.  right: [T, r, K] or None.
        features: K.  dtype: of the arithmetic and the result.

    Returns:
        [T, N, K].
    """
    terms = unpack_signs(signs, features, dtype) * row_scale.to(dtype).unsqueeze(-1)
    if col_scale is not None:
        terms = terms * col_scale.to(dtype).unsqueeze(-2)
    delta = terms.sum(1)
    if left is not None and right is not None:
        delta = delta + left.to(dtype) @ right.to(dtype)
    return delta


def slot_of_row(tenant: Tensor | None, rows: int) -> Tensor:
    """The slot of each of M flattened rows, int64 [M]: row m belongs to entry m // (M // R); without an index, 0."""
    if tenant is None:
        return torch.zeros(rows, dtype=torch.int64)
    return tenant.long().repeat_interleave(rows // tenant.numel())


def delta_linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    tenant: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`x @ delta.T` with each row's own delta; rows at an index that is not a slot get exact zeros.

    Args:
        x: [*, K].  tenant: int32 [R] or None (slot 0 for every row).  The rest as in `delta_weight`.
        dtype: of the arithmetic; the result keeps it.

    Returns:
        [*, N] in `dtype`.
    """
    features = x.shape[-1]
    delta = delta_weight(signs, row_scale, col_scale, left, right, features, dtype)  # [T, N, K]
    flat = x.reshape(-1, features).to(dtype)
    slots = slot_of_row(tenant, flat.shape[0])
    out = torch.zeros(flat.shape[0], delta.shape[1], dtype=dtype)
    for slot in range(delta.shape[0]):
        mine = slots == slot
        out[mine] = flat[mine] @ delta[slot].T
    return out.reshape(*x.shape[:-1], delta.shape[1])


def delta_embedding(
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    tenant: Tensor | None = None,
    *,
    embedding_dim: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`delta[slot, id]` with each id's own slot; entries at an index that is not a slot get exact zeros.

    Args:
        ids: int64 or int32 [*].  embedding_dim: K.  The rest as in `delta_linear`.

    Returns:
        [*, K] in `dtype`.
    """
    delta = delta_weight(signs, row_scale, col_scale, left, right, embedding_dim, dtype)  # [T, N, K]
    flat = ids.reshape(-1).long()
    slots = slot_of_row(tenant, flat.shape[0])
    out = torch.zeros(flat.shape[0], embedding_dim, dtype=dtype)
    for slot in range(delta.shape[0]):
        mine = slots == slot
        out[mine] = delta[slot][flat[mine]]
    return out.reshape(*ids.shape, embedding_dim)
