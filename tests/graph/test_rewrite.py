"""The pass on hand-built graphs: torch-level calls and ATen, against the same graph run on materialised weights."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitdelta_compile.kernels import layout
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bitdelta_compile.encodings import Dense, Encoding, Rows, Same, Sign
from bitdelta_compile.errors import UnsupportedError
from bitdelta_compile.graph.bind import exported_parameter_inputs
from bitdelta_compile.graph.context import Context, NoRowForm, Parameter
from bitdelta_compile.graph.rewrite import rewrite

N, K, V = 6, 37, 11
aten = torch.ops.aten


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sign(
    rows: int, features: int, *, transposed: bool = False, planes: int = 1, rank: int = 0, cols: bool = True
) -> Sign:
    """Random sign planes of a matrix of `rows` outputs and `features` inputs."""
    return Sign(
        (features, rows) if transposed else (rows, features),
        torch.float32,
        layout.pack(rand(planes, rows, features, seed=3) > 0),
        rand(planes, rows, seed=4).abs() + 0.1,
        rand(planes, features, seed=5).abs() + 0.1 if cols else None,
        rand(rows, rank, seed=6).bfloat16() if rank else None,
        rand(rank, features, seed=7).bfloat16() if rank else None,
        transposed,
    )


def stored_rows(
    base: Tensor, index: list[int], count: int, *, over: Sign | None = None, transposed: bool = False
) -> Rows:
    features = base.shape[0] if transposed else base.shape[1]
    shape = (features, count) if transposed else (count, features)
    values = rand(len(index), features, seed=8)
    return Rows(shape, base.dtype, torch.tensor(index, dtype=torch.int64), values, over, transposed)


class Case:
    """A graph over named inputs, and what each parameter becomes."""

    def __init__(self, build: Callable[..., Any], inputs: dict[str, Tensor], encodings: dict[str, Encoding]) -> None:
        self.inputs, self.encodings = inputs, encodings
        graph = fx.Graph()
        nodes = {name: graph.placeholder(name) for name in inputs}
        for name, node in nodes.items():
            node.meta["example_value"] = inputs[name]
        graph.output(build(graph, **nodes))
        self.gm = fx.GraphModule({}, graph)
        self.parameters = {
            node: Parameter(f"layer.{node.name}", encodings[node.name], inputs[node.name])
            for node in graph.find_nodes(op="placeholder")
            if node.name in encodings
        }

    def tuned(self) -> Any:
        """The original graph on the dense tuned tensors."""
        tuned = {name: encoding.apply(self.inputs[name]) for name, encoding in self.encodings.items()}
        return self.gm(*(self.inputs | tuned).values())

    def rewritten(self) -> tuple[Any, fx.GraphModule, Context]:
        """The rewritten graph on the base tensors."""
        gm, context = rewrite(self.gm, self.parameters)
        return run(gm, context, self.inputs), gm, context

    def check(self) -> tuple[fx.GraphModule, Context]:
        before = self.gm.code
        found, gm, context = self.rewritten()
        expected = self.tuned()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        base = self.gm(*self.inputs.values())
        assert base.shape != expected.shape or (base - expected).abs().max() > 0.05
        assert self.gm.code == before
        return gm, context


def run(gm: fx.GraphModule, context: Context, inputs: dict[str, Tensor]) -> Any:
    return gm(*(context.values.get(name, value) for name, value in inputs.items()), *context.added)


def ops_of(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def count(gm: fx.GraphModule, target: Any) -> int:
    return ops_of(gm).count(target)


LINEAR = torch.ops.bitdelta.delta_linear.default
EMBEDDING = torch.ops.bitdelta.delta_embedding.default

Build = Callable[..., fx.Node]

# (the call, whether the parameter w is stored [K, N])
PRODUCTS: dict[str, tuple[Build, bool]] = {
    "F.linear": (lambda g, x, w, b: g.call_function(F.linear, (x, w, b)), False),
    "F.linear without bias": (lambda g, x, w, b: g.call_function(F.linear, (x, w)), False),
    "F.linear by keyword": (lambda g, x, w, b: g.call_function(F.linear, (x,), {"bias": b, "weight": w}), False),
    "torch._C._nn.linear": (lambda g, x, w, b: g.call_function(torch._C._nn.linear, (x, w, b)), False),
    "aten.linear": (lambda g, x, w, b: g.call_function(aten.linear.default, (x, w, b)), False),
    "addmm": (lambda g, x, w, b: g.call_function(torch.addmm, (b, x, w)), True),
    "addmm by keyword": (lambda g, x, w, b: g.call_function(torch.addmm, (b,), {"mat1": x, "mat2": w}), True),
    "addmm of w.t()": (lambda g, x, w, b: g.call_function(torch.addmm, (b, x, g.call_method("t", (w,)))), False),
    "b.addmm(x, w)": (lambda g, x, w, b: g.call_method("addmm", (b, x, w)), True),
    "aten.addmm of aten.t": (
        lambda g, x, w, b: g.call_function(aten.addmm.default, (b, x, g.call_function(aten.t.default, (w,)))), False
    ),
    "mm": (lambda g, x, w, b: g.call_function(torch.mm, (x, w)), True),
    "aten.mm of aten.permute": (
        lambda g, x, w, b: g.call_function(aten.mm.default, (x, g.call_function(aten.permute.default, (w, [1, 0])))),
        False,
    ),
    "matmul": (lambda g, x, w, b: g.call_function(torch.matmul, (x, w)), True),
    "@": (lambda g, x, w, b: g.call_function(operator.matmul, (x, w)), True),
    "x.matmul(w)": (lambda g, x, w, b: g.call_method("matmul", (x, w)), True),
    "x @ w.T": (lambda g, x, w, b: g.call_function(operator.matmul, (x, g.call_function(getattr, (w, "T")))), False),
    "x @ w.transpose(0, 1)": (
        lambda g, x, w, b: g.call_function(operator.matmul, (x, g.call_method("transpose", (w, 0, 1)))), False
    ),
    "x @ w.transpose(0, -1)": (
        lambda g, x, w, b: g.call_function(operator.matmul, (x, g.call_method("transpose", (w, 0, -1)))), False
    ),
    "x @ permute(w, (0, 1)).t()": (
        lambda g, x, w, b: g.call_function(torch.matmul, (x, g.call_function(torch.permute, (w, (1, 0))))), False
    ),
    "x @ w.t().t()": (
        lambda g, x, w, b: g.call_function(torch.matmul, (x, g.call_method("t", (g.call_method("t", (w,)),)))), True
    ),
    "w @ x.T": (
        lambda g, x, w, b: g.call_function(torch.matmul, (w, g.call_function(torch.transpose, (x, 0, 1)))), False
    ),
    "w.T @ x.T": (
        lambda g, x, w, b: g.call_function(
            torch.mm, (g.call_method("t", (w,)), g.call_function(torch.transpose, (x, 0, 1)))
        ),
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_becomes_base_product_plus_packed_delta(name: str) -> None:
    build, transposed = PRODUCTS[name]
    inputs = {"x": rand(5, K), "w": rand(K, N) if transposed else rand(N, K), "b": rand(N)}
    case = Case(
        build, inputs, {"w": sign(N, K, transposed=transposed), "b": Dense((N,), torch.float32, rand(N, seed=9))}
    )
    gm, context = case.check()
    assert count(gm, LINEAR) == 1
    assert [tensor.shape[0] for tensor in context.added] == [1, 1, 1]  # signs, row_scale, col_scale of one slot
    assert not any(tensor.shape[-2:] == inputs["w"].shape for tensor in context.added)


@pytest.mark.parametrize("exact", [False, True])
def test_exactness_is_said_by_the_call(exact: bool) -> None:
    build, _ = PRODUCTS["F.linear"]
    case = Case(build, {"x": rand(5, K), "w": rand(N, K), "b": rand(N)}, {"w": sign(N, K)})
    gm, _ = rewrite(case.gm, case.parameters, exact=exact)
    (call,) = gm.graph.find_nodes(op="call_function", target=LINEAR)
    assert call.kwargs.get("exact", False) is exact


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K)])
def test_every_shape_of_x(shape: tuple[int, ...]) -> None:
    case = Case(PRODUCTS["F.linear"][0], {"x": rand(*shape), "w": rand(N, K), "b": rand(N)}, {"w": sign(N, K)})
    found, gm, _ = case.rewritten()
    torch.testing.assert_close(found, case.tuned(), rtol=1e-4, atol=1e-4)
    assert count(gm, LINEAR) == 1


@pytest.mark.parametrize("shape", [(K,), (K, 3), (2, K, 3)])
def test_the_parameter_on_the_left_of_a_vector_a_matrix_and_a_batch(shape: tuple[int, ...]) -> None:
    case = Case(
        lambda g, w, x: g.call_function(torch.matmul, (w, x)), {"w": rand(N, K), "x": rand(*shape)}, {"w": sign(N, K)}
    )
    gm, _ = case.check()
    assert count(gm, LINEAR) == 1


@pytest.mark.parametrize(("planes", "rank", "cols"), [(1, 0, False), (2, 0, True), (4, 3, True), (1, 2, False)])
def test_planes_column_scales_and_low_rank(planes: int, rank: int, cols: bool) -> None:
    case = Case(
        PRODUCTS["F.linear"][0],
        {"x": rand(5, K), "w": rand(N, K), "b": rand(N)},
        {"w": sign(N, K, planes=planes, rank=rank, cols=cols)},
    )
    _, context = case.check()
    assert len(context.added) == 2 + cols + 2 * bool(rank)


@pytest.mark.parametrize(
    ("target", "ids_first"), [(F.embedding, True), (torch.embedding, False), (aten.embedding.default, False)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", ["sign", "rows", "rows over sign", "grown", "grown over sign"])
def test_embedding(target: Any, ids_first: bool, dtype: torch.dtype, kind: str) -> None:
    base = rand(V, K)
    grown = "grown" in kind
    encoding: Encoding = sign(V, K)
    if kind != "sign":
        index = [V, V + 1] if grown else [2, 7]
        encoding = stored_rows(base, index, V + 2 * grown, over=sign(V, K) if "over" in kind else None)
    ids = torch.arange(V + 2 * grown, dtype=dtype).repeat(2, 1)
    case = Case(
        lambda g, ids, w: g.call_function(target, (ids, w) if ids_first else (w, ids)),
        {"ids": ids, "w": base},
        {"w": encoding},
    )
    found, gm, _ = case.rewritten()
    torch.testing.assert_close(found, F.embedding(ids, encoding.apply(base)), rtol=1e-5, atol=1e-5)
    assert count(gm, EMBEDDING) == ("sign" in kind)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [None, "vector", "matrix"])
@pytest.mark.parametrize("over", [False, True])
def test_stored_rows_replace_outputs(transposed: bool, bias: str | None, over: bool) -> None:
    base = rand(K, N) if transposed else rand(N, K)
    planes = sign(N, K, transposed=transposed) if over else None
    encoding = stored_rows(base, [1, 4], N, over=planes, transposed=transposed)

    def build(g: fx.Graph, x: fx.Node, w: fx.Node, b: fx.Node) -> fx.Node:
        if bias == "matrix":
            return g.call_function(torch.addmm, (b, x, w if transposed else g.call_method("t", (w,))))
        if transposed:
            return g.call_function(torch.addmm, (b, x, w)) if bias else g.call_function(torch.mm, (x, w))
        return g.call_function(F.linear, (x, w, b if bias else None))

    b = rand(5, N, seed=2) if bias == "matrix" else rand(N, seed=2)
    gm, _ = Case(build, {"x": rand(5, K), "w": base, "b": b}, {"w": encoding}).check()
    assert count(gm, LINEAR) == over


@pytest.mark.parametrize("bias", ["none", "grown", "addmm"])
@pytest.mark.parametrize("over", [False, True])
def test_grown_vocabulary_of_a_head(bias: str, over: bool) -> None:
    """The head has N + 2 outputs in the fine-tune; its bias, if any, grew with it."""
    transposed = bias == "addmm"
    base = rand(K, N) if transposed else rand(N, K)
    planes = sign(N, K, transposed=transposed) if over else None
    encoding = stored_rows(base, [3, N, N + 1], N + 2, over=planes, transposed=transposed)
    grown_bias = rand(N + 2, seed=2)
    encodings: dict[str, Encoding] = {"w": encoding, "b": Dense((N + 2,), torch.float32, grown_bias)}
    build = PRODUCTS[{"none": "F.linear without bias", "grown": "F.linear", "addmm": "addmm"}[bias]][0]
    case = Case(build, {"x": rand(5, K), "w": base, "b": rand(N)}, encodings)
    found, _, _ = case.rewritten()
    tuned = encoding.apply(base)
    expected = rand(5, K) @ (tuned if transposed else tuned.T)
    torch.testing.assert_close(found, expected + (grown_bias if bias != "none" else 0), rtol=1e-4, atol=1e-4)


def test_a_table_that_shrank_loses_its_last_rows() -> None:
    base = rand(V, K)
    encoding = Rows((V - 3, K), torch.float32, torch.zeros(0, dtype=torch.int64), torch.zeros(0, K), sign(V, K))

    def build(g: fx.Graph, ids: fx.Node, w: fx.Node) -> fx.Node:
        return g.call_function(F.linear, (g.call_function(F.embedding, (ids, w)), w))

    case = Case(build, {"ids": torch.arange(V - 3), "w": base}, {"w": encoding})
    found, _, _ = case.rewritten()
    torch.testing.assert_close(found, case.tuned(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("over", [False, True])
def test_tied_table_and_head_share_their_added_inputs(over: bool) -> None:
    base = rand(V, K)
    encoding = stored_rows(base, [2, 9], V, over=sign(V, K)) if over else sign(V, K)

    def build(g: fx.Graph, ids: fx.Node, w: fx.Node) -> fx.Node:
        return g.call_function(F.linear, (g.call_function(F.embedding, (ids, w)), w))

    case = Case(build, {"ids": torch.arange(V).view(1, V), "w": base}, {"w": encoding})
    gm, context = case.check()
    assert (count(gm, LINEAR), count(gm, EMBEDDING)) == (1, 1)
    assert len(context.added) == 3 + 2 * over
    assert len(gm.graph.find_nodes(op="placeholder")) == 2 + len(context.added)
    packed = encoding.over if isinstance(encoding, Rows) else encoding
    assert packed is not None
    assert context.added[0].data_ptr() == packed.signs.data_ptr()  # the packed copy itself


def test_what_is_the_same_leaves_the_graph_as_it_is() -> None:
    base = rand(N, K)
    case = Case(
        PRODUCTS["F.linear"][0],
        {"x": rand(5, K), "w": base, "b": rand(N)},
        {"w": Same((N, K), torch.float32), "b": Same((N,), torch.float32)},
    )
    gm, context = rewrite(case.gm, case.parameters)
    assert gm.code == case.gm.code
    assert context.added == []
    assert context.values["w"] is base


def test_what_is_dense_changes_an_input_and_nothing_else() -> None:
    weight, bias = rand(N, K, seed=9), rand(N, seed=9)
    case = Case(
        PRODUCTS["F.linear"][0],
        {"x": rand(5, K), "w": rand(N, K), "b": rand(N)},
        {"w": Dense((N, K), torch.float32, weight), "b": Dense((N,), torch.float32, bias)},
    )
    gm, context = case.check()
    assert gm.code == case.gm.code
    assert context.added == []
    assert context.values["w"] is weight
    assert context.values["b"] is bias


UNSUPPORTED: dict[str, Build] = {
    "elementwise": lambda g, x, w: g.call_function(operator.mul, (w, 2.0)),
    "elementwise on the transpose": lambda g, x, w: g.call_function(operator.mul, (g.call_method("t", (w,)), 2.0)),
    "elementwise on both transposes": lambda g, x, w: g.call_function(
        operator.mul, (g.call_method("t", (g.call_method("t", (w,)),)), 2.0)
    ),
    "scaled addmm": lambda g, x, w: g.call_function(torch.addmm, (x, x, g.call_method("t", (w,))), {"alpha": 2}),
    "its own square": lambda g, x, w: g.call_function(torch.matmul, (w, w)),
    "its own Gram matrix": lambda g, x, w: g.call_function(torch.matmul, (w, g.call_method("t", (w,)))),
    "linear of itself": lambda g, x, w: g.call_function(F.linear, (w, w)),
    "einsum": lambda g, x, w: g.call_function(torch.einsum, ("mk,nk->mn", x, w)),
    "indexing": lambda g, x, w: g.call_function(operator.getitem, (w, 3)),
    "identity permutation": lambda g, x, w: g.call_function(
        torch.matmul, (x, g.call_function(torch.permute, (w, (0, 1))))
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_uses_get_the_dense_tensor_and_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    case = Case(UNSUPPORTED[name], {"x": rand(K, K), "w": rand(K, K, seed=1)}, {"w": sign(K, K)})
    with caplog.at_level(logging.WARNING, "bitdelta_compile"):
        gm, context = case.check()
    assert count(gm, LINEAR) == 0
    assert len(caplog.records) == 1
    assert "layer.w" in caplog.text
    assert len(context.added) == 1


def test_two_other_uses_share_one_dense_tensor_beside_a_packed_use(caplog: pytest.LogCaptureFixture) -> None:
    def build(g: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        y = g.call_function(F.linear, (x, w))
        y = g.call_function(operator.add, (y, g.call_method("sum", (w,))))
        return g.call_function(operator.mul, (y, g.call_method("mean", (w,))))

    case = Case(build, {"x": rand(5, K), "w": rand(N, K) + 1}, {"w": sign(N, K)})
    with caplog.at_level(logging.WARNING, "bitdelta_compile"):
        gm, context = case.check()
    assert count(gm, LINEAR) == 1
    assert len(context.added) == 4
    assert len(caplog.records) == 1
    assert "sum" in caplog.text
    assert "mean" in caplog.text


def test_the_product_of_two_packed_parameters_needs_both_dense() -> None:
    case = Case(
        lambda g, x, a, w: g.call_function(F.linear, (x, g.call_function(torch.matmul, (a, w)))),
        {"x": rand(5, K), "a": rand(N, N), "w": rand(N, K)},
        {"a": sign(N, N), "w": sign(N, K)},
    )
    gm, _ = case.check()
    assert count(gm, LINEAR) == 0


def test_max_norm_is_refused() -> None:
    case = Case(
        lambda g, ids, w: g.call_function(F.embedding, (ids, w), {"max_norm": 1.0}),
        {"ids": torch.arange(3), "w": rand(V, K)},
        {"w": sign(V, K)},
    )
    with pytest.raises(UnsupportedError, match=r"layer\.w.*max_norm"):
        case.rewritten()


def test_stored_rows_on_the_left_are_refused() -> None:
    base = rand(N, K)
    case = Case(
        lambda g, w, x: g.call_function(torch.matmul, (w, x)),
        {"w": base, "x": rand(K, 3)},
        {"w": stored_rows(base, [1], N)},
    )
    with pytest.raises(UnsupportedError, match=r"layer\.w stores changed rows"):
        case.rewritten()


def test_a_delta_without_a_base_parameter_is_refused() -> None:
    case = Case(PRODUCTS["F.linear"][0], {"x": rand(5, K), "w": rand(N, K), "b": rand(N)}, {"w": sign(N, K)})
    parameters = {node: Parameter(p.name, p.encoding, None) for node, p in case.parameters.items()}
    with pytest.raises(UnsupportedError, match=r"layer\.w has a delta but the base has no such parameter"):
        rewrite(case.gm, parameters)


@pytest.mark.parametrize("names", [("0.weight", "1.weight"), ("a.b_c", "a_b.c"), ("a-b", "a.b"), ("class", "def")])
def test_any_qualified_name_makes_a_graph_that_runs(names: tuple[str, str]) -> None:
    case = Case(
        lambda g, x, v, w: g.call_function(F.linear, (g.call_function(F.linear, (x, v)), w)),
        {"x": rand(5, K), "v": rand(K, K), "w": rand(N, K)},
        {"v": sign(K, K), "w": sign(N, K)},
    )
    case.parameters = {
        node: Parameter(name, p.encoding, p.base)
        for name, (node, p) in zip(names, case.parameters.items(), strict=True)
    }
    found, _, context = case.rewritten()
    torch.testing.assert_close(found, case.tuned(), rtol=1e-4, atol=1e-2)
    assert f"{names[0]}.signs" in context.input_names().values()


def test_the_printed_graph_reads_base_linear_packed_delta_add() -> None:
    case = Case(PRODUCTS["F.linear"][0], {"x": rand(5, K), "w": rand(N, K), "b": rand(N)}, {"w": sign(N, K)})
    _, gm, context = case.rewritten()
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [F.linear, LINEAR, operator.add]
    linear, delta, add = calls
    x, w, b = gm.graph.find_nodes(op="placeholder")[:3]
    assert linear.args == (x, w, b)
    assert delta.args[0] is x
    assert add.args == (linear, delta)
    assert gm.graph.output_node().args == (add,)
    assert [(use.name, use.op, use.action) for use in context.uses] == [
        ("layer.w", "linear", "base linear + packed-delta linear (1 sign plane, column scales)")
    ]


def test_half_precision_keeps_its_dtype() -> None:
    inputs = {"x": rand(5, K).bfloat16(), "w": rand(N, K).bfloat16(), "b": rand(N).bfloat16()}
    case = Case(PRODUCTS["F.linear"][0], inputs, {"w": sign(N, K)})
    found, _, _ = case.rewritten()
    exact = F.linear(inputs["x"].float(), case.encodings["w"].apply(inputs["w"]), inputs["b"].float())
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() < 1e-2 * exact.norm()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.first = nn.Linear(K, N)
        self.norm = nn.LayerNorm(N)
        self.second = nn.Linear(N, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.second(self.norm(self.first(self.table(ids)).relu()))
        return out


def model_encodings(model: nn.Module) -> dict[str, Encoding]:
    return {
        "table.weight": sign(V, K),
        "first.weight": sign(N, K, planes=2),
        "first.bias": Dense((N,), torch.float32, rand(N, seed=9)),
        "norm.weight": Same((N,), torch.float32),
        "norm.bias": Dense((N,), torch.float32, rand(N, seed=1)),
        "second.weight": stored_rows(model.get_parameter("second.weight"), [1], V, over=sign(V, N)),
    }


def model_pair() -> tuple[Model, Model, dict[str, Encoding]]:
    """Base, tuned, and the encodings between them."""
    base, tuned = Model(), Model()
    encodings = model_encodings(base)
    tuned.load_state_dict({name: encodings[name].apply(p.detach()) for name, p in base.named_parameters()})
    return base, tuned, encodings


@pytest.mark.parametrize("decompose", [False, True])
def test_graph_from_torch_export(decompose: bool) -> None:
    base, tuned, encodings = model_pair()
    ids = torch.arange(8).view(2, 4)
    program = torch.export.export(base, (ids,))
    if decompose:
        program = program.run_decompositions()
    names = exported_parameter_inputs(program)
    assert set(names.values()) == set(dict(base.named_parameters()))
    state = dict(base.named_parameters())
    gm, context = rewrite(
        program.graph_module,
        {node: Parameter(name, encodings[name], state[name].detach()) for node, name in names.items()},
    )
    assert (count(gm, LINEAR), count(gm, EMBEDDING)) == (2, 1)
    args = [context.values[n.name] if n in names else ids for n in program.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        (found,) = gm(*args, *context.added)
        torch.testing.assert_close(found, tuned(ids), rtol=1e-4, atol=1e-4)


def test_graph_from_make_fx() -> None:
    base, tuned, encodings = model_pair()
    ids, state = torch.arange(8).view(2, 4), {n: p.detach() for n, p in base.named_parameters()}

    def functional(ids: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(base, dict(zip(state, values, strict=True)), (ids,))

    traced = make_fx(functional)(ids, *state.values())
    nodes = traced.graph.find_nodes(op="placeholder")
    parameters = {n: Parameter(name, encodings[name], state[name]) for n, name in zip(nodes[1:], state, strict=True)}
    gm, context = rewrite(traced, parameters)
    assert (count(gm, LINEAR), count(gm, EMBEDDING)) == (2, 1)
    with torch.no_grad():
        found = gm(ids, *(context.values[n.name] for n in nodes[1:]), *context.added)
        torch.testing.assert_close(found, tuned(ids), rtol=1e-4, atol=1e-4)


# Many tenants: every row with the delta of its own slot.

ROWS, PLACES, BIG = 4, 5, 64  # a matrix of BIG by BIG is packed


class Packed(nn.Module):
    """`call(x, w)` with a packed parameter w."""

    def __init__(self, call: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.call, self.w = call, nn.Parameter(rand(*shape))

    def forward(self, x: Tensor) -> Any:
        return self.call(x, self.w)


def packed(call: Callable[..., Any], rows: int = BIG, *, transposed: bool = False) -> tuple[nn.Module, list[Any]]:
    """A module, and encodings of two slots: planes in one; planes, columns and a rank in the other."""
    module = Packed(call, *((BIG, rows) if transposed else (rows, BIG)))
    kinds = ({"planes": 1, "cols": False}, {"planes": 2, "rank": 3})
    return module, [{"w": sign(rows, BIG, transposed=transposed, **kind)} for kind in kinds]  # type: ignore[arg-type]


def positions(x: Tensor) -> Tensor:
    return torch.arange(PLACES, device=x.device)


MANY: dict[str, tuple[Callable[..., Any], bool]] = {
    "linear": (lambda x, w: F.linear(x, w), False),
    "linear of merged rows": (lambda x, w: F.linear(x.view(-1, BIG), w).view(-1, PLACES, BIG), False),
    "linear of a part": (lambda x, w: F.linear(x[:, -1], w), False),
    "x @ w": (lambda x, w: x @ w, True),
    "addmm": (lambda x, w: torch.addmm(torch.ones(BIG), x.view(-1, BIG), w).view(-1, PLACES, BIG), True),
    "w @ x": (lambda x, w: w @ x.transpose(1, 2), False),
    "w @ rows": (lambda x, w: (w @ x[:, 0].T).T, False),
    "lookup": (lambda x, w: F.embedding((x[..., 0].abs() * 9).long(), w), False),
    "lookup of merged rows": (
        lambda x, w: F.embedding((x[..., 0].abs() * 9).long().view(-1), w).view(-1, PLACES, BIG), False
    ),
    "lookup of positions": (lambda x, w: x + F.embedding(positions(x), w), False),
    "lookup of positions, one row": (lambda x, w: x + F.embedding(positions(x)[None], w), False),
    "linear of positions": (lambda x, w: x + F.linear(torch.ones(PLACES, BIG).cumsum(0) * 0.1, w), False),
    "linear of looked up positions": (lambda x, w: x + F.linear(F.embedding(positions(x), w), w), False),
    "tied": (lambda x, w: F.linear(F.embedding((x[..., 0].abs() * 9).long(), w), w), False),
}  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_each_row_has_its_own_delta(many: Any, name: str) -> None:
    call, transposed = MANY[name]
    module, encodings = packed(call, transposed=transposed)
    many(module, rand(ROWS, PLACES, BIG), encodings=encodings).check((1, -1, 0, 1), atol=2e-3)
    many(module, rand(ROWS, PLACES, BIG), encodings=encodings).check((0, -1, 0, 0), atol=2e-3)


REFUSED_LAYOUTS: dict[str, tuple[Callable[..., Any], str]] = {
    "the batch in the middle": (
        lambda x, w: F.linear(x.transpose(0, 1), w),
        "has the batch in dimension 1, not in front",
    ),
    "merged the other way round": (
        lambda x, w: F.linear(x.transpose(0, 1).reshape(-1, BIG), w),
        r"cannot be told apart since reshape",
    ),
    "shuffled rows": (lambda x, w: F.linear(x.flip(0), w), "cannot be told apart since flip"),
    "chosen rows": (lambda x, w: F.linear(x[(x[:, 0, 0] * 0).long()], w), "cannot be told apart since getitem"),
    "chosen ids": (lambda x, w: F.embedding(x[..., 0].long().abs().flip(0), w), "cannot be told apart since flip"),
    "ids with the batch behind": (lambda x, w: F.embedding(x[..., 0].long().abs().T, w), "in dimension 1"),
    "another use": (lambda x, w: x * w.sum(), "there is no packed form for it"),
}


@pytest.mark.parametrize("name", REFUSED_LAYOUTS)
def test_layouts_without_rows_in_front_are_refused_by_name(many: Any, name: str) -> None:
    call, message = REFUSED_LAYOUTS[name]
    module, encodings = packed(call)
    with pytest.raises(NoRowForm, match=rf"w \(it differs in a, b\) is used by .*{message}"):
        many(module, rand(ROWS, PLACES, BIG), encodings=encodings)((0, 1, -1, 0))


def grown_head(call: Callable[..., Any]) -> tuple[nn.Module, list[Any]]:
    """A head of which one slot has two more outputs, another none and its own planes."""
    module = Packed(call, BIG, BIG)
    return module, [{"w": stored_rows(module.w.detach(), [3, BIG, BIG + 1], BIG + 2)}, {"w": sign(BIG, BIG)}]


@pytest.mark.parametrize("cap", [False, True])
def test_logits_past_a_rows_vocabulary(many: Any, cap: bool) -> None:
    """At the graph's output: the cap would make finite numbers of them."""
    module, encodings = grown_head(lambda x, w: torch.tanh(F.linear(x, w)) * 9.0 if cap else F.linear(x[:, -2:], w))
    case = many(module, rand(ROWS, PLACES, BIG), encodings=encodings)
    tenant = (1, -1, 0, 1)
    found = case(tenant)
    for row, slot in enumerate(tenant):
        expected = case.alone(row, slot)
        size = expected.shape[-1]
        assert size == BIG + 2 * (slot == 0)
        torch.testing.assert_close(found[row : row + 1, :, :size], expected, rtol=1e-3, atol=1e-3)
        assert found[row, :, size:].eq(-torch.inf).all()


