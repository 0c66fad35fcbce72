"""Ops of the rewritten graph that are written in terms of others: stored rows, dense tensors, values chosen per row.

They give the printed graph one node per thing that happens, and tracing takes them apart again, so no compiler has to
know them. Sizes are those of `ops`; C is the number of rows that a slot can store, D the number of dense tensors. An
operand that carries the batch has it in front: entry r of the row index speaks for the r-th of R equal parts of it.
Entries that are no slot (-1 is the base) take the base's value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("bitdelta", "FRAGMENT")


def _composite(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _LIBRARY.define(function.__name__ + schema)
        _LIBRARY.impl(function.__name__, function, "CompositeImplicitAutograd")
        return function

    return register


def _slot(tenant: Tensor | None, slots: int, missing: int, device: torch.device) -> Tensor:
    """The slot of every entry, int64 [R]; `missing` where there is none. Without a row index, slot 0."""
    if tenant is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    return torch.where((tenant >= 0) & (tenant < slots), tenant, missing).to(torch.int64)


def _parts(value: Tensor, entries: Tensor) -> Tensor:
    """[*, K] -> [R, rows of one entry, K]."""
    return value.reshape(entries.shape[0], -1, value.shape[-1])


@_composite("(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear whose weight brings its own: a quantized base's, which an exported program keeps whole.

    `aten.linear` would be taken apart before such a weight sees it.

    Semantics:
        y = F.linear(x, weight, bias)                                       # as the class of weight defines it

    Args:
        x: [*, K].  weight: [N, K], of any class.  bias: [N] or None.

    Returns:
        [*, N].
    """
    return type(weight).__torch_function__(  # type: ignore[no-any-return]
        torch.nn.functional.linear, (type(weight),), (x, weight, bias), {}
    )


@_composite("(Tensor stack, Tensor tenant) -> Tensor")
def select(stack: Tensor, tenant: Tensor) -> Tensor:
    """A small parameter of every row.

    Semantics:
        y[r] = stack[tenant[r]]                                             # stack[T], the base's own, without a slot

    Args:
        stack: [T + 1, *shape]; the last entry is the base's.
        tenant: int32 [R].

    Returns:
        [R, *shape].
    """
    slots = stack.shape[0] - 1
    return stack.index_select(0, _slot(tenant, slots, slots, stack.device))


@_composite("(Tensor ids, Tensor stack, Tensor tenant) -> Tensor")
def select_embedding(ids: Tensor, stack: Tensor, tenant: Tensor) -> Tensor:
    """A lookup in the small table of every row, without copying tables.

    Args:
        ids: int [*], each in [0, V).  stack: [T + 1, V, K]; the last table is the base's.  tenant: int32 [R].

    Returns:
        [*, K].
    """
    slots, size, features = stack.shape[0] - 1, stack.shape[1], stack.shape[2]
    slot = _slot(tenant, slots, slots, stack.device)
    known = (ids >= 0) & (ids < size)
    flat = (ids.reshape(slot.shape[0], -1) + slot.unsqueeze(1) * size).reshape(ids.shape)
    past = stack.shape[0] * size  # an id outside the table must stay an error, and not reach another slot's table
    return torch.nn.functional.embedding(torch.where(known, flat, past), stack.reshape(-1, features))


@_composite("(Tensor ids, int base_rows, Tensor? vocabulary, Tensor? tenant) -> Tensor")
def known_ids(ids: Tensor, base_rows: int, vocabulary: Tensor | None, tenant: Tensor | None) -> Tensor:
    """Ids to look up in a table that has grown: those that only the delta knows become the base's last.

    Semantics:
        y[m] = min(ids[m], base_rows - 1)   if ids[m] < vocabulary[slot(m)]   else ids[m]     # past it: still an error

    Args:
        ids: int [*].  base_rows: rows of the base's table.
        vocabulary: int64 [T + 1], rows of each slot's table; the last is the base's. None: nothing has grown.
    """
    if vocabulary is None:
        return ids
    slots = vocabulary.shape[0] - 1
    entries = _slot(tenant, slots, slots, ids.device)
    size = vocabulary.index_select(0, entries).unsqueeze(1)
    flat = ids.reshape(entries.shape[0], -1)
    return torch.where(flat < size, flat.clamp(max=base_rows - 1), flat).reshape(ids.shape).to(ids.dtype)


