"""Compressing on the device, from weights that stay in host memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

import bitdelta_compile as bdc
from bitdelta_compile.compress import compress
from bitdelta_compile.compress import signs as choice

TEXTS = ["the value of python", "language is not a value"]


# Not what a language model writes itself: that differs by device.
@pytest.mark.parametrize(("name", "calibration"), [("llama_pair", TEXTS), ("bert_pair", TEXTS), ("bert_pair", None)])
def test_the_device_fits_as_well_as_the_host(name, calibration, request):
    pair = request.getfixturevalue(name)
    ours, theirs = (compress(pair.base, pair.tuned, calibration, tokens=256, device=d) for d in ("cpu", "cuda"))
    for parameter, figures in ours.report["parameters"].items():
        found = theirs.report["parameters"][parameter]
        assert found.keys() == figures.keys()
        if "error" in figures:
            assert found["error"] == pytest.approx(figures["error"], rel=0.05, abs=0.01)
    assert not any(value.is_cuda for encoding in theirs.encodings.values() for value in encoding.tensors().values())
    assert torch.cuda.max_memory_allocated() > 0


def test_models_on_the_device(bert_pair):
    """Neither model in host memory: `bdc.compress`, and the fit of `torch.compile`."""
    base, tuned = (AutoModel.from_pretrained(each).eval() for each in (bert_pair.base, bert_pair.tuned))
    expected = compress(base, tuned, method="mean_abs")
    base, tuned = base.cuda(), tuned.cuda()
    found = compress(base, tuned, method="mean_abs")
    assert {name: each.kind for name, each in found.encodings.items()} == {
        name: each.kind for name, each in expected.encodings.items()
    }
    ids = torch.randint(64, (2, 9), device="cuda")
    with torch.no_grad():
        wanted, plain = tuned(input_ids=ids).last_hidden_state, base(input_ids=ids).last_hidden_state
        compiled = torch.compile(tuned, backend="bitdelta", options={"base": base})
        error = (compiled(input_ids=ids).last_hidden_state - wanted).norm() / (plain - wanted).norm()
    assert error < 0.6
    again = bdc.compress(base, tuned, [{"input_ids": ids}])
    assert any(encoding.kind == "sign" for encoding in again.encodings.values())


@pytest.mark.parametrize(
    ("planes", "scaled", "features", "n"), [(1, False, 256, 1000), (2, True, 300, 64), (4, True, 45, 7)]
)
def test_signs_by_kernels(planes, scaled, features, n, monkeypatch):
    """Next to the same signs as in plain PyTorch, whose products round otherwise, and as small an error."""
    torch.manual_seed(0)
    x = torch.randn(4 * features, features, device="cuda")
    h = x.T @ x / len(x) + 0.01 * torch.eye(features, device="cuda")
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    target, scale = torch.randn(features, n, device="cuda"), torch.rand(planes, n, device="cuda") + 0.1
    columns = torch.rand(planes, features, device="cuda") + 0.5 if scaled else None
    kernels = choice.device.column_kernels(target.device)
    called, launch = [], kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: (called.append(args[0]), launch(*args)))
    found = choice.feed_errors(target, scale, columns, upper)
    turned = found.clone()
    choice.flip_signs(target, turned, scale, columns, h)
    assert len(called) == 2 * -(-features // choice.LEAF)
    monkeypatch.setattr(choice.device, "column_kernels", lambda place: None)
    expected, expected_turned = choice.feed_errors(target, scale, columns, upper), found.clone()
    choice.flip_signs(target, expected_turned, scale, columns, h)
    for ours, theirs in ((found, expected), (turned, expected_turned)):
        assert (ours != theirs).float().mean() < 0.02  # one that rounding turns has others follow, in its row
        rest, best = (target - choice.values(signs, scale, columns) for signs in (ours, theirs))
        assert float((rest * (h @ rest)).sum()) == pytest.approx(float((best * (h @ best)).sum()), rel=1e-3)
