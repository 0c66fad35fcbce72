"""A quantized base: what its weights are taken for, the delta over it, and compiling it for one fine-tune or many."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing._internal.two_tensor import TwoTensor

import bitdelta_compile as bdc
from bitdelta_compile import quantized
from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.errors import BaseMismatchError, UnsupportedError
from bitdelta_compile.fidelity import verify
from bitdelta_compile.quantized import Values, is_quantized, same, stored_bytes, values

Quantize = Callable[[nn.Module, str], nn.Module]

V, K, N = 100, 64, 96


class Net(nn.Module):
    """A table, two linears of one shape, a bias, and a linear too small for planes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.up = nn.Linear(K, N)
        self.middle = nn.Linear(N, N)
        self.again = nn.Linear(N, N, bias=False)
        self.small = nn.Linear(N, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.table(ids)).relu()
        return self.small(self.again(self.middle(x).relu()).tanh())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def perturbed(base: nn.Module, seed: int, scale: float = 0.01) -> nn.Module:
    tuned = copy.deepcopy(base)
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        parameter += scale * torch.randn_like(parameter)
    return tuned


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, 6), generator=torch.Generator().manual_seed(seed))


def restored(delta: bdc.Delta, base: nn.Module) -> nn.Module:
    """Base + delta as a dense model."""
    model = net()
    model.load_state_dict(dict(delta.materialize(base, dtype=torch.float32)))
    return model


def share(found: Tensor, expected: Tensor, base: Tensor) -> float:
    """Distance to what is expected as a share of the base's."""
    return float((found - expected).norm() / (base - expected).norm())


@pytest.fixture(scope="module", params=["int8", "int4", "int4 packed"])
def base(request: pytest.FixtureRequest, quantize: Quantize) -> nn.Module:
    return quantize(net(), request.param)


@pytest.fixture(scope="module")
def delta(base: nn.Module) -> bdc.Delta:
    return bdc.compress(base, perturbed(net(), 1), [{"ids": tokens(64)}], quality="fast")


def test_a_quantized_weight_is_told_by_its_class(base: nn.Module) -> None:
    weight = base.up.weight
    assert is_quantized(weight)
    assert type(values(weight)) is Tensor
    x = torch.randn(3, K)
    torch.testing.assert_close(nn.functional.linear(x, weight), nn.functional.linear(x, values(weight)))
    assert 0.5 * K * N < stored_bytes(weight) < 1.3 * K * N  # at most a byte per weight, and scales
    plain = nn.Parameter(torch.ones(3))
    assert not is_quantized(plain)
    assert values(plain) is plain
    assert stored_bytes(plain) == 12
    assert not is_quantized(TwoTensor(torch.ones(3), torch.ones(3)))  # a wrapper without a dequantize of its own
    assert not is_quantized(None)


def test_weights_are_the_same_when_all_their_parts_are(base: nn.Module) -> None:
    middle, again = base.middle.weight, base.again.weight
    assert same(middle, copy.deepcopy(middle))
    assert not same(middle, again)
    assert not same(middle, values(middle))


