from __future__ import annotations

import gc
import weakref

import pytest
import torch

from bitdelta_compile.compress import signs
from bitdelta_compile.compress.metric import Moments, measure

SHAPES = [(1, 3), (7, 5), (16, 4), (17, 2), (40, 6), (129, 3), (300, 8)]


def problem(features, rows, planes=1, columns=False, tokens=80):
    """A metric, a target [K, n] in its order, scales and column scales."""
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(tokens, features, generator=generator) * torch.linspace(0.2, 3, features) + 0.5
    moments = Moments(features, torch.device("cpu"))
    moments.add(x)
    metric = measure(moments, factor=True)
    target = torch.randn(features, rows, generator=generator)
    scale = torch.stack([target.abs().mean(0) / 2**plane for plane in range(planes)])
    column = 0.5 + torch.rand(planes, features, generator=generator) if columns else None
    return metric, target, scale, column


def cost(rest, h):
    return ((h.double() @ rest.double()) * rest.double()).sum(0)


@pytest.mark.parametrize(("features", "rows"), SHAPES)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("planes", [1, 3])
def test_error_feedback_is_the_plain_recurrence(features, rows, columns, planes):
    metric, target, scale, column = problem(features, rows, planes, columns)
    found = signs.feed_errors(target, scale, column, metric.upper)
    w, upper = target.double().clone(), metric.upper.double()
    for k in range(features):
        for plane in range(planes):
            level = scale[plane].double() * (1 if column is None else column[plane, k].double())
            # a column that rounding puts on either side of zero is settled as it was
            sign = torch.where(w[k].abs() < 1e-4, found[plane, k].double(), torch.where(w[k] >= 0, 1.0, -1.0))
            assert torch.equal(found[plane, k].double(), sign)
            w[k] -= level * sign
        w[k] /= upper[k, k]
        w[k + 1 :] -= upper[k, k + 1 :, None] * w[k]


@pytest.mark.parametrize(("features", "rows"), SHAPES)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_flips_lower_the_error_until_none_does(features, rows, columns, planes):
    metric, target, scale, column = problem(features, rows, planes, columns)
    h = metric.ordered
    found = torch.where(torch.randn(planes, features, rows) > 0, 1.0, -1.0)
    before = cost(target - signs.values(found, scale, column), h)
    for _ in range(30):
        old = found.clone()
        signs.flip_signs(target, found, scale, column, h)
        after = cost(target - signs.values(found, scale, column), h)
        assert (after <= before * (1 + 1e-5) + 1e-9).all()
        before = after
        if torch.equal(old, found):
            break
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    for plane in range(planes):
        for k in range(0, features, 7):
            other = found.clone()
            other[plane, k] *= -1
            worse = cost(target - signs.values(other, scale, column), h)
            assert (worse >= after * (1 - 1e-4) - 1e-6).all()


def test_feedback_and_flips_beat_the_own_signs():
    metric, target, _, _ = problem(300, 8)
    h, lost = metric.ordered, []
    own = torch.where(target > 0, 1.0, -1.0).unsqueeze(0)
    scale = signs.fit_scale(target, own, None, h)
    lost.append(cost(target - signs.values(own, scale, None), h).sum())
    fed = signs.feed_errors(target, scale, None, metric.upper)
    scale = signs.fit_scale(target, fed, None, h)
    lost.append(cost(target - signs.values(fed, scale, None), h).sum())
    signs.flip_signs(target, fed, scale, None, h)
    lost.append(cost(target - signs.values(fed, scale, None), h).sum())
    assert lost[0] > 2 * lost[1] > 2 * lost[2]


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("weighed", [False, True])
def test_scales_are_least_squares(planes, columns, weighed):
    metric, target, _, column = problem(40, 6, planes, columns)
    h = metric.ordered if weighed else None
    found = torch.where(torch.randn(planes, 40, 6, generator=torch.Generator().manual_seed(3)) > 0, 1.0, -1.0)
    scale = signs.fit_scale(target, found, column, h)
    assert (scale >= 0).all()
    h = torch.eye(40) if h is None else h
    best = cost(target - signs.values(found, scale, column), h)
    for plane in range(planes):
        for factor in (0.97, 1.03):
            moved = scale.clone()
            moved[plane] *= factor
            assert (cost(target - signs.values(found, moved, column), h) >= best * (1 - 1e-6)).all()


def test_a_row_without_change_has_no_scale():
    metric, target, _, _ = problem(40, 6)
    target[:, 2] = 0
    for planes in (1, 2):
        found = torch.ones(planes, 40, 6)
        found[:, ::2] = -1
        scale = signs.fit_scale(target, found, None, metric.ordered)
        assert (scale[:, 2] == 0).all()
        assert scale.isfinite().all()


def test_error_feedback_holds_on_to_nothing():
    """Cycles would keep a matrix's tensors until the garbage is collected, one layer after another."""
    target, scale, upper = torch.randn(40, 3), torch.rand(1, 3), torch.eye(40)
    gc.collect()
    gc.disable()
    try:
        signs.feed_errors(target, scale, None, upper)
        kept = weakref.ref(upper)
        del upper
        assert kept() is None
    finally:
        gc.enable()
