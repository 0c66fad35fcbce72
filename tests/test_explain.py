"""The table and the graphs that `explain` prints."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitdelta_compile as bdc
from bitdelta_compile.errors import BitDeltaError

V, H = 100, 64


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Body(nn.Module):
    """A table that is also the head, a layer, a parameter that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.layer(self.table(ids))))
        return out


class WithHead(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.layer = nn.Linear(V, 3)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.layer(self.body(ids))
        return out


def pair() -> tuple[Body, Body]:
    base = Body()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if not name.startswith("norm"):
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return base, tuned


def run(model: nn.Module, **options: Any) -> Any:
    compiled = torch.compile(model, backend="bitdelta", options={"lower": "eager", **options})
    with torch.no_grad():
        compiled(torch.arange(6).view(2, 3))
    return compiled


def test_every_parameter_with_its_encoding_bytes_and_uses() -> None:
    base, tuned = pair()
    explanation = bdc.explain(run(tuned, base=base))
    lines = {line.name: line for line in explanation.lines}
    assert {name: line.kind for name, line in lines.items()} == {
        "table.weight": "sign",
        "layer.weight": "sign",
        "layer.bias": "dense",
        "norm.weight": "same",
        "norm.bias": "same",
    }
    table, layer = lines["table.weight"], lines["layer.weight"]
    assert len(table.actions) == 2
    assert any(action.startswith("base embedding + packed-delta embedding") for action in table.actions)
    assert any(action.startswith("base linear + packed-delta linear") for action in table.actions)
    assert (layer.weights, layer.tuned_bytes) == (H * H, H * H * 4)
    assert layer.delta_bytes == H * H // 8 + 4 * H + 4 * H  # signs, row scales, column scales
    assert lines["norm.weight"].delta_bytes == 0
    assert lines["layer.bias"].actions == ("tuned tensor in place of the base's",)
    assert explanation.tuned_bytes == sum(p.nbytes for p in tuned.parameters())
    assert explanation.delta_bytes == sum(line.delta_bytes for line in explanation.lines)
    text = str(explanation).splitlines()
    assert len(text) == len(lines) + 2
    assert text[-1].split() == ["all", f"{sum(p.numel() for p in tuned.parameters()):,}",
                                f"{explanation.tuned_bytes:,}", f"{explanation.delta_bytes:,}"]  # fmt: skip
    assert [json.loads(json.dumps(dataclasses.asdict(line)))["name"] for line in explanation.lines] == list(lines)


def test_a_model_and_its_compiled_form_are_explained_alike() -> None:
    base, tuned = pair()
    compiled = run(tuned, base=base)
    assert str(bdc.explain(tuned)) == str(bdc.explain(compiled))


def test_the_graph_of_one_layer() -> None:
    base, tuned = pair()
    explanation = bdc.explain(run(tuned, base=base))
    linear, delta, add = explanation.graph("layer").splitlines()
    assert linear.split(" = ")[1].startswith("linear(")
    assert "layer.weight, layer.bias" in linear
    assert "bitdelta.delta_linear(" in delta
    assert "layer.weight.signs, layer.weight.row_scale" in delta
    names = [line.split(" = ")[0] for line in (linear, delta)]
    assert add.split(" = ")[1] == " + ".join(names)
    assert linear in explanation.graph()
    assert "layer_norm" in explanation.graph()
    assert explanation.graph("nothing") == ""


def test_the_own_parameters_of_a_wrapper() -> None:
    base, tuned = pair()
    lines = bdc.explain(run(WithHead(tuned), base=base)).lines
    assert [(line.name, line.tuned_bytes) for line in lines if line.kind == "own"] == [
        ("layer.weight", 3 * V * 4),
        ("layer.bias", 3 * 4),
    ]
    assert len(lines) == 7


def test_a_delta_by_itself_and_on_its_base() -> None:
    base, tuned = pair()
    delta = bdc.compress(base, tuned, tokens=256)
    plain = {line.name: line for line in bdc.explain(delta).lines}
    compiled = {line.name: line for line in bdc.explain(run(base, delta=delta)).lines}
    assert {name: line.kind for name, line in plain.items()} == {name: line.kind for name, line in compiled.items()}
    assert all(line.actions == () for line in plain.values())


def test_nothing_to_explain() -> None:
    with pytest.raises(BitDeltaError, match="compile the model"):
        bdc.explain(nn.Linear(2, 2))
