"""Eager ops on the device against the reference: every path, dtype and odd shape; what others in the batch change."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import layout, reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import ops

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 2e-3}


def cuda(*tensors):
    return tuple(None if tensor is None else tensor.cuda() for tensor in tensors)


def on_device(tensors, features):
    signs, *rest = cuda(*tensors)
    return (layout.to_layout(signs, features, layout.FRAGMENTS), *rest)


def delta(x, tensors, tenant):
    return ops.delta_linear(x, *on_device(tensors, x.shape[-1]), tenant, layout=layout.FRAGMENTS)


def relative_error(found, expected):
    return ((found.cpu().double() - expected.cpu()).norm() / expected.norm().clamp_min(1e-30)).item()


def tenants_of(rows, slots, popularity):
    every = torch.arange(rows)
    chosen = {
        "distinct": every % slots,
        "one": torch.full((rows,), slots - 1),
        "skewed": (slots * torch.rand(rows, generator=torch.Generator().manual_seed(rows)) ** 3).long(),
        "with the base": torch.where(every % 3 == 0, -1, every % slots),
        "base only": torch.full((rows,), -1),
    }
    return chosen[popularity].to(torch.int32)


@pytest.mark.parametrize("popularity", ["distinct", "one", "skewed", "with the base", "base only"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (16, 16), (64, 64), (257, 4)])
def test_rows_and_tenants(rows, slots, dtype, popularity):
    tensors = random_bank(slots, 1, 512, 1024)
    tenant, x = tenants_of(rows, slots, popularity), torch.randn(rows, 1024).to(dtype)
    found, expected = delta(x.cuda(), tensors, tenant.cuda()), reference.delta_linear(x, *tensors, tenant)
    assert found.dtype == dtype
    assert relative_error(found, expected) < TOLERANCE[dtype]
    assert found[tenant.cuda() < 0].eq(0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("planes", "column", "rank"), [(2, False, 0), (1, True, 0), (2, True, 5)])
@pytest.mark.parametrize("rows", [5, 90])
def test_planes_column_scales_and_low_rank(rows, planes, column, rank, dtype):
    tensors = random_bank(3, planes, 200, 640, column=column, rank=rank)
    tensors[1][1, -1] = 0  # a tenant that lacks its last plane
    tenant, x = tenants_of(rows, 3, "with the base"), torch.randn(rows, 640).to(dtype)
    expected = reference.delta_linear(x, *tensors, tenant)
    assert relative_error(delta(x.cuda(), tensors, tenant.cuda()), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("outputs", "features"), [(1, 1), (7, 31), (17, 33), (65, 384), (129, 1000), (40, 32768)])
@pytest.mark.parametrize("rows", [1, 9, 100])
def test_ragged_shapes(rows, outputs, features):
    tensors = random_bank(1, 1, outputs, features)
    x = torch.randn(features, rows).bfloat16().T
    assert relative_error(delta(x.cuda(), tensors, None), reference.delta_linear(x, *tensors)) < 6e-3


@pytest.mark.parametrize("rows", [16, 256])
def test_a_row_does_not_depend_on_the_others(rows):
    tensors = random_bank(8, 1, 256, 512)
    x = torch.randn(rows, 512).bfloat16().cuda()
    tenant = tenants_of(rows, 8, "skewed").cuda()
    other = tenants_of(rows, 8, "distinct").cuda()
    other[rows // 2] = tenant[rows // 2]
    assert torch.equal(delta(x, tensors, tenant)[rows // 2], delta(x, tensors, other)[rows // 2])


def test_one_entry_far_off_and_entries_that_are_no_slot():
    tensors = random_bank(2, 1, 128, 512)
    x = torch.randn(4, 512).bfloat16()
    x[2, 7] = 300.0
    tenant = torch.tensor([0, 1, 1, 9], dtype=torch.int32)
    found = delta(x.cuda(), tensors, tenant.cuda())
    assert relative_error(found[:3], reference.delta_linear(x, *tensors, tenant)[:3]) < 6e-3
    assert found[3].eq(0).all()


@pytest.mark.parametrize("features", [100, 384, 4096])
def test_embedding(features):
    tensors = random_bank(3, 2, 50, features, column=True, rank=2)
    ids, tenant = torch.randint(50, (4, 7)), torch.tensor([2, -1, 0, 9], dtype=torch.int32)
    found = ops.delta_embedding(
        ids.cuda(), *on_device(tensors, features), tenant.cuda(), embedding_dim=features, dtype=torch.float32,
        layout=layout.FRAGMENTS,
    )  # fmt: skip
    expected = reference.delta_embedding(ids, *tensors, tenant, embedding_dim=features)
    assert relative_error(found, expected) < 1e-5


def test_prepacking_on_the_device_and_back():
    signs = layout.pack(torch.rand(2, 1, 37, 300) < 0.5).cuda()
    there = layout.to_layout(signs, 300, layout.FRAGMENTS)
    assert torch.equal(layout.from_layout(there, 37, 300, layout.FRAGMENTS), signs)
