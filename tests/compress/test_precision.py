"""Whatever the process allows, a fit multiplies at full precision; afterwards all is as it was."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import bitdelta_compile as bdc
from bitdelta_compile.compress.precision import full_precision
from bitdelta_compile.errors import CalibrationError

PLACES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def newer():
    return tuple(place.fp32_precision for place in PLACES)


@pytest.fixture
def settings():
    """What a test sets is put back."""
    older, everywhere, before = torch.get_float32_matmul_precision(), torch.backends.fp32_precision, newer()
    yield
    torch.set_float32_matmul_precision(older)
    torch.backends.fp32_precision = everywhere
    for place, precision in zip(PLACES, before, strict=True):
        place.fp32_precision = precision


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters() if seed else ():
                parameter += 0.01 * torch.randn_like(parameter)

    def forward(self, x):
        return self.second(self.first(x).relu())


def batches(**others):
    return [{"x": torch.randn(4, 20, 64, generator=torch.Generator().manual_seed(0)), **others}]


def assert_same(found, expected):
    for name, encoding in expected.encodings.items():
        for field, value in encoding.tensors().items():
            assert torch.equal(found.encodings[name].tensors()[field], value)


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_the_fit_multiplies_at_full_precision(older, settings):
    base, tuned = Net(0), Net(1)
    expected = bdc.compress(base, tuned, batches())
    torch.set_float32_matmul_precision(older)
    before, seen = newer(), set()
    tuned.first.register_forward_pre_hook(lambda *_: seen.add((*newer(), torch.get_float32_matmul_precision())))
    found = bdc.compress(base, tuned, batches())
    assert seen == {("ieee", "ieee", "highest")}
    assert (newer(), torch.get_float32_matmul_precision()) == (before, older)
    with pytest.raises(CalibrationError):
        bdc.compress(base, tuned, batches(unknown=torch.zeros(1)))
    assert (newer(), torch.get_float32_matmul_precision()) == (before, older)
    assert_same(found, expected)


def test_a_setting_that_is_inherited_still_is_afterwards(settings):
    for place in PLACES:
        place.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"  # torch refuses to tell the older setting now
    assert newer() == ("tf32", "tf32")
    with full_precision():
        assert newer() == ("ieee", "ieee")
    assert newer() == ("tf32", "tf32")
    torch.backends.fp32_precision = "ieee"
    assert newer() == ("ieee", "ieee")


def test_fits_in_several_threads(settings):
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with full_precision():
            entered.set()
            leave.wait(60)

    with full_precision():
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
    assert newer() == ("ieee", "ieee")  # the other is still at it
    leave.set()
    thread.join(60)
    assert (newer(), torch.get_float32_matmul_precision()) == (("tf32", "tf32"), "high")


@pytest.mark.parametrize("method", ["sequential", "closed_form"])
def test_autocast_is_left_outside(method):
    expected = bdc.compress(Net(0), Net(1), batches(), method=method)
    with torch.autocast("cpu", torch.bfloat16):
        found = bdc.compress(Net(0), Net(1), batches(), method=method)
        assert torch.is_autocast_enabled("cpu")
        compiled = torch.compile(
            Net(1), backend="bitdelta", options={"base": Net(0), "method": method, "lower": "eager"}
        )
        with torch.no_grad():
            assert compiled(batches()[0]["x"]).dtype == torch.bfloat16
    assert_same(found, expected)
