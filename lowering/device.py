"""Where the eager ops and the fit run on a GPU: our Triton kernels, or nothing, and then plain PyTorch does it.

triton is imported at the first call that can use it, never with the package.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from ..kernels import configs
from ..kernels.layout import FRAGMENTS

log = logging.getLogger(__name__)


def delta_linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    layout: str,
    exact: bool,
) -> Tensor | None:
    """`ops.delta_linear` by a kernel of ours; None where there is none for these tensors."""
    slots, _, outputs = row_scale.shape
    features = x.shape[-1]
    rows = x.numel() // features if features else 0
    arch = architecture(x.device)
    plan = configs.choose(
        arch, rows, slots, outputs, features, x.dtype, column=col_scale is not None, exact=exact, layout=layout
    )
    if plan is None or (kernels := _kernels("delta_linear")) is None:
        _log_fallback()
        return None
    with torch.cuda.device(x.device):
        found: Tensor = kernels.delta_linear(x, *_prepared(signs, row_scale, col_scale, left, right, tenant), plan)
    return found


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
) -> Tensor | None:
    """`ops.delta_embedding` by a kernel of ours; None where there is none for these tensors."""
    arch = architecture(signs.device)
    plan = configs.choose(
        arch, ids.numel(), row_scale.shape[0], row_scale.shape[2], embedding_dim, dtype,
        column=col_scale is not None, layout=layout,
    )  # fmt: skip
    if plan is None or (kernels := _kernels("delta_embedding")) is None:
        _log_fallback()
        return None
    tensors = _prepared(signs, row_scale, col_scale, left, right, tenant)
    with torch.cuda.device(signs.device):
        found: Tensor = kernels.delta_embedding(ids, *tensors, embedding_dim, dtype)
    return found


def column_kernels(device: torch.device) -> ModuleType | None:
    """`kernels.columns` where it runs, for fitting; None elsewhere."""
    return _kernels("columns") if configs.has_kernels(architecture(device)) else None


@functools.cache
def architecture(device: torch.device) -> str | int | None:
    return configs.architecture(device)


def _prepared(
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The tensors as the kernels read them: contiguous, scales in fp32."""
    scales = (None if scale is None else scale.float().contiguous() for scale in (row_scale, col_scale))
    rest = (None if tensor is None else tensor.contiguous() for tensor in (left, right, tenant))
    return (signs.contiguous(), *scales, *rest)


@functools.cache
def _kernels(name: str) -> ModuleType | None:
    """The module of launchers, or None on a machine where triton does not import."""
    import importlib

    try:
        return importlib.import_module(f"bitdelta_compile.kernels.{name}")
    except ImportError:
        return None


@functools.cache
def _log_fallback() -> None:
    """Say once per process that PyTorch does what our kernels cannot."""
    log.warning(
        "plain PyTorch unpacks the signs: our kernels need triton, an NVIDIA GPU of compute capability 8.0 or more or "
        "an AMD one, fp32, bf16 or fp16, and signs in the layout %s",
        FRAGMENTS,
    )