@_composite("(Tensor y, Tensor ids, Tensor index, Tensor values, Tensor? tenant) -> Tensor")
def rows_embedding(y: Tensor, ids: Tensor, index: Tensor, values: Tensor, tenant: Tensor | None) -> Tensor:
    """Rows of a table that are stored outright, over a lookup.

    Semantics:
        y[m] = values[slot(m), c]   where index[slot(m), c] == ids[m]

    Args:
        y: [*, K], what was looked up beneath.  ids: int [*].
        index: int64 [T, C], ascending in every slot, unused places at its end hold a number past every id.
        values: [T, C, K].  tenant: int32 [R] or None (slot 0).
    """
    slots, capacity = index.shape
    entries = _slot(tenant, slots, -1, y.device)
    slot = entries.clamp(min=0)
    flat = ids.reshape(entries.shape[0], -1).to(torch.int64)
    mine = index.index_select(0, slot)
    at = torch.searchsorted(mine, flat).clamp(max=capacity - 1)
    hit = (torch.gather(mine, 1, at) == flat) & (entries >= 0).unsqueeze(1)
    stored = torch.nn.functional.embedding(at + slot.unsqueeze(1) * capacity, values.reshape(-1, values.shape[-1]))
    shape = y.shape
    return torch.where(hit.reshape(ids.shape).unsqueeze(-1), stored.reshape(shape).to(y.dtype), y)


@_composite("(Tensor y, Tensor x, Tensor index, Tensor values, Tensor? tenant, *, SymInt out_features) -> Tensor")
def rows_linear(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    values: Tensor,
    tenant: Tensor | None,
    *,
    out_features: int,
) -> Tensor:
    """Outputs whose weight rows are stored outright, over a linear layer; a matrix that grew has new ones at its end.

    Semantics:
        y = pad(y, to N = out_features)
        y[m, index[slot(m), c]] = x[m] @ values[slot(m), c]

    Args:
        y: [*, at most N], the outputs beneath.  x: [*, K].
        index: int64 [T, C]; unused places hold `out_features`.  values: [T, C, K].  tenant: int32 [R] or None (slot 0).

    Returns:
        [*, N] in y's dtype.
    """
    entries = _slot(tenant, index.shape[0], -1, y.device)
    slot = entries.clamp(min=0)
    at = torch.where((entries >= 0).unsqueeze(1), index.index_select(0, slot), out_features)  # [R, C]
    stored = _parts(x, entries) @ values.index_select(0, slot).mT.to(x.dtype)  # [R, rows, C]
    room = torch.nn.functional.pad(y, (0, out_features + 1 - y.shape[-1]))  # one output more, for the unused places
    flat = room.reshape(entries.shape[0], -1, out_features + 1)
    full = flat.scatter(2, at.unsqueeze(1).expand(-1, flat.shape[1], -1), stored.to(y.dtype))
    return full[..., :out_features].reshape(*y.shape[:-1], out_features)


@_composite("(Tensor y, Tensor x, Tensor dense, Tensor place, Tensor? tenant) -> Tensor")
def dense_linear(y: Tensor, x: Tensor, dense: Tensor, place: Tensor, tenant: Tensor | None) -> Tensor:
    """A linear layer whose matrix some tenants store outright, over what the others compute.

    Semantics:
        y[m] = x[m] @ dense[place[slot(m)]].T   if place[slot(m)] >= 0   else y[m]

    Args:
        y: [*, N].  x: [*, K].  dense: [D, N, K].  place: int64 [T], an entry of dense or -1.
    """
    at = _placed(place, tenant, y.device)
    stored = _parts(x, at) @ dense.index_select(0, at.clamp(min=0)).mT.to(x.dtype)
    return torch.where((at >= 0).reshape(-1, 1, 1), stored.to(y.dtype), _parts(y, at)).reshape(y.shape)


