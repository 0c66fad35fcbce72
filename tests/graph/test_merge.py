"""Undoing the rewrite of an exported program, and telling base graphs apart."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from bitdelta_compile.kernels import layout
from torch import Tensor, fx, nn

from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Dense, Encoding, Rows, Same, Sign
from bitdelta_compile.errors import UnsupportedError
from bitdelta_compile.graph.merge import BaseGraph, first_difference, undo
from bitdelta_compile.programs.export import export

aten = torch.ops.aten
V, K, N = 11, 37, 6


class Model(nn.Module):
    """A table tied to its head, both orientations of a product, a bias, a norm, a weight on the left."""

    def __init__(self, scale: float = 2.0, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.first = nn.Linear(K, N)
        self.norm = norm(N)
        self.second = nn.Parameter(torch.randn(N, K))
        self.head = nn.Linear(K, V, bias=False)
        self.head.weight = self.table.weight
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.first(self.table(ids)).relu()) @ self.second
        out: Tensor = self.head(x) * self.scale
        return out


def sign(rows: int, features: int, *, transposed: bool = False, seed: int = 0, **parts: Any) -> Sign:
    generator = torch.Generator().manual_seed(seed + rows)
    signs = layout.pack(torch.rand(1, rows, features, generator=generator) < 0.5)
    shape = (features, rows) if transposed else (rows, features)
    return Sign(shape, torch.float32, signs, torch.rand(1, rows, generator=generator), **parts, transposed=transposed)


def delta(model: nn.Module, **changed: Encoding) -> Delta:
    """A delta of the parameters named with `__` for dots; everything else is the same."""
    base = open_checkpoint(model)
    encodings: dict[str, Encoding] = {name: Same(base.shape(name), base.dtype(name)) for name in base.names()}
    encodings |= {name.replace("__", "."): encoding for name, encoding in changed.items()}
    return Delta.of(base, base, encodings)


def undone(model: nn.Module, changed: Delta, dim: Any = None, ids: Tensor | None = None) -> BaseGraph:
    ids = torch.zeros(3, 5, dtype=torch.int64) if ids is None else ids
    program = export(model, (ids,), delta=changed, dynamic_shapes=({0: dim},) if dim is not None else None)
    return undo(program, "bitdelta.", {"head.weight": "table.weight"})


def plain(model: nn.Module, dim: Any = None) -> BaseGraph:
    """The graph of the model itself."""
    ids = torch.zeros(3, 5, dtype=torch.int64)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: dim},) if dim is not None else None)
    return undo(program, "bitdelta.", {"head.weight": "table.weight"})


CHANGES: dict[str, dict[str, Encoding]] = {
    "nothing": {},
    "a tied table": {"table__weight": sign(V, K)},
    "a matrix of each orientation": {"first__weight": sign(N, K), "second": sign(K, N, transposed=True)},
    "biases and a norm": {
        "first__bias": Dense((N,), torch.float32, torch.ones(N)),
        "norm__weight": Dense((N,), torch.float32, torch.ones(N)),
    },
    "a matrix outright": {"first__weight": Dense((N, K), torch.float32, torch.ones(N, K))},
    "stored rows": {"first__weight": Rows((N, K), torch.float32, torch.tensor([1, 4]), torch.ones(2, K))},
    "stored rows over a tied table": {
        "table__weight": Rows((V, K), torch.float32, torch.tensor([2]), torch.ones(1, K), sign(V, K))
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_undone_graph_is_the_base_graph(change: str) -> None:
    model = Model().eval()
    found = undone(model, delta(model, **CHANGES[change]), torch.export.Dim("batch"))
    assert first_difference(found, plain(model, torch.export.Dim("batch"))) is None
    targets = {node.target for node in found.module.graph.nodes}
    assert not any(getattr(target, "namespace", None) == "bitdelta" for target in targets)
    assert not any(name.startswith("bitdelta") for name in found.held.values())


def test_the_program_keeps_its_graph() -> None:
    model = Model().eval()
    program = export(model, (torch.zeros(3, 5, dtype=torch.int64),), delta=delta(model, first__weight=sign(N, K)))
    before = str(program.graph)
    undo(program, "bitdelta.", {})
    assert str(program.graph) == before


def test_a_delta_that_another_pass_moved_is_refused() -> None:
    model = Model().eval()
    program = export(model, (torch.zeros(3, 5, dtype=torch.int64),), delta=delta(model, first__weight=sign(N, K)))
    added = next(node for node in program.graph.nodes if node.target is torch.ops.bitdelta.delta_linear.default)
    (addition,) = added.users
    addition.target = aten.mul.Tensor
    with pytest.raises(UnsupportedError, match=r"delta_linear.* is read by aten\.mul"):
        undo(program, "bitdelta.", {})


def test_what_differs_is_named() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    base = plain(Model().eval(), batch)
    for model, dim, expected in (
        (Model().eval(), torch.export.Dim("batch", min=1, max=9), "ranges over"),
        (Model().eval(), None, r"ids.* is torch\.int64"),
        (Model(scale=3.0).eval(), batch, "mul.* other arguments"),
        (Model(norm=nn.RMSNorm).eval(), batch, "layer_norm.* is .*rms_norm|norm.bias"),
    ):
        difference = first_difference(base, plain(model, dim))
        assert re.search(expected, str(difference))


def graph_of(build: Any, *values: Any) -> BaseGraph:
    """A graph over inputs of these example values."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{index}") for index in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    graph.output(build(graph, *nodes))
    return BaseGraph(fx.GraphModule(nn.Module(), graph), {}, {})


def test_names_of_symbols_do_not_matter_and_their_places_do() -> None:
    class Sizes(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.sum(0) + b.sum(0)

    class Other(nn.Module):
        def forward(self, c: Tensor, d: Tensor) -> Tensor:
            return c.sum(0) + d.sum(0)

    def program(module: nn.Module, same: bool) -> BaseGraph:
        rows, more = torch.export.Dim("rows"), torch.export.Dim("more")
        shapes = ({0: rows}, {0: rows if same else more})
        example = torch.ones(3, 4), torch.ones(3 if same else 5, 4)
        return undo(torch.export.export(module, example, dynamic_shapes=shapes), "bitdelta.", {})

    names = {str(size) for graph in (program(Sizes(), False), program(Other(), False)) for size in graph.ranges}
    assert len(names) == 4  # the symbols do have other names
    assert first_difference(program(Sizes(), False), program(Other(), False)) is None
    assert first_difference(program(Sizes(), True), program(Other(), False)) is not None
    assert first_difference(program(Sizes(), False), program(Other(), True)) is not None


def test_an_operand_more_or_in_another_place() -> None:
    x = torch.ones(2)
    one = graph_of(lambda g, a, b: g.call_function(aten.sub.Tensor, (a, b)), x, x)
    swapped = graph_of(lambda g, a, b: g.call_function(aten.sub.Tensor, (b, a)), x, x)
    longer = graph_of(
        lambda g, a, b: g.call_function(aten.neg.default, (g.call_function(aten.sub.Tensor, (a, b)),)), x, x
    )
    assert first_difference(one, one) is None
    assert "other arguments" in str(first_difference(one, swapped))
    assert "neg" in str(first_difference(one, longer))
    assert "neg" in str(first_difference(longer, one))
