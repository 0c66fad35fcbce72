"""Choosing signs column by column, against the same in plain PyTorch."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from bitdelta_compile.kernels import columns as kernels
from bitdelta_compile.kernels.configs import FIT_COLUMNS
from bitdelta_compile.lowering import device
from torch import Tensor

from bitdelta_compile.compress import signs as choice


class Problem(NamedTuple):
    target: Tensor
    scale: Tensor
    columns: Tensor | None
    h: Tensor
    upper: Tensor


@pytest.fixture(params=[(1, False, 45, 70), (1, True, 16, 1), (2, True, 33, 32), (4, True, 20, 40), (3, False, 1, 5)])
def problem(request):
    planes, scaled, features, n = request.param
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(4 * features, features, generator=generator)
    h = x.T @ x / len(x) + 0.01 * torch.eye(features)
    return Problem(
        torch.randn(features, n, generator=generator),
        torch.rand(planes, n, generator=generator) / 2 ** torch.arange(planes).unsqueeze(-1) + 0.1,
        torch.rand(planes, features, generator=generator) + 0.5 if scaled else None,
        h,
        torch.linalg.cholesky(torch.linalg.inv(h), upper=True),
    )


class Counted:
    """The kernels, and how often each was called."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self.calls = module, {"feed": 0, "flip": 0}

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self._module, name)


@pytest.fixture
def by_kernels(monkeypatch):
    """From here on the fit takes the kernels, on a CPU too."""

    def turn_on():
        counted = Counted(kernels)
        monkeypatch.setattr(device, "column_kernels", lambda place: counted)
        return counted

    return turn_on


def cost(problem, signs):
    rest = (problem.target - choice.values(signs, problem.scale, problem.columns)).double()
    return float((rest * (problem.h.double() @ rest)).sum())


def test_the_kernels_take_as_many_columns_as_they_are_given():
    assert choice.LEAF <= FIT_COLUMNS <= 32  # of a word's bits


@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_error_feedback(problem, by_kernels, strides):
    upper = problem.upper.contiguous() if strides == "rows" else problem.upper.T.contiguous().T
    arguments = problem.target, problem.scale, problem.columns, upper
    expected = choice.feed_errors(*arguments)
    counted = by_kernels()
    found = choice.feed_errors(*arguments)
    assert counted.calls["feed"] == 1
    assert torch.equal(found, expected)


def test_sign_flips(problem, by_kernels):
    start = torch.where(problem.target < 0, -1.0, 1.0).expand(len(problem.scale), -1, -1).contiguous()
    expected, found = start.clone(), start.clone()
    choice.flip_signs(problem.target, expected, problem.scale, problem.columns, problem.h)
    counted = by_kernels()
    choice.flip_signs(problem.target, found, problem.scale, problem.columns, problem.h)
    assert counted.calls["flip"] == 1
    assert torch.equal(found, expected)
    if problem.target.shape[0] > 1:
        assert cost(problem, found) < cost(problem, start)


def test_a_negative_zero_keeps_its_sign(by_kernels):
    target = torch.tensor([[0.0, -0.0, 1.0], [-0.0, 0.0, -1.0]])
    arguments = target, torch.zeros(1, 3), None, torch.eye(2)
    expected = choice.feed_errors(*arguments)
    by_kernels()
    assert torch.equal(choice.feed_errors(*arguments), expected)
    assert expected.tolist() == [[[1, -1, 1], [-1, 1, -1]]]
