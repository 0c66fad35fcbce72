"""The op surface: `bitdelta::delta_linear`, `bitdelta::delta_embedding`, their eager and fake kernels, their gradients.

Sizes: M rows, N out, K in, T slots, P planes, W = ceil(K / 32) words, R row-index length, r rank. Every op takes the
tensors of one parameter, stacked over slots: signs int32 [T, P, N, W], row_scale fp32 [T, P, N], col_scale fp32
[T, P, K] or None, left bf16 [T, N, r] and right bf16 [T, r, K] or None; and the row index tenant int32 [R] or None,
which means slot 0. Row m of the M flattened rows belongs to entry m // (M // R); an entry that is not a slot (-1 is
the base) gets exact zeros.

The eager kernels are in `eager`, what Inductor makes of the ops in `inductor`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import eager


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
    exact: bool = False,
) -> Tensor:
    """The delta's share of a linear layer, each row with its own delta.

    Semantics:
        delta = (unpack(signs) * row_scale[..., None] * col_scale[..., None, :]).sum(1) + left @ right  # [T, N, K]
        y[m] = x[m] @ delta[slot(m)].T                                              # zeros without a slot

    Args:
        x: [*, K], any float dtype; products are accumulated in fp32 (fp64 for fp64).
        signs, row_scale, col_scale, left, right, tenant: see the module docstring.
        layout: name of the layout of signs, "canonical" or that of the GPU kernels; see `kernels.layout`. In another
            than the canonical one signs are [T, P, *packed_shape(N, K, layout)].
        exact: products of x itself, in fp32. Otherwise a kernel may round x to integers of 16 bits for each row, where
            x is bf16: the error is that of rounding the result to bf16; on a GPU to 16 bits where x has no more, else
            to 24. PyTorch's form is always exact.

    Returns:
        [*, N] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown layout, rows that the row index cannot divide.

    Source: BitDelta, arXiv 2402.10193, equations 1 and 2; per-row and per-column scales after arXiv 2512.19720.
    """
    return eager.delta_linear(x, signs, row_scale, col_scale, left, right, tenant, layout, exact)


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
    exact: bool = False,
) -> Tensor:
    eager.check(x.shape[-1], signs, row_scale, col_scale, left, right, tenant, layout)
    eager.check_rows(math.prod(x.shape[:-1]), tenant)
    return x.new_empty(*x.shape[:-1], row_scale.shape[2])


@torch.library.custom_op("bitdelta::base_delta_linear", mutates_args=())
def base_delta_linear(
    x: Tensor,
    weight: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
    exact: bool = False,
) -> Tensor:
    """A linear layer of the base and its delta; only Inductor's graphs hold it, see `fusion`.

    Semantics:
        y = linear(x, weight) + delta_linear(x, signs, row_scale, col_scale, left, right, tenant)

    Args:
        weight: [N, K], of x's dtype.  The rest as in `delta_linear`.
    """
    base = torch.nn.functional.linear(x, weight)
    return base + eager.delta_linear(x, signs, row_scale, col_scale, left, right, tenant, layout, exact)


@base_delta_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    *,
    layout: str = "canonical",
    exact: bool = False,
) -> Tensor:
    return torch.ops.bitdelta.delta_linear(  # type: ignore[no-any-return]
        x, signs, row_scale, col_scale, left, right, tenant, layout=layout, exact=exact
    )


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
    return eager.delta_linear_backward(grad, x, signs, row_scale, col_scale, left, right, tenant, layout)


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
    d_row, d_col, d_left, d_right = (eager.zeros_or_empty(t, row_scale) for t in (row_scale, col_scale, left, right))
    return d_x, d_row, d_col, d_left, d_right


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

    Raises:
        ValueError: as `delta_linear`.  IndexError: an id past N.
    """
    return eager.delta_embedding(ids, signs, row_scale, col_scale, left, right, tenant, embedding_dim, dtype, layout)


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
    eager.check(embedding_dim, signs, row_scale, col_scale, left, right, tenant, layout)
    eager.check_rows(ids.numel(), tenant)
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
    return eager.delta_embedding_backward(grad, ids, signs, row_scale, col_scale, left, right, tenant, layout)


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
    d_row, d_col, d_left, d_right = (eager.zeros_or_empty(t, row_scale) for t in (row_scale, col_scale, left, right))
    return d_row, d_col, d_left, d_right


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
