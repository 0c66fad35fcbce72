from __future__ import annotations

import pytest
import torch

from bitdelta_compile.compress import fit as fit_module
from bitdelta_compile.compress.fit import DeltaMatrix, choose_signs, column_means, fit
from bitdelta_compile.compress.metric import Moments, measure
from bitdelta_compile.compress.settings import Settings

SHAPES = [(5, 33), (1, 7), (16, 64), (3, 1), (40, 130)]


def matrix(rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, features, generator=generator)
    return DeltaMatrix(base, base + 0.1 * torch.randn(rows, features, generator=generator))


def delta(of):
    return of.tuned.double() - of.base.double()


def inputs(features, tokens=300, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator) * torch.linspace(0.1, 1, features) ** 2
    return torch.randn(tokens, features, generator=generator) @ mix + 0.5


def metric_of(x, tuned=None):
    moments = Moments(x.shape[1], x.device)
    moments.add(x, tuned)
    return measure(moments, factor=True)


def fitted(of, x=None, planes=1, rank=0, tuned=None, **settings):
    settings = {"method": "sequential"} | settings
    metric = None if x is None else metric_of(x, tuned)
    return fit(of, metric, Settings(**settings), planes=planes, rank=rank)


def lost(of, found, x):
    d = delta(of)
    return float(((d - found.sign.delta(torch.float64)) @ x.T.double()).norm() / (d @ x.T.double()).norm())


def test_signs_of_zeros_cancel():
    values = torch.zeros(6, 33)
    values[0, :3] = torch.tensor([1.0, -2.0, -0.0])
    signs = choose_signs(values).float().mul(2).sub(1)
    assert signs[0, :2].tolist() == [1, -1]
    zero = signs.masked_fill(values != 0, 0)
    assert zero.sum(-1).abs().max() <= 1
    assert zero[1:].sum().abs() <= 1
    lone = torch.zeros(8, 1)  # one zero per row: rows cancel
    assert choose_signs(lone).float().mul(2).sub(1).sum() == 0


def test_signs_do_not_depend_on_the_blocks():
    values = torch.randn(10, 9).round()
    assert torch.equal(choose_signs(values)[4:], choose_signs(values[4:], first_row=4))


@pytest.mark.parametrize("shape", SHAPES)
def test_own_signs_have_the_closed_form(shape, monkeypatch):
    monkeypatch.setattr(fit_module, "FIT_ELEMENTS", 70)  # several blocks of rows
    of, x = matrix(*shape), inputs(shape[1])
    found = fitted(of, x, method="closed_form", columns=False)
    d, q = delta(of), delta(of).sign()
    h = metric_of(x).h.double()
    expected = ((d @ h) * q).sum(-1) / ((q @ h) * q).sum(-1)
    torch.testing.assert_close(found.sign.row_scale[0].double(), expected.abs(), rtol=1e-3, atol=1e-6)
    assert torch.equal(found.sign.delta().sign().double(), q * expected.sign().unsqueeze(-1))


@pytest.mark.parametrize("settings", [{}, {"planes": 2}, {"rank": 2}, {"columns": True}, {"planes": 2, "rank": 1}])
def test_blocks_of_rows_do_not_matter(settings, monkeypatch):
    of, x = matrix(40, 130), inputs(130)
    whole = fitted(of, x, **settings).sign
    monkeypatch.setattr(fit_module, "FIT_ELEMENTS", 9 * 130)
    for name, tensor in fitted(of, x, **settings).sign.tensors().items():
        torch.testing.assert_close(tensor, whole.tensors()[name], rtol=1e-2, atol=1e-3)


def test_more_work_loses_less():
    of, x = matrix(40, 130), inputs(130)
    efforts = [
        {"method": "mean_abs"},
        {"method": "closed_form"},
        {"passes": 1, "sweeps": 0},
        {"passes": 2, "sweeps": 2},
        {"rank": 4},
        {"planes": 2},
        {"planes": 3},
        {"planes": 4},
    ]
    errors = [lost(of, fitted(of, x, **effort), x) for effort in efforts]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.8 * errors[1]
    assert errors[5] < 0.7 * errors[3]


@pytest.mark.parametrize("method", ["mean_abs", "closed_form", "sequential"])
@pytest.mark.parametrize("planes", [1, 3])
def test_each_rank_loses_less(method, planes):
    of, x = matrix(40, 130), inputs(130)
    errors = [lost(of, fitted(of, x, planes=planes, rank=rank, method=method), x) for rank in (0, 4, 16)]
    assert errors == sorted(errors, reverse=True)
    found = fitted(of, x, planes=planes, rank=90, method=method).sign
    assert (found.rank, found.left.dtype) == (40, torch.bfloat16)


