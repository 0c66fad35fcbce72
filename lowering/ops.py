"""The op surface: `bitdelta::delta_linear`, `bitdelta::delta_embedding`, their eager and fake kernels, their gradients.

Sizes: M rows, N out, K in, T slots, P planes, W = ceil(K / 32) words, R row-index length, r rank. Every op takes the
tensors of one parameter, stacked over slots: signs int32 [T, P, N, W], row_scale fp32 [T, P, N], col_scale fp32
[T, P, K] or None, left bf16 [T, N, r] and right bf16 [T, r, K] or None; and the row index tenant int32 [R] or None,
which means slot 0. Row m of the M flattened rows belongs to entry m // (M // R); an entry that is not a slot (-1 is
the base) gets exact zeros.

The eager kernels here run on any device. They unpack at most `BLOCK` signs at a time, and what they compute for a row
does not depend on the row index of the others: every product covers all rows, and the rows of the slot are selected
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import CANONICAL, check_bank, unpack_signs

BLOCK = 1 << 20  # signs unpacked at a time: 4 MB in fp32


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(
    features: int,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
) -> None:
    if layout != CANONICAL:
        raise ValueError(f"unknown sign layout {layout!r}: this build has {CANONICAL!r}")
    check_bank(signs, row_scale, col_scale, left, right, features)
    if tenant is not None and (tenant.dim() != 1 or tenant.dtype != torch.int32):
        raise ValueError(f"the row index must be int32 [R], got {tenant.dtype} {list(tenant.shape)}")
    if tenant is None and signs.shape[0] != 1:
        raise ValueError(f"{signs.shape[0]} slots need a row index that says which row uses which")


def _entries(rows: int, slots: int, tenant: Tensor | None, device: torch.device) -> Tensor | None:
    """The slot of each flattened row, int64 [M], -1 where it is none; None when all rows use slot 0."""
    if tenant is None:
        return None
    length = tenant.numel()
    if length == 0 or rows % length:
        raise ValueError(f"{rows} rows cannot be divided among {length} row-index entries")
    entry = tenant.to(device=device, dtype=torch.int64)
    entry = torch.where((entry >= 0) & (entry < slots), entry, -1)
    return entry.repeat_interleave(rows // length)


def _slots(entries: Tensor | None, slots: int) -> Iterator[tuple[int, Tensor | None]]:
    """Each slot in use with the mask [M, 1] of its rows (None: all rows)."""
    if entries is None:
        yield 0, None
        return
    for slot in range(slots):
        mine = entries == slot
        if bool(mine.any()):
            yield slot, mine.unsqueeze(-1)


def _blocks(signs: Tensor, features: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Signs of one slot and plane, int32 [N, W], as blocks of output rows: (rows, +-1 [n, K])."""
    step = max(1, BLOCK // max(1, features))
    for start in range(0, signs.shape[0], step):
        rows = slice(start, min(start + step, signs.shape[0]))
        yield rows, unpack_signs(signs[rows], features, dtype)


@torch.library.custom_op("bitdelta::delta_linear", mutates_args=())
def delta_linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> Tensor:
    """The delta's share of a linear layer, each row with its own delta.

    Semantics:
        delta = (unpack(signs) * row_scale[..., None] * col_scale[..., None, :]).sum(1) + left @ right  # [T, N, K]
        y[m] = x[m] @ delta[slot(m)].T                                              # zeros without a slot

    Args:
        x: [*, K], any float dtype; products are accumulated in fp32 (fp64 for fp64).
        signs, row_scale, col_scale, left, right, tenant: see the module docstring.
        layout: name of the sign layout; "canonical" is the only one so far.

    Returns:
        [*, N] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown layout, rows that the row index cannot divide.

    Source: BitDelta, arXiv 2402.10193, equations 1 and 2; per-row and per-column scales after arXiv 2512.19720.
    """
    features = x.shape[-1]
    _check(features, signs, row_scale, col_scale, left, right, tenant, layout)
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


@delta_linear.register_fake
def _(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> Tensor:
    _check(x.shape[-1], signs, row_scale, col_scale, left, right, tenant, layout)
    return x.new_empty(*x.shape[:-1], signs.shape[2])


@torch.library.custom_op("bitdelta::delta_linear_backward", mutates_args=())
def delta_linear_backward(
    grad: Tensor,
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `delta_linear`: of x [*, K], row_scale, col_scale, left, right (empty where the input is None).

    Semantics, for the rows m of slot t:
        d_x[m] = sum_p ((grad[m] * row_scale[t, p]) @ sign[t, p]) * col_scale[t, p] + grad[m] @ left[t] @ right[t]
        d_row_scale[t, p] = sum_m grad[m] * (sign[t, p] @ (col_scale[t, p] * x[m]))
        d_col_scale[t, p] = sum_m x[m] * ((grad[m] * row_scale[t, p]) @ sign[t, p])
        d_left[t] = sum_m grad[m] (x[m] @ right[t].T)^T,   d_right[t] = sum_m (grad[m] @ left[t])^T x[m]
    """
    features = x.shape[-1]
    _check(features, signs, row_scale, col_scale, left, right, tenant, layout)
    dtype = _accumulation_dtype(x.dtype)
    flat = x.reshape(-1, features).to(dtype)
    rows, (slots, planes, outputs, _) = flat.shape[0], signs.shape
    upstream = grad.reshape(rows, outputs).to(dtype)
    d_x = torch.zeros_like(flat)
    d_row, d_col, d_left, d_right = (_zeros_or_empty(t, row_scale, dtype) for t in (row_scale, col_scale, left, right))
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
    return d_x, *_as_inputs((d_row, d_col, d_left, d_right), (row_scale, col_scale, left, right))


@delta_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return d_x, *(_zeros_or_empty(t, row_scale) for t in (row_scale, col_scale, left, right))


@torch.library.custom_op("bitdelta::delta_embedding", mutates_args=())
def delta_embedding(
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    embedding_dim: int,
    dtype: torch.dtype,
    layout: str = "canonical",
) -> Tensor:
    """The delta's share of an embedding lookup; only the rows that are looked up are unpacked.

    Semantics:
        delta as in `delta_linear`, with N the vocabulary and K = embedding_dim
        y[m] = delta[slot(m), ids[m]]                                               # zeros without a slot

    Args:
        ids: int [*], each in [0, N).
        signs, row_scale, col_scale, left, right, tenant: see the module docstring.
        embedding_dim: K.
        dtype: of the result.
        layout: name of the sign layout.

    Returns:
        [*, K] in `dtype`.
    """
    _check(embedding_dim, signs, row_scale, col_scale, left, right, tenant, layout)
    slot, row, valid = _lookup(ids, signs, tenant)
    wide = _accumulation_dtype(dtype)
    y = _embedding_terms(signs, row_scale, col_scale, slot, row, embedding_dim, wide).sum(1)
    if left is not None and right is not None:
        y = y + torch.einsum("mr,mrk->mk", left[slot, row].to(wide), right[slot].to(wide))
    y = torch.where(valid.unsqueeze(-1), y, 0).to(dtype)
    return y.reshape(*ids.shape, embedding_dim)


@delta_embedding.register_fake
def _(
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    embedding_dim: int,
    dtype: torch.dtype,
    layout: str = "canonical",
) -> Tensor:
    _check(embedding_dim, signs, row_scale, col_scale, left, right, tenant, layout)
    return row_scale.new_empty(*ids.shape, embedding_dim, dtype=dtype)


@torch.library.custom_op("bitdelta::delta_embedding_backward", mutates_args=())
def delta_embedding_backward(
    grad: Tensor,
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `delta_embedding`: of row_scale, col_scale, left, right (empty where the input is None)."""
    features = grad.shape[-1]
    _check(features, signs, row_scale, col_scale, left, right, tenant, layout)
    slot, row, valid = _lookup(ids, signs, tenant)
    dtype = _accumulation_dtype(grad.dtype)
    upstream = torch.where(valid.unsqueeze(-1), grad.reshape(-1, features).to(dtype), 0)  # [M, K]
    d_row, d_col, d_left, d_right = (_zeros_or_empty(t, row_scale, dtype) for t in (row_scale, col_scale, left, right))
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
    d_row, d_col, d_left, d_right = _as_inputs((d_row, d_col, d_left, d_right), (row_scale, col_scale, left, right))
    return d_row, d_col, d_left, d_right


@delta_embedding_backward.register_fake
def _(
    grad: Tensor,
    ids: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_row, d_col, d_left, d_right = (_zeros_or_empty(t, row_scale) for t in (row_scale, col_scale, left, right))
    return d_row, d_col, d_left, d_right


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


def _zeros_or_empty(like: Tensor | None, device_of: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    if like is None:
        return device_of.new_empty(0)
    return like.new_zeros(like.shape, dtype=dtype or like.dtype)


def _as_inputs(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(g if t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


def _optional_grads(grads: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else g for g, t in zip(grads, inputs, strict=True))


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.layout = keyword_only_inputs["layout"]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, signs, row_scale, col_scale, left, right, tenant = ctx.saved_tensors
    d_x, *scales = torch.ops.bitdelta.delta_linear_backward(
        grad, x, signs, row_scale, col_scale, left, right, tenant, layout=ctx.layout
    )
    return (d_x, None, *_optional_grads(tuple(scales), (row_scale, col_scale, left, right)), None)


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ids, signs, row_scale, col_scale, left, right, tenant = ctx.saved_tensors
    scales = torch.ops.bitdelta.delta_embedding_backward(
        grad, ids, signs, row_scale, col_scale, left, right, tenant, layout=ctx.layout
    )
    return (None, None, *_optional_grads(tuple(scales), (row_scale, col_scale, left, right)), None)


delta_linear.register_autograd(_linear_backward, setup_context=_save_for_linear)
delta_embedding.register_autograd(_embedding_backward, setup_context=_save_for_linear)
