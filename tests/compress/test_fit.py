from __future__ import annotations

import pytest
import torch

from bitdelta_compile.compress import fit as fit_module
from bitdelta_compile.compress import lowrank as lowrank_module
from bitdelta_compile.compress.fit import DeltaMatrix, Planes, ScaleFit, choose_signs
from bitdelta_compile.compress.lowrank import LowRankFit

SHAPES = [(5, 33), (1, 7), (16, 64), (3, 1)]


def matrix(rows, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, features, generator=generator)
    return DeltaMatrix(base, base + 0.1 * torch.randn(rows, features, generator=generator))


def delta(of):
    return of.tuned.double() - of.base.double()


def inputs(features, tokens=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=generator) * torch.linspace(0.1, 3, features) + 0.5


def dense(planes, row_scale):
    """What planes with these row scales amount to, fp64 [N, K]."""
    total = torch.zeros(planes.matrix.rows, planes.matrix.features, dtype=torch.float64)
    for first, block in planes.matrix.blocks():
        for plane, positive in enumerate(planes.cut(block, first)[0]):
            rows = slice(first, first + block.shape[0])
            total[rows] += row_scale[plane, rows, None].double() * planes.values(positive, plane).double()
    return total


def output_error(of, planes, row_scale, x):
    target, left = delta(of) @ x.T.double(), (delta(of) - dense(planes, row_scale)) @ x.T.double()
    return float(left.norm() / target.norm())


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
@pytest.mark.parametrize("columns", [False, True])
def test_row_scales_are_the_closed_form(shape, columns, monkeypatch):
    monkeypatch.setattr(fit_module, "BLOCK_ELEMENTS", 70)  # several blocks of rows
    monkeypatch.setattr(fit_module, "BLOCK_TOKENS", 16)
    of = matrix(*shape)
    x = inputs(shape[1])
    fit = ScaleFit(Planes(of, 1, columns=columns))
    fit.update(x[:20].unsqueeze(0))
    fit.update(x[20:])
    scales = fit.solve()
    d, q = delta(of), dense(fit.planes, torch.ones(1, shape[0]))
    h = x.T.double() @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(shape[1])
    expected = ((d @ h) * q).sum(-1) / ((q @ h) * q).sum(-1)
    torch.testing.assert_close(scales.row_scale[0].double(), expected, rtol=1e-4, atol=1e-7)
    error = max(0.0, scales.lost / scales.energy) ** 0.5
    assert error == pytest.approx(output_error(of, fit.planes, scales.row_scale, x), rel=1e-3, abs=1e-3)


def test_planes_are_fitted_together():
    of, x = matrix(6, 40), inputs(40, 200)
    fit = ScaleFit(Planes(of, 3, columns=True))
    fit.update(x)
    scales = fit.solve()
    best = output_error(of, fit.planes, scales.row_scale, x)
    for factor in (0.97, 1.03):
        for plane in range(3):
            moved = scales.row_scale.clone()
            moved[plane] *= factor
            assert output_error(of, fit.planes, moved, x) > best


@pytest.mark.parametrize("one_scale", [False, True])
def test_each_plane_and_each_rank_lowers_the_error(one_scale):
    of, x = matrix(24, 96), inputs(96, 300)
    errors = []
    for count in (1, 2, 3, 4):
        fit = ScaleFit(Planes(of, count, columns=not one_scale, one_scale=one_scale))
        if not one_scale:
            fit.update(x)
        scales = fit.solve()
        errors.append((scales.lost / scales.energy) ** 0.5)
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]


def test_low_rank_is_the_best_correction_of_the_output(monkeypatch):
    monkeypatch.setattr(lowrank_module, "FOLD_TOKENS", 32)
    of, x = matrix(24, 40), inputs(40, 300)
    fit = ScaleFit(Planes(of, 1))
    fit.update(x)
    scales = fit.solve()
    left_over = delta(of) - dense(fit.planes, scales.row_scale)
    lost = x.double() @ left_over.T
    singular = torch.linalg.svdvals(lost)
    before = float(lost.square().sum())
    for rank in (1, 3, 8):
        low_rank = LowRankFit(fit.planes, scales.row_scale, rank)
        low_rank.update(x)
        left, right, regained = low_rank.solve()
        assert (left.shape, right.shape, left.dtype) == ((24, rank), (rank, 40), torch.bfloat16)
        after = float((x.double() @ (left_over - left.double() @ right.double()).T).square().sum())
        best = float(singular[rank:].square().sum())
        assert after <= best * 1.05 + 1e-3 * before
        assert regained == pytest.approx(before - best, rel=0.05)


