"""The eager ops against the reference, their fake kernels, and their gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from bitdelta_compile.kernels import reference
from bitdelta_compile.kernels.testing import random_bank
from bitdelta_compile.lowering import eager, ops

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


CASES = list(
    itertools.product([torch.float32, torch.bfloat16, torch.float16], [1, 2, 3, 4], [False, True], [0, 3], [None, 2])
)


@pytest.mark.parametrize(("dtype", "planes", "column", "rank", "index"), CASES)
def test_linear_matches_reference_and_passes_opcheck(dtype, planes, column, rank, index):
    tensors = random_bank(1 if index is None else 3, planes, 7, 45, column=column, rank=rank)
    tenant = None if index is None else torch.tensor([2, -1], dtype=torch.int32)
    x = torch.randn(4, 3, 45, dtype=dtype)
    found = ops.delta_linear(x, *tensors, tenant)
    assert found.dtype == dtype
    assert relative_error(found, reference.delta_linear(x, *tensors, tenant)) < TOLERANCE[dtype]
    torch.library.opcheck(ops.delta_linear, (x, *tensors, tenant))


@pytest.mark.parametrize("index", [None, 2])
def test_base_and_delta_in_one_op_are_the_two_apart(index):
    signs, *scales = random_bank(1 if index is None else 3, 2, 7, 45, column=True, rank=2)
    tenant = None if index is None else torch.tensor([2, -1], dtype=torch.int32)
    x, weight = torch.randn(4, 3, 45), torch.randn(7, 45)
    found = ops.base_delta_linear(x, weight, signs, *scales, tenant)
    apart = torch.nn.functional.linear(x, weight) + ops.delta_linear(x, signs, *scales, tenant)
    assert torch.equal(found, apart)
    torch.library.opcheck(ops.base_delta_linear, (x, weight, signs, *scales, tenant))


@pytest.mark.parametrize(("dtype", "planes", "column", "rank", "index"), CASES)
def test_embedding_matches_reference_and_passes_opcheck(dtype, planes, column, rank, index):
    tensors = random_bank(1 if index is None else 3, planes, 11, 45, column=column, rank=rank)
    tenant = None if index is None else torch.tensor([2, -1], dtype=torch.int32)
    ids = torch.randint(0, 11, (4, 3))
    found = ops.delta_embedding(ids, *tensors, tenant, embedding_dim=45, dtype=dtype)
    assert found.dtype == dtype
    expected = reference.delta_embedding(ids, *tensors, tenant, embedding_dim=45)
    assert relative_error(found, expected) < TOLERANCE[dtype]
    torch.library.opcheck(ops.delta_embedding, (ids, *tensors, tenant), {"embedding_dim": 45, "dtype": dtype})


# opcheck of torch 2.15 reads .grad of a copy it made
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("index", [None, 2])
def test_linear_gradients(index):
    signs, *scales = random_bank(1 if index is None else 2, 2, 5, 33, column=True, rank=2, dtype=torch.float64)
    tenant = None if index is None else torch.tensor([1, -1], dtype=torch.int32)
    x = torch.randn(4, 33, dtype=torch.float64, requires_grad=True)
    for scale in scales:
        scale.requires_grad_()
    torch.autograd.gradcheck(lambda x, *s: ops.delta_linear(x, signs, *s, tenant), (x, *scales))
    torch.library.opcheck(ops.delta_linear, (x, signs, *scales, tenant))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("index", [None, 2])
def test_embedding_gradients(index):
    signs, *scales = random_bank(1 if index is None else 2, 2, 6, 33, column=True, rank=2, dtype=torch.float64)
    tenant = None if index is None else torch.tensor([1, -1], dtype=torch.int32)
    ids = torch.tensor([[0, 5], [5, 2]])
    for scale in scales:
        scale.requires_grad_()

    def lookup(*given):
        return ops.delta_embedding(ids, signs, *given, tenant, embedding_dim=33, dtype=torch.float64)

    torch.autograd.gradcheck(lookup, tuple(scales))
    torch.library.opcheck(
        ops.delta_embedding, (ids, signs, *scales, tenant), {"embedding_dim": 33, "dtype": torch.float64}
    )


def test_rows_outside_the_slots_are_zero_and_poison_stays_out():
    signs, row_scale, *_ = random_bank(3, 1, 9, 40)
    row_scale[1] = float("nan")
    tenant = torch.tensor([0, -1, 7, 2], dtype=torch.int32)
    y = ops.delta_linear(torch.randn(4, 40), signs, row_scale, None, None, None, tenant)
    assert y[1].eq(0).all()
    assert y[2].eq(0).all()
    assert y.isfinite().all()
    assert y[0].ne(0).any()


def test_a_row_does_not_depend_on_its_neighbours():
    tensors = random_bank(3, 1, 65, 100)
    x = torch.randn(6, 100)
    alone = ops.delta_linear(x, *tensors, torch.tensor([1, -1, -1, -1, -1, -1], dtype=torch.int32))[0]
    mixed = ops.delta_linear(x, *tensors, torch.tensor([1, 0, 2, 0, 1, 2], dtype=torch.int32))[0]
    assert torch.equal(alone, mixed)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
def test_no_rows(shape):
    signs, row_scale, *_ = random_bank(1, 1, 9, 40)
    assert ops.delta_linear(torch.randn(shape), signs, row_scale, None, None, None, None).shape == (*shape[:-1], 9)


def test_blocks_cover_a_large_matrix(monkeypatch):
    monkeypatch.setattr(eager, "BLOCK", 64)
    tensors = random_bank(1, 2, 19, 45, column=True)
    x = torch.randn(3, 45)
    assert relative_error(ops.delta_linear(x, *tensors, None), reference.delta_linear(x, *tensors)) < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 41)}, "words per row"),
        ({"row_scale": torch.ones(1, 1, 8)}, "row_scale must be"),
        ({"col_scale": torch.ones(1, 1, 39)}, "col_scale must be"),
        ({"left": torch.ones(1, 9, 2)}, "both or neither"),
        ({"tenant": torch.zeros(3, dtype=torch.int32)}, "cannot be divided"),
        ({"tenant": torch.zeros(2)}, "must be int32"),
        ({"layout": "swizzled"}, "unknown sign layout"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    signs, row_scale, *_ = random_bank(1, 1, 9, 32)
    given = {"x": torch.randn(2, 32), "signs": signs, "row_scale": row_scale, "col_scale": None, "left": None}
    given |= {"right": None, "tenant": None} | change
    with pytest.raises(ValueError, match=message):
        ops.delta_linear(**given)
