"""What a node does with a parameter, one call at a time."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from bitdelta_compile.graph.patterns import View, drop_bias, embedding_ids, linear_use, op_name, uses_of

aten = torch.ops.aten


def inputs() -> tuple[fx.Graph, fx.Node, fx.Node, fx.Node]:
    graph = fx.Graph()
    w, x, b = (graph.placeholder(name) for name in "wxb")
    for node, shape in ((w, (6, 4)), (x, (3, 4)), (b, (6,))):
        node.meta["example_value"] = torch.empty(shape)
    return graph, w, x, b


TRANSPOSES: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "w.t()": lambda g, w: g.call_method("t", (w,)),
    "w.T": lambda g, w: g.call_function(getattr, (w, "T")),
    "w.mT": lambda g, w: g.call_function(getattr, (w, "mT")),
    "w.transpose(1, 0)": lambda g, w: g.call_method("transpose", (w, 1, 0)),
    "w.transpose(-2, 1)": lambda g, w: g.call_method("transpose", (w, -2, 1)),
    "w.permute(1, 0)": lambda g, w: g.call_method("permute", (w, 1, 0)),
    "w.permute([1, 0])": lambda g, w: g.call_method("permute", (w, [1, 0])),
    "torch.t": lambda g, w: g.call_function(torch.t, (w,)),
    "torch.transpose": lambda g, w: g.call_function(torch.transpose, (w, 0, 1)),
    "torch.permute": lambda g, w: g.call_function(torch.permute, (w, (-1, 0))),
    "aten.t": lambda g, w: g.call_function(aten.t.default, (w,)),
    "aten.transpose": lambda g, w: g.call_function(aten.transpose.int, (w, -1, -2)),
    "aten.permute": lambda g, w: g.call_function(aten.permute.default, (w, [1, 0])),
}
OTHERS: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "w.dtype": lambda g, w: g.call_function(getattr, (w, "dtype")),
    "w.transpose(0, 0)": lambda g, w: g.call_method("transpose", (w, 0, 0)),
    "w.permute(0, 1)": lambda g, w: g.call_method("permute", (w, 0, 1)),
    "torch.permute(w, (0, 1))": lambda g, w: g.call_function(torch.permute, (w, (0, 1))),
    "w.view(-1)": lambda g, w: g.call_method("view", (w, -1)),
    "w[0]": lambda g, w: g.call_function(operator.getitem, (w, 0)),
}


@pytest.mark.parametrize("name", TRANSPOSES)
def test_transposes_are_seen_through(name: str) -> None:
    graph, w, x, _ = inputs()
    once = TRANSPOSES[name](graph, w)
    product = graph.call_function(torch.matmul, (x, once))
    twice = graph.call_method("relu", (TRANSPOSES[name](graph, once),))
    direct = graph.call_method("relu", (w,))
    uses = {node: view.transposed for node, view in uses_of(w)}
    assert uses == {product: True, twice: False, direct: False}


@pytest.mark.parametrize("name", OTHERS)
def test_other_views_are_uses(name: str) -> None:
    graph, w, _, _ = inputs()
    node = OTHERS[name](graph, w)
    assert uses_of(w) == [(node, View(w, False))]


def test_sides_and_orientation_of_products() -> None:
    graph, w, x, b = inputs()
    view, turned = View(w, False), View(w, True)
    linear = linear_use(graph.call_function(F.linear, (x, w, b)), view)
    assert linear is not None
    assert (linear.x, linear.bias, linear.transposed, linear.left) == (x, b, False, False)
    right = linear_use(graph.call_function(torch.mm, (x, w)), view)
    assert right is not None
    assert (right.x, right.bias, right.transposed, right.left) == (x, None, True, False)
    left = linear_use(graph.call_function(operator.matmul, (w, x)), view)
    assert left is not None
    assert (left.x, left.transposed, left.left) == (x, False, True)
    vector = linear_use(graph.call_function(operator.matmul, (w, b)), turned)
    assert vector is not None
    assert (vector.x, vector.transposed, vector.left) == (b, True, False)
    added = linear_use(graph.call_method("addmm", (b, x, w)), view)
    assert added is not None
    assert (added.x, added.bias, added.transposed) == (x, b, True)


def test_calls_that_are_no_product_with_the_parameter() -> None:
    graph, w, x, b = inputs()
    calls = [
        graph.call_function(F.linear, (w, x)),
        graph.call_function(F.linear, (w, w)),
        graph.call_function(F.linear, (x, x, w)),
        graph.call_function(torch.addmm, (w, x, b)),
        graph.call_function(torch.addmm, (b, x, w), {"alpha": 2}),
        graph.call_function(torch.addmm, (b, x, w), {"beta": 0}),
        graph.call_function(torch.addmm, (b, w, x)),
        graph.call_function(torch.matmul, (w, w)),
        graph.call_function(torch.bmm, (x, w)),
        graph.call_method("relu", (w,)),
    ]
    assert [linear_use(call, View(w, False)) for call in calls] == [None] * len(calls)


def test_lookups() -> None:
    graph, w, x, _ = inputs()
    view = View(w, False)
    assert embedding_ids(graph.call_function(F.embedding, (x, w, 0)), view) is x
    assert embedding_ids(graph.call_function(F.embedding, (x,), {"weight": w}), view) is x
    assert embedding_ids(graph.call_function(torch.embedding, (w, x)), view) is x
    assert embedding_ids(graph.call_function(aten.embedding.default, (w, x)), view) is x
    assert embedding_ids(graph.call_function(F.embedding, (w, x)), view) is None
    assert embedding_ids(graph.call_function(F.embedding, (x, w)), View(w, True)) is None
    assert embedding_ids(graph.call_function(F.linear, (x, w)), view) is None


def test_a_product_without_its_bias() -> None:
    graph, w, x, b = inputs()
    for target, args, expected in (
        (F.linear, (x, w, b), F.linear),
        (torch.addmm, (b, x, w), torch.mm),
        (aten.linear.default, (x, w, b), aten.linear.default),
    ):
        node = graph.call_function(target, args)
        use = linear_use(node, View(w, False))
        assert use is not None
        drop_bias(node)
        assert (node.target, node.args, node.kwargs) == (expected, (x, w), {})


def test_names_a_reader_knows() -> None:
    graph, w, x, _ = inputs()
    assert op_name(graph.call_function(F.linear, (x, w))) == "linear"
    assert op_name(graph.call_method("transpose", (w, 0, 1))) == "transpose"
    assert op_name(graph.call_function(aten.mm.default, (x, w))) == "aten.mm"
    assert op_name(graph.call_function(aten.transpose.int, (w, 0, 1))) == "aten.transpose"
