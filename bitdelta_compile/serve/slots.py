"""The tensors of one parameter's slots: made, filled, copied into wider ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..encodings import Dense, Encoding, Matrix, Rows, Same, Sign
from ..kernels.configs import device_layout
from ..kernels.layout import packed_shape, to_layout
from ..quantized import values
from ..stack import Stack
from .reserve import Reserve


def allocate(base: Tensor, reserve: Reserve, slots: int, transposed: bool) -> Stack | None:
    """The tensors of one parameter's slots, with no tenant in any; None for no room. They outlive a
    torch.inference_mode that this is called under."""
    with torch.inference_mode(False), torch.no_grad():
        return _allocate(base, reserve, slots, transposed)


def _allocate(base: Tensor, reserve: Reserve, slots: int, transposed: bool) -> Stack | None:
    shape, dtype, device = tuple(base.shape), base.dtype, base.device
    if reserve == Reserve():
        return None
    if reserve.small:
        small = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
        small[slots].copy_(values(base.detach()))
        return Stack(shape, dtype, small=small)
    outputs, features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    tensors: dict[str, Any] = {}
    if reserve.planes:
        sizes = packed_shape(outputs, features, device_layout(device))
        tensors["signs"] = torch.zeros(slots, reserve.planes, *sizes, dtype=torch.int32, device=device)
        tensors["row_scale"] = torch.zeros(slots, reserve.planes, outputs, device=device)
        if reserve.col_scale:
            tensors["col_scale"] = torch.zeros(slots, reserve.planes, features, device=device)
        if reserve.rank:
            tensors["left"] = torch.zeros(slots, outputs, reserve.rank, dtype=torch.bfloat16, device=device)
            tensors["right"] = torch.zeros(slots, reserve.rank, features, dtype=torch.bfloat16, device=device)
    largest = max(reserve.out_features, outputs)
    if reserve.rows:
        tensors["rows_index"] = torch.full((slots, reserve.rows), largest, dtype=torch.int64, device=device)
        tensors["rows_values"] = torch.zeros(slots, reserve.rows, features, dtype=dtype, device=device)
    if reserve.out_features > outputs:
        tensors["vocabulary"] = torch.full((slots + 1,), outputs, dtype=torch.int64, device=device)
    if reserve.dense:
        tensors["dense"] = torch.zeros(reserve.dense, outputs, features, dtype=dtype, device=device)
        tensors["place"] = torch.full((slots,), -1, dtype=torch.int64, device=device)
    more = largest if reserve.rows or reserve.out_features > outputs else 0
    return Stack(shape, dtype, transposed, out_features=more, **tensors)


def room(stack: Stack | None) -> Reserve:
    """What a slot has room for."""
    if stack is None:
        return Reserve()
    if stack.small is not None:
        return Reserve(small=True)
    return Reserve(
        planes=stack.planes,
        col_scale=stack.col_scale is not None,
        rank=stack.rank,
        rows=stack.stored_rows,
        out_features=stack.out_features if stack.grown else 0,
        dense=0 if stack.dense is None else stack.dense.shape[0],
    )


def free_dense(stack: Stack, used: Iterable[int]) -> int | None:
    """An entry for a dense matrix that none of these slots has; None where there is none."""
    if stack.dense is None or stack.place is None:
        return None
    taken = {int(stack.place[slot]) for slot in used}
    return next((entry for entry in range(stack.dense.shape[0]) if entry not in taken), None)


def lacks(
    stack: Stack | None, encoding: Encoding, base: Tensor, used: Iterable[int], *, oriented: bool = True
) -> list[str]:
    """What an encoding needs and a slot has no room for, in words.

    Args:
        used: slots whose dense matrices stay.
        oriented: whether the matrix is stored [N, K] or [K, N] is settled.
    """
    there, needed = room(stack), Reserve.needed(encoding, base)
    if needed.dense and stack is not None and there.dense and free_dense(stack, used) is None:
        needed = dataclasses.replace(needed, dense=there.dense + 1)
    found = there.lacks(needed)
    if stack is not None and stack.small is None and oriented and isinstance(encoding, Matrix):
        found += [f"transposed={encoding.transposed}"] if encoding.transposed != stack.transposed else []
    return found


def write(stack: Stack, slot: int, encoding: Encoding | None, base: Tensor, dense: int | None) -> None:
    """Fill one slot of one parameter; None and `same` are the base's tensor."""
    if stack.small is not None:
        value = values(base.detach())
        stack.small[slot].copy_(value if encoding is None or isinstance(encoding, Same) else encoding.apply(value))
        return
    sign = encoding.over if isinstance(encoding, Rows) else encoding
    sign = sign if isinstance(sign, Sign) else None
    if stack.signs is not None and stack.row_scale is not None:
        planes = 0 if sign is None else sign.planes
        stack.row_scale[slot, planes:].zero_()
        if stack.col_scale is not None:
            stack.col_scale[slot].fill_(1.0)
        if stack.left is not None and stack.right is not None:
            stack.left[slot].zero_()
            stack.right[slot].zero_()
        if sign is not None:
            signs = sign.signs.to(stack.signs.device)
            stack.signs[slot, :planes].copy_(to_layout(signs, sign.in_features, stack.sign_layout))
            stack.row_scale[slot, :planes].copy_(sign.row_scale)
            if sign.col_scale is not None:
                assert stack.col_scale is not None
                stack.col_scale[slot, :planes].copy_(sign.col_scale)
            if sign.left is not None and sign.right is not None:
                assert stack.left is not None
                assert stack.right is not None
                stack.left[slot, :, : sign.rank].copy_(sign.left)
                stack.right[slot, : sign.rank].copy_(sign.right)
    rows = encoding if isinstance(encoding, Rows) else None
    if stack.rows_index is not None and stack.rows_values is not None:
        count = 0 if rows is None else rows.index.numel()
        stack.rows_index[slot, count:].fill_(stack.out_features)
        stack.rows_values[slot, count:].zero_()
        if rows is not None:
            stack.rows_index[slot, :count].copy_(rows.index)
            stack.rows_values[slot, :count].copy_(rows.values)
    if stack.vocabulary is not None:
        stack.vocabulary[slot] = stack.base_rows if rows is None else rows.out_features
    if stack.place is not None and stack.dense is not None:
        stack.place[slot] = -1
        if isinstance(encoding, Dense):
            assert dense is not None
            value = encoding.value.T if stack.transposed else encoding.value
            stack.dense[dense].copy_(value)
            stack.place[slot] = dense


