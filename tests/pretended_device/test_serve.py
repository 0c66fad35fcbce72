"""Deltas applied, put into graphs and into banks where the base is."""

from __future__ import annotations

import pytest
import torch
from bitdelta_compile.kernels import layout
from pretended import DEVICE, There, on
from torch import fx, nn

from bitdelta_compile import stack
from bitdelta_compile.compress import compress
from bitdelta_compile.encodings import Dense, Rows, Same, Sign
from bitdelta_compile.graph.context import Parameter
from bitdelta_compile.graph.rewrite import rewrite
from bitdelta_compile.serve import bank, slots
from bitdelta_compile.sources import _placed


def sign(generator, n, transposed=False, **others):
    shape = (64, n) if transposed else (n, 64)
    signs = layout.pack(torch.rand(1, n, 64, generator=generator) < 0.5)
    return Sign(shape, torch.float32, signs, torch.rand(1, n, generator=generator), transposed=transposed, **others)


def test_a_delta_is_applied_where_the_base_is():
    generator = torch.Generator().manual_seed(0)
    parts = {"col_scale": torch.rand(1, 64, generator=generator), "left": torch.ones(40, 2), "right": torch.ones(2, 64)}
    rows = {"index": torch.tensor([1, 40]), "values": torch.rand(2, 64, generator=generator)}
    for encoding in (
        Same((40, 64), torch.float32),
        sign(generator, 40),
        sign(generator, 40, transposed=True),
        sign(generator, 40, **parts),
        Rows((41, 64), torch.float32, **rows, over=None, transposed=False),
        Rows((41, 64), torch.float32, **rows, over=sign(generator, 40), transposed=False),
        Rows((64, 41), torch.float32, **rows, over=sign(generator, 40, transposed=True), transposed=True),
    ):
        base = torch.randn(64, 40) if getattr(encoding, "transposed", False) else torch.randn(40, 64)
        found = encoding.apply(base.to(DEVICE))
        assert isinstance(found, There)
        assert torch.equal(found.cpu(), encoding.apply(base))


def test_a_graph_on_the_device():
    """`substitute_base` and `_placed`: what is stored outright is where the base is, too."""
    generator = torch.Generator().manual_seed(0)
    encodings = {"w": sign(generator, 40), "b": Dense((40,), torch.float32, torch.randn(40, generator=generator))}
    base = {"w": torch.randn(40, 64), "b": torch.randn(40)}
    x = torch.randn(3, 64)
    results = []
    for place in ("cpu", DEVICE):
        graph = fx.Graph()
        inputs = {name: graph.placeholder(name) for name in ("x", "w", "b")}
        graph.output((graph.call_function(torch.nn.functional.linear, tuple(inputs.values())),))
        there = {name: tensor.to(place) for name, tensor in (base | {"x": x}).items()}
        for name, node in inputs.items():
            node.meta["example_value"] = there[name]
        module = fx.GraphModule(torch.nn.Module(), graph)
        parameters = {
            inputs[name]: Parameter(name, _placed(encodings[name], there[name]), there[name]) for name in encodings
        }
        rewritten, context = rewrite(module, parameters)
        values = [context.values.get(name, there[name]) for name in ("x", "w", "b")]
        (found,) = rewritten(*values, *context.added)
        results.append(found.cpu())
    expected = x @ encodings["w"].apply(base["w"]).T + encodings["b"].value
    assert torch.allclose(results[0], expected, atol=1e-4)
    assert torch.allclose(results[1], expected, atol=1e-4)


class Net(nn.Module):
    """A table, of which a fine-tune may have more rows, linears and a norm."""

    def __init__(self, seed=0, words=100):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(100, 64), nn.LayerNorm(64)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        torch.manual_seed(seed)
        if words > 100:
            grown = torch.cat([self.table.weight.detach(), torch.randn(words - 100, 64)])
            self.table = nn.Embedding.from_pretrained(grown, freeze=False)
        with torch.no_grad():
            for parameter in self.parameters() if seed else ():
                parameter += 0.005 * torch.randn_like(parameter)

    def forward(self, ids):
        return self.second(self.first(self.norm(self.table(ids))).relu())


@pytest.mark.parametrize("sign_layout", [layout.CANONICAL, layout.FRAGMENTS])
def test_a_bank_on_the_device(sign_layout, monkeypatch):
    """Tenants come, go and are replaced, and the bank grows: the tensors are those of a bank in host memory."""
    ids = [{"ids": torch.arange(100).view(4, 25)}]
    rich = compress(Net(), Net(1), ids, planes=2, rank=2)
    others = {"plain": compress(Net(), Net(2), method="mean_abs"), "grown": compress(Net(), Net(3, 110), ids)}
    monkeypatch.setattr(bank, "_check_plain", lambda module: None)
    for module in (slots, stack):
        monkeypatch.setattr(module, "device_layout", lambda device: sign_layout)
    banks = []
    for place in ("cpu", DEVICE):
        found = bank.Bank(bank.Base(on(Net(), place)), {"rich": rich, **others}, 4)
        found.remove("plain")
        found.add("again", rich)
        found.add("grown", others["grown"], replace=True)
        banks += [found, found.grown(6, None, ())]
    for ours, theirs in zip(banks[:2], banks[2:], strict=True):
        assert ours.tenants == theirs.tenants == ("rich", "grown", "again")
        assert ours.stacks.keys() == theirs.stacks.keys()
        for name, expected in ours.stacks.items():
            tensors = theirs.stacks[name].tensors()
            assert tensors.keys() == expected.tensors().keys()
            for field, value in expected.tensors().items():
                assert isinstance(tensors[field], There), (name, field)
                assert torch.equal(tensors[field].cpu(), value), (name, field)
