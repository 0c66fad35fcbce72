# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Base linear and packed delta in one launch, for few rows: x @ weight.T + bias + delta.

Programs of both kinds run side by side, so that the memory is busy with weights and sign bits alike. Each writes fp32
partial results of its own; whichever program of a tile of outputs comes last adds them up, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import operands
from .configs import Fused, Plan
from .delta_linear import launch_arguments
from .tile_linear import base_product, binary_delta, led_rows, slot_of_row


@triton.jit
def base_delta_part(
    program, x_ptr, weight_ptr, signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr,
    tenant_ptr, partial_ptr, arrived_ptr, M, N, K, part, x_stride, blocks, chunks, entries, rows_per_entry, SLOTS,
    R: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, XP: tl.constexpr,
    RANK: tl.constexpr, INDEXED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """One part of K of the base for BM rows, or the delta of the group that a row leads.

    Args:
        program: of ceil(N / (16 WN R)) * (SPLIT * ceil(M / BM) + M).
        partial_ptr: fp32 [SPLIT + 1, M, N], written before it is read.
        arrived_ptr: int32, at least ceil(N / (16 WN R)) * ceil(M / BM); all 0 before and after the launch.
        part: features of a part of K.
        BM: a power of two; at least M where rows of one group can be far apart, else at least G.

    Returns:
        (the tile of 16 WN R outputs; that of BM rows; whether this program is the last of the two, and all of
        `partial_ptr` is there).
    """
    tiles_of_n = tl.cdiv(N, WN * R * 16)
    tiles_of_m = tl.cdiv(M, BM)
    column = program % tiles_of_n
    job = program // tiles_of_n
    tile = column * (WN * R)
    n = tile * 16 + tl.arange(0, WN * R * 16)
    if job < SPLIT * tiles_of_m:
        split = job // tiles_of_m
        line = job % tiles_of_m
        m = line * BM + tl.arange(0, BM)
        acc = tl.zeros((WN * R * 16, BM), tl.float32)
        last = tl.minimum(K, (split + 1) * part)
        acc = base_product(
            acc, x_ptr, weight_ptr, m, n, M, N, split * part, last, K, x_stride, BK, FORM, STAGES
        )  # fmt: skip
        place = (split * M + m).to(tl.int64)[None, :] * N + n[:, None]
        tl.store(partial_ptr + place, acc, mask=(m < M)[None, :] & (n < N)[:, None])
    else:
        row = job - SPLIT * tiles_of_m
        line = row // BM
        slot, rows = led_rows(tenant_ptr, row, M, entries, rows_per_entry, SLOTS, INDEXED, G, MP)
        if slot >= 0:
            y = binary_delta(
                signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr, slot, rows, tile, M, N,
                blocks, chunks, R, G, WN, WK, U, WIDE, HALF, EVEN, CP, P, XP, RANK,
            )  # fmt: skip
            place = (SPLIT * M + rows).to(tl.int64)[:, None] * N + n[None, :]
            tl.store(partial_ptr + place, y, mask=(rows < M)[:, None] & (n < N)[None, :])
    tl.debug_barrier()
    arrived_ptr += line * tiles_of_n + column
    is_last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == SPLIT + tl.minimum(BM, M - line * BM) - 1
    if is_last:
        tl.store(arrived_ptr, 0)
    return column, line, is_last


@triton.jit
def base_delta_total(
    partial_ptr, tenant_ptr, column, line, M, N, entries, rows_per_entry, SLOTS,
    TILE: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """What the last program of a tile makes of the partial results: fp32 [BM, TILE], 0 at rows of M or more."""
    m = line * BM + tl.arange(0, BM)
    n = column * TILE + tl.arange(0, TILE)
    there = (m < M)[:, None] & (n < N)[None, :]
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    split_size = tl.cast(M, tl.int64) * N
    total = tl.zeros((BM, TILE), tl.float32)
    for split in tl.static_range(SPLIT):
        total += tl.load(partial_ptr + split * split_size + place, mask=there, other=0.0, cache_modifier=".cg")
    slots = slot_of_row(tenant_ptr, m, entries, rows_per_entry, SLOTS, INDEXED)
    tuned = there & (slots >= 0)[:, None]
    return total + tl.load(partial_ptr + SPLIT * split_size + place, mask=tuned, other=0.0, cache_modifier=".cg")


@triton.jit
def fused_kernel(
    y_ptr, x_ptr, weight_ptr, bias_ptr, signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr,
    tenant_ptr, partial_ptr, arrived_ptr, M, N, K, part, x_stride, blocks, chunks, entries, rows_per_entry, SLOTS,
    R: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, XP: tl.constexpr,
    RANK: tl.constexpr, INDEXED: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """y [M, N]; grid (ceil(N / (16 WN R)) * (SPLIT * ceil(M / BM) + M),), arguments as in `base_delta_part`."""
    column, line, is_last = base_delta_part(
        tl.program_id(0), x_ptr, weight_ptr, signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr,
        inner_ptr, tenant_ptr, partial_ptr, arrived_ptr, M, N, K, part, x_stride, blocks, chunks, entries,
        rows_per_entry, SLOTS, R, G, WN, WK, U, WIDE, HALF, EVEN, CP, MP, P, XP, RANK, INDEXED, BM, BK, SPLIT, STAGES,
        FORM,
    )  # fmt: skip
    TILE: tl.constexpr = WN * R * 16
    if is_last:
        total = base_delta_total(
            partial_ptr, tenant_ptr, column, line, M, N, entries, rows_per_entry, SLOTS, TILE, BM, SPLIT, INDEXED
        )  # fmt: skip
        m = line * BM + tl.arange(0, BM)[:, None]
        n = column * TILE + tl.arange(0, TILE)
        if BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        there = (m < M) & (n < N)[None, :]
        tl.store(y_ptr + m.to(tl.int64) * N + n[None, :], total.to(y_ptr.dtype.element_ty), mask=there)


def base_delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    plan: Plan,
) -> Tensor:
    """x @ weight.T + bias + the delta's share, each row's own: [*, N] in x's dtype.

    Args:
        x: [*, K], at most `configs.DECODE_ROWS` rows.  weight: [N, K] in x's dtype, contiguous.  bias: [N] or None.
        plan: see `configs.choose_fused`.  The rest as in `delta_linear.delta_linear`.
    """
    config = plan.config
    assert isinstance(config, Fused)
    features, outputs = x.shape[-1], row_scale.shape[2]
    flat = x.reshape(-1, features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    inner = Plan(config.delta, wide=plan.wide)
    launch = launch_arguments(flat, signs, row_scale, col_scale, left, right, tenant, inner)
    planes, scale, sums = operands.bits(flat, col_scale, tenant, plan.wide)
    columns = triton.cdiv(outputs, 16 * config.tiles)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    partial = torch.empty(config.SPLIT + 1, rows, outputs, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(columns, dtype=torch.int32, device=x.device)
    index, entries, rows_per_entry, slots, _ = launch["index"]
    constants = launch["constants"] | {"num_stages": config.STAGES}
    fused_kernel[columns * (config.SPLIT + rows),](
        y, flat, weight, flat if bias is None else bias, signs, row_scale, launch["left"], planes, scale, sums,
        launch["inner"], index, partial, arrived, rows, outputs, features, config.part(features), flat.stride(0),
        launch["sizes"][2], launch["chunks"], entries, rows_per_entry, slots, **constants, BIAS=bias is not None,
        BM=max(16, triton.next_power_of_2(rows)), BK=config.BK, SPLIT=config.SPLIT, STAGES=config.STAGES,
        FORM=plan.form,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], outputs)