def copy(old: Stack | None, new: Stack, slot: int, base: Tensor, dense: int | None) -> None:
    """Fill one slot of wider tensors with what it held in narrower ones; `dense` is a free entry of new's."""
    write(new, slot, None, base, None)
    if old is None:
        return
    if old.small is not None or new.small is not None:
        if old.small is not None and new.small is not None:
            new.small[slot].copy_(old.small[slot])
        return
    for field in ("signs", "row_scale", "col_scale", "left", "right", "rows_values"):
        theirs, ours = getattr(old, field), getattr(new, field)
        if theirs is not None:
            ours[slot][tuple(slice(0, size) for size in theirs.shape[1:])].copy_(theirs[slot])
    if old.rows_index is not None:
        assert new.rows_index is not None
        index = old.rows_index[slot]
        index = torch.where(index == old.out_features, new.out_features, index)
        new.rows_index[slot, : index.numel()].copy_(index)
    if old.vocabulary is not None:
        assert new.vocabulary is not None
        new.vocabulary[slot] = old.vocabulary[slot]
    if old.place is not None and old.dense is not None and int(old.place[slot]) >= 0:
        assert new.dense is not None
        assert new.place is not None
        assert dense is not None
        new.dense[dense].copy_(old.dense[int(old.place[slot])])
        new.place[slot] = dense
