"""The reference against the formula written out by hand on numbers small enough to check by eye."""

from __future__ import annotations

import torch
from bitdelta_compile.kernels import layout, reference


def test_delta_weight_is_the_formula():
    positive = torch.tensor([[[[True, False]], [[False, False]]]])  # T = 1, P = 2, N = 1, K = 2
    row_scale = torch.tensor([[[0.5], [0.25]]])
    col_scale = torch.tensor([[[1.0, 2.0], [4.0, 1.0]]])
    left, right = torch.tensor([[[3.0]]]), torch.tensor([[[0.5, -1.0]]])
    delta = reference.delta_weight(layout.pack(positive), row_scale, col_scale, left, right, 2)
    expected = [0.5 * 1 - 0.25 * 4 + 1.5, -0.5 * 2 - 0.25 * 1 - 3]
    assert torch.equal(delta, torch.tensor([[expected]]))


def test_rows_belong_to_the_entry_that_their_place_says():
    assert reference.slot_of_row(torch.tensor([2, -1]), 6).tolist() == [2, 2, 2, -1, -1, -1]
    assert reference.slot_of_row(None, 3).tolist() == [0, 0, 0]


def test_linear_and_embedding_read_the_same_delta():
    signs = layout.pack(torch.rand(2, 1, 7, 33) < 0.5)
    row_scale = torch.rand(2, 1, 7)
    tenant = torch.tensor([1, 0])
    delta = reference.delta_weight(signs, row_scale, None, None, None, 33, torch.float64)
    x = torch.randn(2, 3, 33)
    y = reference.delta_linear(x, signs, row_scale, tenant=tenant)
    assert torch.equal(y[0], x[0].double() @ delta[1].T)
    ids = torch.tensor([[6, 0, 3], [1, 1, 5]])
    rows = reference.delta_embedding(ids, signs, row_scale, tenant=tenant, embedding_dim=33)
    assert torch.equal(rows[0], delta[1][ids[0]])
    assert torch.equal(rows[1], delta[0][ids[1]])
