"""Compressing on the device, from weights that stay in host memory."""

from __future__ import annotations

import pytest
import torch

from bitdelta_compile.compress import compress

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