def test_values_are_there_until_others_are_asked_for(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(quantized, "values", lambda tensor: made.append(tensor) or values(tensor))
    held = Values({"middle": base.middle.weight, "again": base.again.weight, "table": base.table.weight})
    assert ("middle" in held, "none" in held, len(held)) == (True, False, 3)
    assert not made
    first = held["middle"]
    assert first.equal(values(base.middle.weight))
    assert held["middle"] is first
    assert held["table"] is base.table.weight
    gone = weakref.ref(first)
    del first
    assert held["again"].equal(values(base.again.weight))
    assert gone() is None
    assert len(made) == 2


def test_a_checkpoint_has_the_values_and_knows_what_is_tied(base: nn.Module) -> None:
    checkpoint = open_checkpoint(base)
    assert not checkpoint.tied
    assert checkpoint.tensor("middle.weight").equal(values(base.middle.weight))
    assert is_quantized(checkpoint.held("middle.weight"))
    tied = copy.deepcopy(base)
    tied.again.weight = tied.middle.weight
    assert open_checkpoint(tied).tied == {"again.weight": "middle.weight"}


def test_a_delta_makes_up_for_quantization(base: nn.Module) -> None:
    original = net()
    delta = bdc.compress(base, original, [{"ids": tokens(64)}], quality="fast")
    assert delta.encodings["table.weight"].kind == "same"
    assert delta.encodings["middle.weight"].kind == "sign"
    ids = tokens(32, 1)
    found, expected, before = (model(ids) for model in (restored(delta, base), original, base))
    assert share(found, expected, before) < 0.75


def test_a_delta_of_the_plain_base_is_refused_and_the_other_way_round(base: nn.Module, delta: bdc.Delta) -> None:
    plain = net()
    foreign = bdc.compress(plain, perturbed(plain, 1), method="mean_abs")
    with pytest.raises(BaseMismatchError, match=r"is quantized \(.*compress the fine-tune against this base"):
        bdc.attach(base, {"a": foreign})
    with pytest.raises(BaseMismatchError, match="is quantized"):
        next(iter(foreign.materialize(base)))
    with pytest.raises(Exception, match="is quantized") as error:
        torch.compile(base, backend="bitdelta", options={"delta": foreign, "lower": "eager"})(tokens(2))
    assert isinstance(getattr(error.value, "inner_exception", None), BaseMismatchError)
    with pytest.raises(BaseMismatchError, match="give the base that it was compressed against"):
        bdc.attach(plain, {"a": delta})


def test_only_the_base_may_be_quantized(base: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"up\.weight of the fine-tune is quantized"):
        bdc.compress(net(), base)
    with pytest.raises(Exception, match=r"up\.weight of the fine-tune is quantized"):
        torch.compile(copy.deepcopy(base), backend="bitdelta", options={"base": net(), "lower": "eager"})(tokens(2))


def test_another_dtype_is_refused(base: nn.Module) -> None:
    tuned = perturbed(net(), 1).bfloat16()
    with pytest.raises(Exception, match="convert the base to that dtype before quantizing it"):
        torch.compile(tuned, backend="bitdelta", options={"base": base, "lower": "eager"})(tokens(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, K)
        self.head = nn.Linear(K, V, bias=False)
        self.head.weight = self.table.weight


def test_a_head_that_quantizing_has_untied_is_refused(quantize: Quantize) -> None:
    tuned = Tied()
    with pytest.raises(UnsupportedError, match=r"leave head\.weight out when quantizing"):
        bdc.compress(quantize(copy.deepcopy(tuned), "int8"), tuned, method="mean_abs")


@pytest.mark.parametrize("way", ["delta", "base"])
def test_one_fine_tune_in_one_graph(base: nn.Module, delta: bdc.Delta, way: str) -> None:
    tuned = perturbed(net(), 1)
    model, given = (base, {"delta": delta}) if way == "delta" else (copy.deepcopy(tuned), {"base": base})
    torch._dynamo.reset()
    counters.clear()
    options = {**given, "lower": "eager"}
    compiled = torch.compile(model, backend="bitdelta", dynamic=True, fullgraph=True, options=options)
    for rows in (3, 5):
        ids = tokens(rows, rows)
        expected, before = restored(delta, base)(ids), base(ids)
        if way == "delta":
            assert share(compiled(ids), expected, before) < 1e-4
        else:  # fitted to this call's tokens, so to other figures
            assert share(compiled(ids), tuned(ids), before) < 0.75
    assert counters["stats"]["unique_graphs"] == 1
    assert "base linear + packed-delta linear" in str(bdc.explain(compiled))
    assert is_quantized(base.up.weight)


def test_released_weights_stay_where_the_base_is_quantized(base: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    tuned = perturbed(net(), 1)
    kept = tuned.up.weight.clone()
    options = {"base": base, "lower": "eager", "release": True}
    torch.compile(tuned, backend="bitdelta", options=options)(tokens(2))
    assert "up.weight keeps its tuned weights, which cannot share a quantized tensor" in caplog.text
    assert tuned.up.weight.equal(kept)
    assert tuned.table.weight.data_ptr() == base.table.weight.data_ptr()


def test_many_tenants_in_one_graph(base: nn.Module, delta: bdc.Delta, tmp_path: Path) -> None:
    torch._dynamo.reset()
    other = bdc.compress(base, perturbed(net(), 2), [{"ids": tokens(64)}], quality="fast")
    other.save(tmp_path / "b.bitdelta.safetensors")
    dense = {"a": restored(delta, base), "b": restored(other, base)}
    model = bdc.attach(base, {"a": delta}, lower="eager", slots=3)
    model.add("b", tmp_path / "b.bitdelta.safetensors")
    for names in (["a", None, "b"], ["b", "b", None, "a", "a"]):
        ids = tokens(len(names), len(names))
        found, before = model(ids, tenants=names), base(ids)
        for row, name in enumerate(names):
            if name is None:
                torch.testing.assert_close(found[row], before[row], rtol=1e-5, atol=1e-6)
            else:
                assert share(found[row], dense[name](ids)[row], before[row]) < 1e-4
    assert model._graphs.graphs == 1
    with pytest.raises(UnsupportedError, match="move or convert the base"):
        model.to(torch.bfloat16)


class Short(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def test_inductor_compiles_the_base_linear_and_the_delta(quantize: Quantize) -> None:
    torch.manual_seed(0)
    plain = Short().eval().requires_grad_(False)
    base = quantize(copy.deepcopy(plain), "int8")
    delta = bdc.compress(base, perturbed(plain, 1), method="mean_abs")
    dense = copy.deepcopy(plain)
    dense.load_state_dict(dict(delta.materialize(base, dtype=torch.float32)))
    torch._dynamo.reset()
    one = torch.compile(base, backend="bitdelta", dynamic=True, fullgraph=True, options={"delta": delta})
    many = bdc.attach(base, {"a": delta})
    for rows in (3, 5):
        x = torch.randn(rows, 2, K)
        before, expected = base(x), dense(x)
        assert share(one(x), expected, before) < 1e-4
        found = many(x, tenants=["a", *[None] * (rows - 2), "a"])
        assert share(found[[0, -1]], expected[[0, -1]], before[[0, -1]]) < 1e-4
        torch.testing.assert_close(found[1:-1], before[1:-1], rtol=1e-5, atol=1e-6)
    assert many._graphs.graphs == 1


def test_a_transformers_model(quantize: Quantize, bert_pair: Any) -> None:
    import transformers

    load = transformers.AutoModel.from_pretrained
    tuned = load(bert_pair.tuned).eval()
    base = quantize(load(bert_pair.base), "int8")
    delta = bdc.compress(base, tuned, quality="fast")
    recovered = verify(delta, base, bert_pair.tuned).recovered
    assert recovered is not None
    assert recovered > 0.4
    assert delta.encodings["encoder.layer.0.attention.self.query.weight"].kind == "sign"
    ids = torch.randint(64, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = bdc.attach(base, {"a": delta}, lower="eager")
    found = model(**batch, tenants=["a", None, "a"]).last_hidden_state
    with torch.no_grad():
        expected, before = (each(**batch).last_hidden_state for each in (tuned, base))
    assert share(found[[0, 2]], expected[[0, 2]], before[[0, 2]]) < 0.75
    torch.testing.assert_close(found[1], before[1], rtol=1e-4, atol=1e-5)
