"""What changed between two tensors of one name, read block by block so that mapped files are never copied."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import BitDeltaError
from .fit import BLOCK_ELEMENTS


@dataclasses.dataclass(frozen=True)
class Change:
    """How a tuned tensor differs from its base.

    Attributes:
        shape: of the base's tensor.
        equal: same shape, and the base in the tuned dtype has the same values.
        rows, columns: indices, int64, of the rows and columns that differ within what both have; empty unless both
            are matrices.
    """

    shape: tuple[int, ...]
    equal: bool
    rows: Tensor
    columns: Tensor


def row_blocks(tensor: Tensor) -> list[slice]:
    """Slices of the first dimension that hold about BLOCK_ELEMENTS each; none for a scalar."""
    height = max(1, BLOCK_ELEMENTS // max(1, tensor[0].numel())) if tensor.dim() and tensor.shape[0] else 1
    return [slice(first, first + height) for first in range(0, tensor.shape[0] if tensor.dim() else 0, height)]


def check_finite(name: str, tensor: Tensor, owner: str) -> None:
    """Raise BitDeltaError naming the parameter unless every value is finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    whole = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    bad = sum(int((~torch.isfinite(whole[block].float())).sum()) for block in row_blocks(whole))
    if bad:
        raise BitDeltaError(
            f"{name}: {bad} of {tensor.numel()} values of the {owner} parameter are NaN or infinite; "
            "a delta of such weights has no meaning, repair the checkpoint first"
        )


def compare(base: Tensor, tuned: Tensor) -> Change:
    """Block by block, so that two mapped tensors are never copied."""
    none = torch.zeros(0, dtype=torch.int64)
    base, tuned, shape = base.detach(), tuned.detach(), tuple(base.shape)
    if base.dim() != tuned.dim() or (base.dim() != 2 and base.shape != tuned.shape):
        return Change(shape, False, none, none)
    if base.dim() != 2:
        return Change(shape, bool((base.to(tuned.device, tuned.dtype) == tuned).all()), none, none)
    height, width = (min(a, b) for a, b in zip(base.shape, tuned.shape, strict=True))
    rows = torch.zeros(height, dtype=torch.bool)
    columns = torch.zeros(width, dtype=torch.bool, device=tuned.device)
    equal_shape = shape == tuple(tuned.shape)
    base, tuned = base[:height, :width], tuned[:height, :width]
    for block in row_blocks(tuned):
        differs = base[block].to(tuned.device, tuned.dtype) != tuned[block]
        rows[block] = differs.any(-1).cpu()
        columns |= differs.any(0)
    equal = equal_shape and not bool(rows.any())
    return Change(shape, equal, rows.nonzero().flatten(), columns.cpu().nonzero().flatten())
