"""The eager kernels of the ops: plain PyTorch on any device, unpacking at most `BLOCK` signs at a time, and on a GPU
ours of `device` where there is one.

What they compute for a row does not depend on the row index of the others: every product covers all rows, and the rows
of the slot are selected afterwards. Shapes and semantics are those of `ops`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import CANONICAL, check_bank, from_layout, unpack_signs
from . import device

BLOCK = 1 << 20  # signs unpacked at a time: 4 MB in fp32


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check(
    features: int,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
) -> None:
    check_bank(signs, row_scale, col_scale, left, right, features, layout)
    if tenant is not None and (tenant.dim() != 1 or tenant.dtype != torch.int32):
        raise ValueError(f"the row index must be int32 [R], got {tenant.dtype} {list(tenant.shape)}")
    if tenant is None and signs.shape[0] != 1:
        raise ValueError(f"{signs.shape[0]} slots need a row index that says which row uses which")


def check_rows(rows: Any, tenant: Tensor | None) -> None:
    """Refuse rows that the row index cannot divide, where both counts are known; compiled code gives them the base."""
    length = None if tenant is None else tenant.shape[0]
    if isinstance(rows, int) and isinstance(length, int) and rows and (length == 0 or rows % length):
        raise ValueError(f"{rows} rows cannot be divided among {length} row-index entries")


def _entries(rows: int, slots: int, tenant: Tensor | None, device: torch.device) -> Tensor | None:
    """The slot of each flattened row, int64 [M], -1 where it is none; None when all rows use slot 0."""
    if tenant is None:
        return None
    check_rows(rows, tenant)
    entry = tenant.to(device=device, dtype=torch.int64)
    entry = torch.where((entry >= 0) & (entry < slots), entry, -1)
    return entry.repeat_interleave(rows // tenant.numel())


def _slots(entries: Tensor | None, slots: int) -> Iterator[tuple[int, Tensor | None]]:
    """Each slot in use with the mask [M, 1] of its rows (None: all rows)."""
    if entries is None:
        yield 0, None
        return
    for slot in range(slots):
        mine = entries == slot
        if mine.is_cuda or bool(mine.any()):  # asking a GPU would stop it, and no graph could capture that
            yield slot, mine.unsqueeze(-1)


def _blocks(signs: Tensor, features: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Signs of one slot and plane, int32 [N, W], as blocks of output rows: (rows, +-1 [n, K])."""
    step = max(1, BLOCK // max(1, features))
    for start in range(0, signs.shape[0], step):
        rows = slice(start, min(start + step, signs.shape[0]))
        yield rows, unpack_signs(signs[rows], features, dtype)


def delta_linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
    exact: bool = False,
) -> Tensor:
    """See `ops.delta_linear`."""
    features = x.shape[-1]
    check(features, signs, row_scale, col_scale, left, right, tenant, layout)
    if x.is_cuda or layout != CANONICAL:
        check_rows(x.numel() // max(features, 1), tenant)
        found = device.delta_linear(x, signs, row_scale, col_scale, left, right, tenant, layout, exact)
        if found is not None:
            return found
        signs = from_layout(signs, row_scale.shape[2], features, layout)
    dtype = _accumulation_dtype(x.dtype)
    flat = x.reshape(-1, features).to(dtype)
    rows, (slots, planes, outputs, _) = flat.shape[0], signs.shape
    out = flat.new_zeros(rows, outputs)
    if not rows:
        return out.to(x.dtype).reshape(*x.shape[:-1], outputs)
    for slot, mine in _slots(_entries(rows, slots, tenant, x.device), slots):
        y = torch.zeros_like(out)
        for plane in range(planes):
            scaled = flat if col_scale is None else flat * col_scale[slot, plane].to(dtype)
            for block, values in _blocks(signs[slot, plane], features, dtype):
                y[:, block] += (scaled @ values.T) * row_scale[slot, plane, block].to(dtype)
        if left is not None and right is not None:
            y += (flat @ right[slot].to(dtype).T) @ left[slot].to(dtype).T
        out = y if mine is None else torch.where(mine, y, out)
    return out.to(x.dtype).reshape(*x.shape[:-1], outputs)


def delta_linear_backward(
    grad: Tensor,
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.delta_linear_backward`."""
    features = x.shape[-1]
    check(features, signs, row_scale, col_scale, left, right, tenant, layout)
    signs = from_layout(signs, row_scale.shape[2], features, layout)
    dtype = _accumulation_dtype(x.dtype)
    flat = x.reshape(-1, features).to(dtype)
    rows, (slots, planes, outputs, _) = flat.shape[0], signs.shape
    upstream = grad.reshape(rows, outputs).to(dtype)
    d_x = torch.zeros_like(flat)
    d_row, d_col, d_left, d_right = (zeros_or_empty(t, row_scale, dtype) for t in (row_scale, col_scale, left, right))
    for slot, mine in _slots(_entries(rows, slots, tenant, x.device) if rows else None, slots):
        mine_grad = upstream if mine is None else torch.where(mine, upstream, 0)
        mine_x = flat if mine is None else torch.where(mine, flat, 0)
        for plane in range(planes):
            column = None if col_scale is None else col_scale[slot, plane].to(dtype)
            scaled = mine_x if column is None else mine_x * column
            share = torch.zeros_like(flat)
            for block, values in _blocks(signs[slot, plane], features, dtype):
                d_row[slot, plane, block] += (mine_grad[:, block] * (scaled @ values.T)).sum(0)
                share += (mine_grad[:, block] * row_scale[slot, plane, block].to(dtype)) @ values
            if column is not None:
                d_col[slot, plane] += (mine_x * share).sum(0)
                share = share * column
            d_x += share
        if left is not None and right is not None:
            inner = mine_grad @ left[slot].to(dtype)
            d_x += inner @ right[slot].to(dtype)
            d_left[slot] += mine_grad.T @ (mine_x @ right[slot].to(dtype).T)
            d_right[slot] += inner.T @ mine_x
    d_x = d_x.to(x.dtype).reshape(x.shape)
    scales = _as_inputs((d_row, d_col, d_left, d_right), (row_scale, col_scale, left, right))
    return d_x, scales[0], scales[1], scales[2], scales[3]


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
    layout: str,
) -> Tensor:
    """See `ops.delta_embedding`."""
    check(embedding_dim, signs, row_scale, col_scale, left, right, tenant, layout)
    if signs.is_cuda or layout != CANONICAL:
        check_rows(ids.numel(), tenant)
        found = device.delta_embedding(
            ids, signs, row_scale, col_scale, left, right, tenant, embedding_dim, dtype, layout
        )
        if found is not None:
            return found
        signs = from_layout(signs, row_scale.shape[2], embedding_dim, layout)
    slot, row, valid = _lookup(ids, signs, tenant)
    wide = _accumulation_dtype(dtype)
    y = _embedding_terms(signs, row_scale, col_scale, slot, row, embedding_dim, wide).sum(1)
    if left is not None and right is not None:
        y = y + torch.einsum("mr,mrk->mk", left[slot, row].to(wide), right[slot].to(wide))
    y = torch.where(valid.unsqueeze(-1), y, 0).to(dtype)
    return y.reshape(*ids.shape, embedding_dim)


def delta_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.delta_embedding_backward`."""
    features = grad.shape[-1]
    check(features, signs, row_scale, col_scale, left, right, tenant, layout)
    signs = from_layout(signs, row_scale.shape[2], features, layout)
    slot, row, valid = _lookup(ids, signs, tenant)
    dtype = _accumulation_dtype(grad.dtype)
    upstream = torch.where(valid.unsqueeze(-1), grad.reshape(-1, features).to(dtype), 0)  # [M, K]
    d_row, d_col, d_left, d_right = (zeros_or_empty(t, row_scale, dtype) for t in (row_scale, col_scale, left, right))
    every = torch.arange(signs.shape[1], device=ids.device)
    unscaled = _embedding_terms(signs, None, col_scale, slot, row, features, dtype)  # [M, P, K]
    d_row.index_put_(
        (slot[:, None], every[None, :], row[:, None]), (unscaled * upstream[:, None]).sum(-1), accumulate=True
    )
    if col_scale is not None:
        terms = _embedding_terms(signs, row_scale, None, slot, row, features, dtype)
        d_col.index_put_((slot[:, None], every[None, :]), terms * upstream[:, None], accumulate=True)
    if left is not None and right is not None:
        d_left.index_put_((slot, row), torch.einsum("mk,mrk->mr", upstream, right[slot].to(dtype)), accumulate=True)
        outer = left[slot, row].to(dtype)[:, :, None] * upstream[:, None, :]
        d_right.index_put_((slot,), outer, accumulate=True)
    scales = _as_inputs((d_row, d_col, d_left, d_right), (row_scale, col_scale, left, right))
    return scales[0], scales[1], scales[2], scales[3]


def _lookup(ids: Tensor, signs: Tensor, tenant: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(slot, row, valid), each [M], of flattened ids; slot is clamped to 0 where it is not valid."""
    row = ids.reshape(-1).long()
    entries = _entries(row.numel(), signs.shape[0], tenant, ids.device) if row.numel() else None
    if entries is None:
        return torch.zeros_like(row), row, torch.ones_like(row, dtype=torch.bool)
    valid = entries >= 0
    return torch.where(valid, entries, 0), row, valid


def _embedding_terms(
    signs: Tensor,
    row_scale: Tensor | None,
    col_scale: Tensor | None,
    slot: Tensor,
    row: Tensor,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Signs times the given scales of the looked-up rows, per plane: [M, P, K]."""
    every = torch.arange(signs.shape[1], device=signs.device)
    terms = unpack_signs(signs[slot[:, None], every, row[:, None]], features, dtype)
    if row_scale is not None:
        terms = terms * row_scale[slot[:, None], every, row[:, None]].to(dtype).unsqueeze(-1)
    if col_scale is not None:
        terms = terms * col_scale[slot].to(dtype)
    return terms


def zeros_or_empty(like: Tensor | None, device_of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if like is None:
        return device_of.new_empty(0)
    return like.new_zeros(like.shape, dtype=dtype or like.dtype)


def _as_inputs(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))
