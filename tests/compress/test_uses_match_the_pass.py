"""The recorder that decides encodings and the pass that rewrites graphs recognise the same calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bitdelta_compile.compress.uses import Use, UseRecorder
from bitdelta_compile.graph.patterns import View, embedding_ids, linear_use, uses_of

N, K = 6, 4
X = torch.randn(3, K)
IDS = torch.tensor([[0, 5], [2, 2]])

FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "F.linear": ("linear", lambda w: F.linear(X, w)),
    "F.linear by keyword": ("linear", lambda w: F.linear(input=X, weight=w)),
    "F.linear of weight.T": ("linear", lambda w: F.linear(X[:, :1].expand(3, N), w.T)),
    "addmm": ("linear", lambda w: torch.addmm(torch.zeros(N), X, w.T)),
    "addmm by keyword": ("linear", lambda w: torch.addmm(input=torch.zeros(N), mat1=X, mat2=w.T)),
    "Tensor.addmm": ("linear", lambda w: torch.zeros(3, N).addmm(X, w.T)),
    "addmm, beta": ("other", lambda w: torch.addmm(torch.zeros(N), X, w.T, beta=2)),
    "addmm, alpha": ("other", lambda w: torch.addmm(torch.zeros(N), X, w.T, alpha=2)),
    "addmm, left": ("other", lambda w: torch.addmm(torch.zeros(3), w, X.T)),
    "addmm, bias": ("other", lambda w: torch.addmm(w, torch.ones(N, 2), torch.ones(2, K))),
    "mm": ("linear", lambda w: torch.mm(X, w.t())),
    "Tensor.mm": ("linear", lambda w: X.mm(w.transpose(0, 1))),
    "matmul": ("linear", lambda w: torch.matmul(X, w.permute(1, 0))),
    "matmul by keyword": ("other", lambda w: torch.matmul(input=X, other=w.T)),
    "Tensor.matmul": ("linear", lambda w: X.matmul(w.T)),
    "@": ("linear", lambda w: X @ w.mT),
    "@, left": ("linear", lambda w: w @ X.T),
    "@, left, vector": ("linear", lambda w: w @ X[0]),
    "@, left, transposed": ("linear", lambda w: w.T @ X[:, :1].expand(3, N).T),
    "Tensor.mm, left": ("linear", lambda w: w.mm(X.T)),
    "einsum": ("other", lambda w: torch.einsum("bk,nk->bn", X, w)),
    "F.embedding": ("embedding", lambda w: F.embedding(IDS, w)),
    "torch.embedding": ("embedding", lambda w: torch.embedding(w, IDS)),
    "F.embedding of weight.T": ("other", lambda w: F.embedding(IDS[:, 1:] % K, w.T)),
    "elementwise": ("other", lambda w: w * 2),
}


class Model(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K))
        self.form = form

    def forward(self) -> Tensor:
        return self.form(self.weight)


def seen_by_the_pass(node: fx.Node, view: View) -> tuple[str, bool]:
    if product := linear_use(node, view):
        return "linear", product.transposed
    return ("embedding" if embedding_ids(node, view) else "other"), False


@pytest.mark.parametrize("form", FORMS)
def test_both_read_a_call_alike(form: str) -> None:
    expected, call = FORMS[form]
    model = Model(call)
    captured: list[tuple[str, bool]] = []
    recorded: dict[str, list[Use]] = {"graph": [], "module": []}

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        placeholders = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        (weight,) = [node for node, value in placeholders if value is model.weight]
        captured.extend(dict.fromkeys(seen_by_the_pass(*use) for use in uses_of(weight)))
        with torch.no_grad(), UseRecorder({"weight": model.weight}, recorded["graph"].append):
            gm(*inputs)
        return gm.forward

    torch.compiler.reset()
    torch.compile(model, backend=backend, fullgraph=True)()
    with UseRecorder({"weight": model.weight}, recorded["module"].append):
        model()
    assert [kind for kind, _ in captured] == [expected]
    for uses in recorded.values():
        assert [(use.kind, use.transposed) for use in uses] == captured
