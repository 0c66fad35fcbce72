# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows sorted by slot on the device, for kernels that multiply many rows of one slot at a time; no host sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import SEGMENT_ITEMS, SEGMENT_SPAN
from .tile_linear import slot_of_row


@triton.jit
def plan_kernel(
    tenant_ptr, order_ptr, starts_ptr, items, entries, rows_per_entry, rows_per_item, SLOTS,
    INDEXED: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`plan_segments`: the places of BLOCK items, and in the programs after those BLOCK of the starts."""
    placing = tl.cdiv(items, BLOCK)
    places = tl.program_id(0) < placing
    first = tl.program_id(0) * BLOCK
    item = first + tl.arange(0, BLOCK)
    bound = item - placing * BLOCK
    key = _key(tenant_ptr, item, entries, rows_per_entry, rows_per_item, SLOTS, INDEXED)
    key = tl.where(places, key, bound)
    # Before an item come all of the slots before its own, and of its own slot what is earlier. A whole span is earlier
    # or it is not, but for the one that the items lie in.
    sooner = tl.zeros((BLOCK, SPAN), tl.int32)
    across = tl.arange(0, SPAN)
    for start in range(0, items, SPAN):
        other = start + across
        slot = _key(tenant_ptr, other, entries, rows_per_entry, rows_per_item, SLOTS, INDEXED)
        slot = tl.where(other < items, slot, 2147483647)
        limit = key + (places & (start + SPAN <= first)).to(tl.int32)
        sooner += (slot[None, :] < limit[:, None]).to(tl.int32)
    other = first // SPAN * SPAN + across
    slot = _key(tenant_ptr, other, entries, rows_per_entry, rows_per_item, SLOTS, INDEXED)
    earlier = (slot[None, :] == key[:, None]) & (other[None, :] < item[:, None]) & places
    place = tl.sum(sooner + earlier.to(tl.int32), 1)
    tl.store(order_ptr + place, item, mask=places & (item < items))
    tl.store(starts_ptr + bound, place, mask=(bound >= 0) & (bound < SLOTS + 2))


@triton.jit
def _key(tenant_ptr, item, entries, rows_per_entry, rows_per_item, SLOTS, INDEXED: tl.constexpr):
    """The slot of an item's rows, `SLOTS` for the base."""
    slot = slot_of_row(tenant_ptr, item * rows_per_item, entries, rows_per_entry, SLOTS, INDEXED)
    return tl.where(slot < 0, SLOTS, slot)


@triton.jit
def rows_of_segment(
    order_ptr, starts_ptr, program, M, rows_per_item, SLOTS, BM: tl.constexpr, SP: tl.constexpr
):  # fmt: skip
    """The rows of the `program`-th tile of at most BM rows of one segment.

    Returns:
        (slot: SLOTS for rows of the base, more where there is no such tile; rows int32 [BM], M where the tile is
        shorter).
    """
    every = tl.arange(0, SP)
    start = tl.load(starts_ptr + every, mask=every <= SLOTS, other=0) * rows_per_item
    end = tl.load(starts_ptr + every + 1, mask=every <= SLOTS, other=0) * rows_per_item
    tiles = (end - start + BM - 1) // BM
    past = tl.cumsum(tiles, 0)
    slot = tl.sum(((past <= program) & (every <= SLOTS)).to(tl.int32), 0)
    mine = every == slot
    first = tl.sum(tl.where(mine, past - tiles, 0), 0)
    place = tl.sum(tl.where(mine, start, 0), 0) + (program - first) * BM + tl.arange(0, BM)
    there = (place < tl.sum(tl.where(mine, end, 0), 0)) & (slot <= SLOTS)
    item = tl.load(order_ptr + place // rows_per_item, mask=there, other=0)
    return slot, tl.where(there, item * rows_per_item + place % rows_per_item, M)


def plan_segments(tenant: Tensor | None, rows: int, slots: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Sort M rows by slot, those of the base last; rows that share an entry of the row index stay together.

    Args:
        tenant: int32 [R] or None (all rows use slot 0).  rows: M.  slots: T.

    Returns:
        order int32 [items]: items in the order of their slots, an item being the rows of one entry.
        starts int32 [T + 2]: place of the first item of each slot, then of the base, then their number.
        rows per item.
    """
    entries = 1 if tenant is None else max(tenant.shape[0], 1)
    items = entries if rows % entries == 0 else rows
    order = torch.empty(items, dtype=torch.int32, device=device)
    starts = torch.empty(slots + 2, dtype=torch.int32, device=device)
    plan_kernel[triton.cdiv(items, SEGMENT_ITEMS) + triton.cdiv(slots + 2, SEGMENT_ITEMS),](
        order if tenant is None else tenant, order, starts, items, entries, max(rows // entries, 1), rows // items,
        slots, INDEXED=tenant is not None, BLOCK=SEGMENT_ITEMS, SPAN=SEGMENT_SPAN, num_warps=4,
    )  # fmt: skip
    return order, starts, rows // items