@_composite("(Tensor y, Tensor ids, Tensor dense, Tensor place, Tensor? tenant) -> Tensor")
def dense_embedding(y: Tensor, ids: Tensor, dense: Tensor, place: Tensor, tenant: Tensor | None) -> Tensor:
    """A lookup in a table that some tenants store outright, over what the others look up.

    Args:
        y: [*, K].  ids: int [*], each in [0, V).  dense: [D, V, K].  place: int64 [T], an entry of dense or -1.
    """
    at = _placed(place, tenant, y.device)
    flat = ids.reshape(at.shape[0], -1) + at.unsqueeze(1) * dense.shape[1]
    flat = torch.where((at >= 0).unsqueeze(1), flat, 0)  # other rows' ids may lie past a table that has not grown
    stored = torch.nn.functional.embedding(flat, dense.reshape(-1, dense.shape[-1])).to(y.dtype)
    return torch.where((at >= 0).reshape(-1, 1, 1), stored, _parts(y, at)).reshape(y.shape)


def _placed(place: Tensor, tenant: Tensor | None, device: torch.device) -> Tensor:
    """The dense tensor of every entry, int64 [R], -1 where it has none."""
    slot = _slot(tenant, place.shape[0], -1, device)
    return torch.where(slot >= 0, place.index_select(0, slot.clamp(min=0)), -1)


@_composite("(Tensor logits, Tensor vocabulary, Tensor? tenant) -> Tensor")
def mask_vocabulary(logits: Tensor, vocabulary: Tensor, tenant: Tensor | None) -> Tensor:
    """Logits past the vocabulary of a row's tenant become -inf: it has no such token.

    Args:
        logits: [*, V].  vocabulary: int64 [T + 1]; the last is the base's.  tenant: int32 [R] or None (slot 0).
    """
    slots = vocabulary.shape[0] - 1
    entries = _slot(tenant, slots, slots, logits.device)
    size = vocabulary.index_select(0, entries).reshape(-1, 1, 1)
    token = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(token < size, _parts(logits, entries), -torch.inf).reshape(logits.shape)


@_composite("(Tensor value, Tensor tenant) -> Tensor")
def over_rows(value: Tensor, tenant: Tensor) -> Tensor:
    """A value that is the same for every row, once per row: [*] -> [R, *]."""
    return value.unsqueeze(0).expand(tenant.shape[0], *value.shape)


@_composite("(Tensor value, Tensor like, int dim, int rank) -> Tensor")
def along_rows(value: Tensor, like: Tensor, dim: int, rank: int) -> Tensor:
    """A value that has its row in front, shaped to broadcast with an operand that has the rows elsewhere.

    Args:
        value: [R, *shape].
        like: the operand; dimension `dim` of it is R, or a multiple of it with the rows outermost.
        rank: of the result of the two, at least those of `like` and of `shape`.

    Returns:
        `rank` dimensions; size of like[dim] where like has dim, otherwise those of `shape`, aligned at the end.
    """
    sizes = [1] * (rank - value.dim() + 1) + list(value.shape[1:])
    place = rank - like.dim() + dim
    if sizes[place] != 1:
        raise ValueError(f"a parameter of shape {list(value.shape[1:])} has no place for rows along dimension {dim}")
    del sizes[place]
    shaped = value.reshape(value.shape[0], *sizes).movedim(0, place)
    each = like.shape[dim] // value.shape[0]
    return shaped if each == 1 else shaped.repeat_interleave(each, dim=place)


@_composite("(Tensor x, Tensor weight) -> Tensor")
def matmul_rows(x: Tensor, weight: Tensor) -> Tensor:
    """A product of every row with a matrix of its own: [R, *, K] (or R times as many rows in front) @ [R, K, N]."""
    return (_parts(x, weight) @ weight.to(x.dtype)).reshape(*x.shape[:-1], weight.shape[-1])


@_composite("(Tensor y, Tensor x, Tensor? weight, Tensor? bias) -> Tensor")
def affine(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`y * weight + bias` in fp32 or wider, in x's dtype: what a norm does last. All broadcast."""
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)
