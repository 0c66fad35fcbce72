from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitdelta_compile.compress.uses import Use, UseRecorder


def record(parameters, run):
    found: list[Use] = []
    with UseRecorder(parameters, found.append):
        run()
    return found


def signature(uses):
    return [(use.name, use.kind, use.transposed) for use in uses]


N, K = 6, 4
X = torch.randn(3, K)
W = torch.randn(N, K)
C = torch.randn(K, N)  # stored [K, N], as GPT-2's Conv1D does
IDS = torch.tensor([[0, 5], [2, 2]])

PRODUCTS = {
    "F.linear": (W, lambda w: F.linear(X, w, torch.zeros(N)), False),
    "F.linear by keyword": (W, lambda w: F.linear(X, weight=w), False),
    "F.linear of a view": (C, lambda c: F.linear(X, c.t()), True),
    "x @ W.T": (W, lambda w: X @ w.T, False),
    "x @ W.mT": (W, lambda w: X @ w.mT, False),
    "matmul transpose(0, 1)": (W, lambda w: torch.matmul(X, w.transpose(0, 1)), False),
    "operator.matmul": (C, lambda c: operator.matmul(X, c), True),
    "mm": (C, lambda c: torch.mm(X, c), True),
    "Tensor.mm": (W, lambda w: X.mm(w.t()), False),
    "addmm": (C, lambda c: torch.addmm(torch.zeros(N), X, c), True),
    "W @ x.T": (W, lambda w: w @ X.T, False),
    "W @ vector": (W, lambda w: w @ X[0], False),
    "C.T @ x.T": (C, lambda c: c.T @ X.T, True),
    "aten.linear": (W, lambda w: torch.ops.aten.linear.default(X, w), False),
    "aten.mm": (C, lambda c: torch.ops.aten.mm.default(X, c), True),
    "detached": (W, lambda w: F.linear(X, w.detach()), False),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_shows_its_orientation_and_its_input(case):
    weight, run, transposed = PRODUCTS[case]
    (use,) = record({"w": weight}, lambda: run(weight))
    assert (use.name, use.kind, use.transposed) == ("w", "linear", transposed)
    operand = use.operand.reshape(-1, K)
    assert torch.equal(operand, X[:1] if case == "W @ vector" else X)


@pytest.mark.parametrize(
    "run",
    [
        lambda: F.embedding(IDS, W),
        lambda: torch.embedding(W, IDS),
        lambda: torch.ops.aten.embedding.default(W, IDS),
        lambda: nn.Embedding.from_pretrained(W)(IDS),
    ],
)
def test_a_lookup_shows_its_ids(run):
    (use,) = record({"w": W}, run)
    assert (use.kind, use.transposed) == ("embedding", False)
    assert torch.equal(use.operand, IDS)


OTHERS = {
    "elementwise": lambda: W * 2,
    "slice": lambda: F.linear(X, W[:3]),
    "converted": lambda: F.linear(X.double(), W.double()),
    "reshaped": lambda: F.linear(torch.randn(2, N), W.reshape(K, N)),
    "both sides": lambda: W @ W.T,
    "alpha": lambda: torch.addmm(torch.zeros(N), X, W.T, alpha=2.0),
    "beta": lambda: torch.addmm(torch.zeros(N), X, W.T, beta=0.5),
    "addmm on the left": lambda: torch.addmm(torch.zeros(3), W, X.T),
    "operands by keyword": lambda: torch.matmul(input=X, other=W.T),
    "einsum": lambda: torch.einsum("bk,nk->bn", X, W),
    "einsum that sums n": lambda: torch.einsum("bk,nk->b", X, W),
    "bag of rows": lambda: F.embedding_bag(IDS, W),
    "indexed": lambda: W[IDS],
    "transposed lookup": lambda: F.embedding(torch.tensor([0]), W.T),
    "norm": lambda: W.norm(),
}


@pytest.mark.parametrize("case", OTHERS)
def test_anything_else_is_other(case):
    uses = record({"w": W}, OTHERS[case])
    assert uses
    assert {use.kind for use in uses} == {"other"}


def test_queries_and_views_are_no_uses():
    def run():
        _ = W.shape, W.dtype, W.device, W.t(), W.T, W.detach(), W.size(0), W.dim(), W[:2], W.chunk(2)

    assert record({"w": W}, run) == []


def test_other_tensors_are_not_mistaken_for_the_parameter():
    twin = W.clone()
    assert record({"w": W}, lambda: F.linear(X, twin)) == []


def test_parameters_that_share_one_storage_are_told_apart():
    packed = torch.randn(2 * N * K)
    first, second = packed[: N * K].view(N, K), packed[N * K :].view(N, K)
    uses = record({"a": first, "b": second}, lambda: (F.linear(X, second), X @ first.T))
    assert signature(uses) == [("b", "linear", False), ("a", "linear", False)]


def test_tied_names_are_reported_once():
    table = nn.Parameter(torch.randn(N, K))
    uses = record({"embed": table, "head": table}, lambda: F.linear(F.embedding(IDS, table), table))
    assert signature(uses) == [("embed", "embedding", False), ("embed", "linear", False)]


def test_meta_tensors_and_modules():
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(N, K), nn.Linear(K, K), nn.LayerNorm(K))
        ids = torch.zeros(2, 3, dtype=torch.int64)
    uses = record(dict(model.named_parameters()), lambda: model(ids))
    assert [(use.name, use.kind) for use in uses] == [
        ("0.weight", "embedding"),
        ("1.weight", "linear"),
        ("1.bias", "other"),
        ("2.weight", "other"),
        ("2.bias", "other"),
    ]


def test_an_fx_graph_of_torch_calls():
    model = nn.Sequential(nn.Linear(K, N), nn.GELU())
    graph = torch.fx.symbolic_trace(model)
    uses = record(dict(model.named_parameters()), lambda: graph(X))
    assert signature(uses)[0] == ("0.weight", "linear", False)


def test_the_result_is_untouched_and_the_callback_may_compute():
    sums = []
    with UseRecorder({"w": W}, lambda use: sums.append((use.operand @ W.T).sum())):
        result = F.linear(X, W)
    assert torch.equal(result, F.linear(X, W))
    assert len(sums) == 1