def test_low_rank_is_cut_to_the_matrix():
    of = matrix(3, 40)
    fit = ScaleFit(Planes(of, 1))
    low_rank = LowRankFit(fit.planes, fit.solve().row_scale, 9)
    low_rank.update_weights()
    left, right, _ = low_rank.solve()
    assert (left.shape, right.shape) == ((3, 3), (3, 40))
    assert torch.allclose(
        dense(fit.planes, fit.solve().row_scale) + left.double() @ right.double(), delta(of), atol=2e-2
    )


def test_one_scale_is_the_mean_of_all_weights():
    of = matrix(5, 33)
    fit = ScaleFit(Planes(of, 1, one_scale=True))
    fit.update(inputs(33))
    assert torch.allclose(fit.solve().row_scale.double(), delta(of).abs().mean().expand(1, 5))


def test_without_inputs_rows_take_their_mean():
    of = matrix(5, 33)
    expected = delta(of).abs().mean(-1)
    for feed in (lambda fit: None, ScaleFit.update_embedding, lambda fit: fit.update(torch.zeros(4, 33))):
        fit = ScaleFit(Planes(of, 1))
        feed(fit)
        torch.testing.assert_close(fit.solve().row_scale[0].double(), expected, rtol=1e-5, atol=0)


def test_a_tied_table_weighs_both_uses():
    of, x = matrix(5, 33), inputs(33)
    multiplied, looked_up, both = (ScaleFit(Planes(of, 1)) for _ in range(3))
    multiplied.update(x)
    looked_up.update_embedding()
    both.update(x)
    both.update_embedding()
    ends = torch.stack([multiplied.solve().row_scale, looked_up.solve().row_scale])
    middle = both.solve().row_scale
    assert not torch.equal(ends[0], ends[1])
    slack = 0.02 * ends[1]  # the damping of the one that is only multiplied
    assert ((middle >= ends.min(0).values - slack) & (middle <= ends.max(0).values + slack)).all()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("one_scale", [False, True])
def test_zero_rows_and_dead_inputs(planes, one_scale):
    of = matrix(6, 40)
    of.tuned[2] = of.base[2]
    x = inputs(40)
    x[:, 7:20] = 0
    fit = ScaleFit(Planes(of, planes, columns=not one_scale, one_scale=one_scale))
    fit.update(x)
    scale = fit.solve().row_scale
    assert scale.isfinite().all()
    assert (scale[:, 2] == 0).all()
    assert (scale[0, [0, 1, 3, 4, 5]] != 0).all()


def test_an_all_zero_delta():
    base = torch.randn(4, 40)
    fit = ScaleFit(Planes(DeltaMatrix(base, base.clone()), 2, columns=True))
    fit.update(inputs(40))
    scales = fit.solve()
    assert (scales.row_scale == 0).all()
    assert scales.lost == scales.energy == 0


def test_transposed_storage_is_the_same_fit():
    of, x = matrix(5, 33), inputs(33)
    fits = [ScaleFit(Planes(m, 2, columns=True)) for m in (of, DeltaMatrix(of.base.T, of.tuned.T, transposed=True))]
    for fit in fits:
        fit.update(x)
    assert torch.allclose(fits[0].solve().row_scale, fits[1].solve().row_scale)


def test_mixed_dtypes():
    base = torch.randn(4, 40).bfloat16()
    tuned = base.float() + 1e-3
    (_, block), *_ = DeltaMatrix(base, tuned).blocks()
    assert torch.allclose(block, torch.full((4, 40), 1e-3), atol=1e-6)