def test_the_low_rank_part_is_the_best_correction_of_the_output():
    of, x = matrix(24, 40), inputs(40)
    plain = fitted(of, x, method="closed_form", columns=False)
    left_over = delta(of) - plain.sign.delta(torch.float64)
    h = metric_of(x).h.double()
    factor = torch.linalg.cholesky(h)
    before, singular = (left_over @ factor).square().sum(), torch.linalg.svdvals(left_over @ factor)
    for rank in (1, 3, 8):
        found = fitted(of, x, method="closed_form", columns=False, rank=rank).sign
        after = (((delta(of) - found.delta(torch.float64)) @ factor).square().sum()).item()
        assert after <= float(singular[rank:].square().sum()) * 1.05 + 1e-3 * float(before)


def test_the_error_is_that_of_the_output():
    of, x = matrix(16, 64), inputs(64, tokens=2000)
    found = fitted(of, x)
    assert found.error == pytest.approx(lost(of, found, x), rel=0.1)
    d = delta(of)
    apart = (d - found.sign.delta(torch.float64)).norm() / of.tuned.double().norm()
    assert found.weight_error == pytest.approx(float(apart), rel=1e-3)
    assert found.energy == pytest.approx(float((d @ x.T.double()).square().sum() / 2000), rel=0.05)


def test_drifted_inputs_are_made_up_for():
    of, x = matrix(16, 64), inputs(64)
    tuned = x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)) @ inputs(64, 64)
    wanted = tuned.double() @ of.tuned.double().T
    errors = []
    for reference in (None, tuned):
        sign = fitted(of, x, tuned=reference).sign
        errors.append(float((x.double() @ (of.base.double() + sign.delta(torch.float64)).T - wanted).norm()))
    assert errors[1] < 0.98 * errors[0]


def test_one_scale_is_the_mean_of_all_weights():
    of = matrix(5, 33)
    found = fitted(of, inputs(33), method="mean_abs").sign
    assert torch.allclose(found.row_scale.double(), delta(of).abs().mean().expand(1, 5))
    assert found.col_scale is None


@pytest.mark.parametrize("x", [None, torch.zeros(4, 33)])
def test_without_inputs_rows_take_their_mean(x):
    of = matrix(5, 33)
    found = fitted(of, x).sign
    torch.testing.assert_close(found.row_scale[0].double(), delta(of).abs().mean(-1), rtol=1e-5, atol=0)
    assert torch.equal(found.delta().sign(), delta(of).sign().float())


def test_column_scales_are_column_means():
    of = matrix(50, 33)
    weight = torch.rand(50)
    means = (delta(of).abs() * weight.double().unsqueeze(-1)).sum(0)
    torch.testing.assert_close(column_means(of, 1, weight)[0].double(), means / means.mean(), rtol=1e-5, atol=0)
    assert column_means(of, 3).shape == (3, 33)
    assert torch.allclose(column_means(of, 3).mean(-1), torch.ones(3))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("method", ["mean_abs", "closed_form", "sequential"])
@pytest.mark.parametrize("rank", [0, 2])
def test_zero_rows_and_dead_inputs(planes, method, rank):
    of = matrix(6, 40)
    of.tuned[2] = of.base[2]
    x = inputs(40, tokens=3)
    x[:, 7:20] = 0
    sign = fitted(of, x, planes=planes, method=method, rank=rank).sign
    for tensor in sign.tensors().values():
        assert tensor.isfinite().all()
    if not rank:
        assert (sign.row_scale[:, 2] == 0).all()
    assert (sign.row_scale[0, [0, 1, 3, 4, 5]] != 0).all()


def test_an_all_zero_delta():
    base = torch.randn(4, 40)
    found = fitted(DeltaMatrix(base, base.clone()), inputs(40), planes=2, rank=1)
    assert (found.sign.delta() == 0).all()
    assert found.error == found.weight_error == found.energy == 0


def test_transposed_storage_is_the_same_fit():
    of, x = matrix(5, 33), inputs(33)
    turned = DeltaMatrix(of.base.T, of.tuned.T, transposed=True)
    one, other = fitted(of, x, planes=2).sign, fitted(turned, x, planes=2).sign
    assert other.transposed
    assert torch.equal(one.delta(), other.delta().T)


def test_mixed_dtypes():
    base = torch.randn(4, 40).bfloat16()
    tuned = base.float() + 1e-3
    (_, block), *_ = DeltaMatrix(base, tuned).blocks()
    assert torch.allclose(block, torch.full((4, 40), 1e-3), atol=1e-6)
