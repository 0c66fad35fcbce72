# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Eager launchers of the GPU kernels of `bitdelta::delta_linear`; signs in the layout `FRAGMENTS`.

Grids depend on sizes only and nothing is read back, so a CUDA graph can hold them. What a row gets depends on no other
row: a group's rows share the reading of the signs, not the arithmetic, and every sum has one order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import operands
from .configs import Binary, Exact, Plan
from .segments import plan_segments, rows_of_segment
from .tile_linear import binary_delta, exact_delta, led_rows, slot_of_row, with_base


@triton.jit
def binary_kernel(
    y_ptr, signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr, tenant_ptr,
    M, N, blocks, chunks, entries, rows_per_entry, SLOTS,
    R: tl.constexpr, G: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, U: tl.constexpr, WIDE: tl.constexpr,
    HALF: tl.constexpr, EVEN: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, XP: tl.constexpr,
    RANK: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """y [M, N] by the binary path; grid (ceil(N / (16 WN R)), M), one program per tile and row that leads a group."""
    row = tl.program_id(1)
    tile = tl.program_id(0) * (WN * R)
    n = tile * 16 + tl.arange(0, WN * R * 16)
    slot, rows = led_rows(tenant_ptr, row, M, entries, rows_per_entry, SLOTS, INDEXED, G, MP)
    if slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED) < 0:
        tl.store(y_ptr + row.to(tl.int64) * N + n, tl.zeros_like(n).to(y_ptr.dtype.element_ty), mask=n < N)
    if slot >= 0:
        y = binary_delta(
            signs_ptr, row_scale_ptr, left_ptr, bits_ptr, scale_ptr, sums_ptr, inner_ptr, slot, rows, tile, M, N,
            blocks, chunks, R, G, WN, WK, U, WIDE, HALF, EVEN, CP, P, XP, RANK,
        )  # fmt: skip
        there = (rows < M)[:, None] & (n < N)[None, :]
        tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def exact_kernel(
    y_ptr, signs_ptr, row_scale_ptr, left_ptr, words_ptr, halves_ptr, inner_ptr, tenant_ptr, order_ptr, starts_ptr,
    x_ptr, weight_ptr, M, N, K, blocks, entries, rows_per_entry, rows_per_item, x_stride, SLOTS,
    R: tl.constexpr, W: tl.constexpr, U: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, XP: tl.constexpr,
    RANK: tl.constexpr, INDEXED: tl.constexpr, SORTED: tl.constexpr, SP: tl.constexpr, BASE: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    """y [M, N] by the exact path, with x @ weight.T added where BASE.

    Grid (ceil(N / (16 W R)), programs): M programs of which those whose row leads a group do it, or, SORTED, one for
    every tile of BM rows that the segments of `segments.plan_segments` may have.
    """
    tile = tl.program_id(0) * (W * R)
    n = tile * 16 + tl.arange(0, W * R * 16)
    if SORTED:
        slot, rows = rows_of_segment(order_ptr, starts_ptr, tl.program_id(1), M, rows_per_item, SLOTS, BM, SP)
        busy = slot <= SLOTS
        slot = tl.where(slot < SLOTS, slot, -1)
    else:
        row = tl.program_id(1)
        slot, rows = led_rows(tenant_ptr, row, M, entries, rows_per_entry, SLOTS, INDEXED, BM, MP)
        based = slot_of_row(tenant_ptr, row, entries, rows_per_entry, SLOTS, INDEXED) < 0
        rows = tl.where(based & (tl.arange(0, BM) > 0), M, tl.where(based, row, rows))
        busy = based | (slot >= 0)
    if busy:
        y = tl.zeros((W * R * 16, BM), tl.float32)
        if slot >= 0:
            y = exact_delta(
                signs_ptr, row_scale_ptr, left_ptr, words_ptr, halves_ptr, inner_ptr, slot, rows, tile, M, N, blocks,
                R, W, U, BM, D, SPLITS, HALF, EVEN, P, XP, RANK, FORM, STAGES,
            )  # fmt: skip
        if BASE:
            y = with_base(y, x_ptr, weight_ptr, rows, n, M, N, K, x_stride, FORM)
        there = (n < N)[:, None] & (rows < M)[None, :]
        tl.store(y_ptr + n[:, None] + rows.to(tl.int64)[None, :] * N, y.to(y_ptr.dtype.element_ty), mask=there)


def delta_linear(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    plan: Plan,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`ops.delta_linear` by the kernel that `plan` names, with x @ weight.T added if there is a weight.

    Args:
        x: [*, K], any strides; fp32, bf16 or fp16.
        signs: int32 [T, P, *layout.packed_shape(N, K, FRAGMENTS)], contiguous.
        row_scale, col_scale, left, right, tenant: as in the op; fp32 scales.
        plan: see `configs.choose`.
        weight: [N, K] in x's dtype, contiguous; only the exact kernel takes it.
        dtype: of the result, x's own by default.

    Returns:
        [*, N] in `dtype`.
    """
    features, outputs = x.shape[-1], row_scale.shape[2]
    flat = x.reshape(-1, features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    y = torch.empty(flat.shape[0], outputs, dtype=dtype or x.dtype, device=x.device)
    launch = launch_arguments(flat, signs, row_scale, col_scale, left, right, tenant, plan)
    if isinstance(plan.config, Binary):
        planes, scale, sums = operands.bits(flat, col_scale, tenant, plan.wide)
        grid = (triton.cdiv(outputs, 16 * plan.config.tiles), flat.shape[0])
        binary_kernel[grid](
            y, signs, row_scale, launch["left"], planes, scale, sums, launch["inner"], *launch["index"][:1],
            *launch["sizes"], launch["chunks"], *launch["index"][1:4], **launch["constants"],
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], outputs)
    config = plan.config
    assert isinstance(config, Exact)
    made, halves = operands.words(flat, col_scale, tenant, plan.splits)
    rows, slots = flat.shape[0], signs.shape[0]
    order, starts, per_item, programs = x, x, 1, rows
    if plan.sorted:
        order, starts, per_item = plan_segments(tenant, rows, slots, x.device)
        programs = triton.cdiv(rows, config.BM) + min(slots + 1, order.shape[0])
    tenant_argument, entries, rows_per_entry, _, _ = launch["index"]
    exact_kernel[triton.cdiv(outputs, 16 * config.tiles), programs](
        y, signs, row_scale, launch["left"], made, halves, launch["inner"], tenant_argument, order, starts, flat,
        x if weight is None else weight, rows, outputs, features, launch["sizes"][2], entries, rows_per_entry, per_item,
        flat.stride(0), slots, **launch["constants"], SORTED=plan.sorted, SP=triton.next_power_of_2(slots + 2),
        BASE=weight is not None, FORM=plan.form, SPLITS=plan.splits,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], outputs)


def launch_arguments(
    x: Tensor,
    signs: Tensor,
    row_scale: Tensor,
    col_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    tenant: Tensor | None,
    plan: Plan,
) -> dict[str, Any]:
    """What the kernels take apart from the operands made of x: tensors, sizes and constants."""
    rows, features = x.shape
    slots, planes, outputs = row_scale.shape
    halves = -(-features // 128)
    blocks, half = halves // 2, halves % 2
    chunks = triton.cdiv(blocks + half, 2)
    index = operands.index_arguments(tenant, rows, slots, x)
    constants: dict[str, Any] = {
        "HALF": half,
        "P": planes,
        "XP": 1 if col_scale is None else planes,
        "RANK": 0 if left is None else left.shape[2],
        "INDEXED": index[4],
        "MP": triton.next_power_of_2(rows) if not plan.sorted else 1,
        "num_warps": plan.config.warps,
    }
    config = plan.config
    if isinstance(config, Binary):
        constants |= {"R": config.R, "G": config.G, "WN": config.WN, "WK": config.WK, "U": config.U}
        constants |= {"WIDE": int(plan.wide), "CP": triton.next_power_of_2(chunks)}
        constants |= {"EVEN": blocks % (config.WK * config.U) == 0, "num_stages": 1}
    elif isinstance(config, Exact):
        constants |= {"R": config.R, "W": config.W, "U": config.U, "BM": config.BM, "D": config.D}
        constants |= {"EVEN": blocks % config.U == 0, "STAGES": config.STAGES, "num_stages": config.STAGES}
    return {
        "left": x if left is None else left,
        "inner": x if right is None else operands.inner(x, right, tenant),
        "index": index,
        "sizes": (rows, outputs, blocks),
        "chunks": chunks,
        "constants": constants,
    }
