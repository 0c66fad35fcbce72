from __future__ import annotations

import pytest
import torch

from bitdelta_compile.compress import metric as metric_module
from bitdelta_compile.compress.metric import DAMPING, Moments, measure


def inputs(features=12, tokens=50):
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, features)


def moments(x, tuned=None):
    found = Moments(x.shape[1], x.device)
    half = x.shape[0] // 2
    for part in (slice(0, half), slice(half, None)):
        found.add(x[part], None if tuned is None else tuned[part])
    return found


def damped(x, mean=0.0):
    h = x.double().T @ x.double() / x.shape[0]
    level = h.diagonal().mean()
    apart = (x - mean).double()
    return apart.T @ apart / x.shape[0] + DAMPING * level * torch.eye(x.shape[1])


@pytest.mark.parametrize("block", [7, 2048])
def test_h_is_the_mean_outer_product_damped(monkeypatch, block):
    monkeypatch.setattr(metric_module, "BLOCK_TOKENS", block)
    x = inputs()
    torch.testing.assert_close(measure(moments(x), factor=False).h.double(), damped(x), rtol=1e-5, atol=1e-6)


def test_the_factor_is_that_of_the_inverse_in_falling_order():
    x = inputs()
    found = measure(moments(x), factor=True)
    diagonal = found.h.diagonal()[found.order]
    assert (diagonal[:-1] >= diagonal[1:]).all()
    assert torch.equal(found.upper, found.upper.triu())
    inverse = damped(x)[found.order][:, found.order].inverse()
    torch.testing.assert_close((found.upper.T @ found.upper).double(), inverse, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.ordered, found.h[found.order][:, found.order])


def test_the_shift_makes_up_for_drifted_inputs():
    x, w = inputs(tokens=400), torch.randn(5, 12)
    tuned = x + 0.05 * torch.randn(400, 12) + 0.02
    found = measure(moments(x, tuned), factor=True)
    wanted = tuned @ w.T
    corrected = x @ (w + w @ found.shift).T
    assert (corrected - wanted).norm() < (x @ w.T - wanted).norm()
    drift = (tuned - x).double().T @ x.double() / 400
    torch.testing.assert_close(found.shift.double(), drift @ damped(x).inverse(), rtol=1e-2, atol=1e-4)


def test_no_drift_is_no_shift():
    x = inputs()
    assert measure(moments(x), factor=True).shift is None
    assert measure(moments(x, x), factor=True).shift.abs().max() < 1e-6


@pytest.mark.parametrize("x", [torch.zeros(0, 12), torch.zeros(9, 12)])
def test_nothing_seen_is_no_metric(x):
    assert measure(moments(x), factor=True) is None


@pytest.mark.parametrize("tokens", [1, 3])
def test_dead_inputs_and_few_tokens_are_damped(tokens):
    x = inputs(tokens=tokens)
    x[:, 4:9] = 0
    found = measure(moments(x), factor=True)
    assert found.upper.isfinite().all()
    assert (found.upper.diagonal() > 0).all()


def test_uneven_inputs_are_damped_until_they_factor():
    x = inputs(features=400, tokens=20)
    x[:, 0] *= 1e6
    found = measure(moments(x), factor=True)
    assert found.upper.isfinite().all()


def test_the_weight_of_rows_as_such_is_added():
    x = inputs()
    plain, extra = (measure(moments(x), factor=False, extra=value).h for value in (0.0, 3.0))
    torch.testing.assert_close(extra - plain, 3 * torch.eye(12))


def test_centered_inputs_leave_their_mean_to_a_bias():
    torch.manual_seed(1)
    x, w = inputs(tokens=400) + torch.randn(12), torch.randn(5, 12)
    tuned = x + 0.05 * torch.randn(400, 12) + 0.3
    found = measure(moments(x, tuned), factor=True, centered=True)
    torch.testing.assert_close(found.h.double(), damped(x, x.mean(0)), rtol=1e-3, atol=1e-4)
    drift = (tuned - x - (tuned - x).mean(0)).double().T @ (x - x.mean(0)).double() / 400
    torch.testing.assert_close(found.shift.double(), drift @ damped(x, x.mean(0)).inverse(), rtol=1e-2, atol=1e-3)
    error = 0.1 * torch.randn(5, 12)
    kept = w + w @ found.shift - error  # what planes make of the target
    lacking = error @ found.mean + w @ found.offset
    torch.testing.assert_close((tuned @ w.T).mean(0), (x @ kept.T + lacking).mean(0), rtol=1e-4, atol=1e-4)
    plain = found.unshifted()
    assert plain.shift is None
    lacking = error @ plain.mean + w @ plain.offset
    torch.testing.assert_close((tuned @ w.T).mean(0), (x @ (w - error).T + lacking).mean(0), rtol=1e-4, atol=1e-4)
