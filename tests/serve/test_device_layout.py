"""Signs in the layout of a device's kernels: a bank, a graph and a program hold them so, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from bitdelta_compile.kernels import layout
from torch import nn

import bitdelta_compile as bdc
from bitdelta_compile import stack
from bitdelta_compile.programs.program import delta_of
from bitdelta_compile.serve import slots

V, K, N = 90, 72, 100


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(self.up(self.table(ids)).relu())
        return out


@pytest.fixture
def pair() -> tuple[Net, bdc.Delta]:
    torch.manual_seed(0)
    base, tuned = Net().eval(), Net().eval()
    tuned.load_state_dict({name: value + 0.1 * torch.randn_like(value) for name, value in base.state_dict().items()})
    torch._dynamo.reset()
    return base, bdc.compress(base, tuned, [{"ids": torch.arange(V).view(1, V)}], planes=2)


@pytest.fixture
def device_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device with kernels of its own."""
    for module in (stack, slots):
        monkeypatch.setattr(module, "device_layout", lambda device: layout.FRAGMENTS)


IDS = torch.arange(12).view(3, 4)


def test_attached(pair: tuple[Net, bdc.Delta], device_layout: None) -> None:
    base, delta = pair
    model = bdc.attach(base, {"a": delta}, slots=3, lower="eager")
    dense = Net().eval()
    dense.load_state_dict(dict(delta.materialize(base)))
    found = model(IDS, tenants=["a", None, "a"])
    signs = model._bank.stacks["up.weight"].signs
    assert tuple(signs.shape[2:]) == layout.packed_shape(N, K, layout.FRAGMENTS)
    canonical = sum(
        4 * math.prod(each.signs.shape[:2]) * each.base_rows * layout.words(each.in_features)
        for each in model._bank.stacks.values()
        if each.signs is not None
    )
    packed = sum(each.signs.nbytes for each in model._bank.stacks.values() if each.signs is not None)
    assert model.padding_bytes == packed - canonical > 0
    torch.testing.assert_close(found[[0, 2]], dense(IDS)[[0, 2]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], base(IDS)[1])
    assert not torch.allclose(dense(IDS), base(IDS), atol=0.05)
    model.add("b", delta)
    wider = model.grow(slots=5) or model
    torch.testing.assert_close(wider(IDS, tenants=["b", None, "a"])[[0, 2]], found[[0, 2]])


def test_exported_and_read_back(pair: tuple[Net, bdc.Delta], device_layout: None) -> None:
    base, delta = pair
    program = bdc.export(base, (IDS,), delta=delta)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "bitdelta.delta_" in str(n.target)]
    assert {call.kwargs.get("layout") for call in calls} == {layout.FRAGMENTS}
    back = delta_of(program)
    for name, encoding in delta.encodings.items():
        for field, tensor in encoding.tensors().items():
            assert torch.equal(back.encodings[name].tensors()[field], tensor), (name, field)
