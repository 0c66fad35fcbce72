"""The version range, and what happens where torch has moved something."""

from __future__ import annotations

import builtins
import inspect
import logging

import pytest
import torch
from bitdelta_compile.lowering import inductor, torch_internals
from torch._inductor import cudagraph_trees


@pytest.mark.parametrize(
    ("version", "warns"), [("2.11.0", False), ("2.15.1+cpu", False), ("2.10.2", True), ("3.0", True)]
)
def test_versions_outside_the_range_are_warned_about_once(version, warns, caplog):
    torch_internals.warn_outside_supported_range.cache_clear()
    with caplog.at_level(logging.WARNING, logger="bitdelta_compile"):
        for _ in range(2):
            assert torch_internals.warn_outside_supported_range(version) is warns
    assert len(caplog.records) == int(warns)
    if warns:
        assert version in caplog.text
        assert "2.11 to 2.15" in caplog.text


def test_a_torch_that_moved_the_template_is_a_clear_error(monkeypatch):
    real = builtins.__import__

    def moved(name, *args, **kwargs):
        if name == "cpp":
            raise ImportError("cannot import name 'CppTemplate'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", moved)
    with pytest.raises(RuntimeError, match=r"CppTemplate.*use torch 2.11 to 2.15, or options=.*eager") as caught:
        inductor._linear_template()
    assert torch.__version__ in str(caught.value)


def test_graphs_compilations_and_records_are_counted():
    for _ in range(2):  # the second time Inductor's result is in a cache
        torch._dynamo.reset()
        before = torch_internals.compiled_so_far()
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
        assert torch_internals.compiled_so_far() - before == (1, 0, 0)
        torch.compile(lambda x: x + 2)(torch.ones(2))
        assert torch_internals.compiled_so_far() - before == (2, 1, 0)
    # What records a CUDA graph without a CUDA device: the span of time that Inductor measures around a recording.
    assert 'dynamo_timed_cudagraph("CUDAGraphNode.record"' in inspect.getsource(cudagraph_trees.CUDAGraphNode.__init__)
    with cudagraph_trees.dynamo_timed_cudagraph("CUDAGraphNode.record", None, None):
        pass
    assert torch_internals.compiled_so_far() - before == (2, 1, 1)


def test_concrete_sizes_and_fake_tensors():
    assert torch_internals.concrete(5) == 5
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(2)
    assert torch_internals.is_fake(fake)
    assert torch_internals.is_fake(torch.empty(2, device="meta"))
    assert not torch_internals.is_fake(torch.empty(2))


def test_unknown_modes_are_refused():
    assert torch_internals.inductor_mode_options("max-autotune")["max_autotune"] is True
    with pytest.raises(ValueError, match="unknown mode 'fast'"):
        torch_internals.inductor_mode_options("fast")