def test_what_would_see_logits_of_others_tokens_is_refused(many: Any) -> None:
    module, encodings = grown_head(lambda x, w: F.linear(x, w).log_softmax(-1))
    with pytest.raises(NoRowForm, match=r"w .* is used by log_softmax .* tokens that a row's tenant does not have"):
        many(module, rand(ROWS, PLACES, BIG), encodings=encodings)((0, 1, -1, 0))


def test_one_row_has_no_rows_to_tell_apart(many: Any) -> None:
    """Where the batch stands does not matter then."""
    module, encodings = packed(lambda x, w: F.linear(x.transpose(0, 1), w).transpose(0, 1))
    case = many(module, rand(1, PLACES, BIG), rows=1, encodings=encodings)
    torch.testing.assert_close(case((1,)), case.alone(0, 1), rtol=1e-4, atol=1e-3)
    assert torch.equal(case((-1,)), case.alone(0, -1))


def test_the_row_index_is_the_first_added_input(many: Any) -> None:
    module, encodings = packed(MANY["linear"][0])
    gm = many(module, rand(ROWS, PLACES, BIG), encodings=encodings).check((1, -1, 0, 1), atol=2e-3)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    assert names.index("tenant") == len(names) - 6  # then signs, scales of rows and columns, left, right
    assert count(gm, LINEAR) == 1
