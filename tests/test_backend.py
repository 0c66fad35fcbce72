"""The backend end to end: options, both routes against dense fp32 weights, graph breaks, sharing, release."""

from __future__ import annotations

import copy
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import bitdelta_compile as bdc
from bitdelta_compile import sources
from bitdelta_compile.backend import parse_options
from bitdelta_compile.encodings import Encoding
from bitdelta_compile.errors import BitDeltaError, UnsupportedError

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
EAGER = {"lower": "eager"}
V, H = 100, 64


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fine_tuned(base: nn.Module, amount: float = 0.1) -> nn.Module:
    """A copy with every parameter perturbed by a share of its spread, constant ones by 0.01."""
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += (amount * spread if spread else 0.01) * noise.to(parameter.dtype)
    return tuned


def materialized(base: nn.Module, tuned: nn.Module, encodings: Mapping[str, Encoding]) -> nn.Module:
    """The fp32 model that the encodings stand for: over the base, tuned's own parameters where they have none."""
    model = copy.deepcopy(tuned).float()
    named = dict(base.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in encodings:
                parameter.copy_(encodings[name].apply(named[name].detach()))
    return model


def encodings_of(base: nn.Module) -> dict[str, Encoding]:
    """What the backend made of the models compiled against this base."""
    return {
        parameter.name: parameter.encoding
        for source in sources._sources[base].values()
        for parameter in [each.bound for each in source._encoded.values()]  # type: ignore[union-attr]
    }


def error(found: Tensor, exact: Tensor, base: Tensor) -> float:
    """Error as a share of the base-to-tuned distance."""
    exact, base = exact.detach().double(), base.detach().double()
    return float((found.detach().double() - exact).norm() / (base - exact).norm())


class Classifier(nn.Module):
    """Embedding, two linears, a norm: everything that is rewritten, small enough for Inductor."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(V, H)
        self.first = nn.Linear(H, 96)
        self.norm = nn.LayerNorm(96)
        self.second = nn.Linear(96, H)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.tanh(self.norm(self.first(self.table(ids)))))
        return hidden


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(nn.Linear(H, H))
        self.far = nn.Sequential(nn.Linear(H, H))

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(x)
        torch._dynamo.graph_break()
        x = self.far(x)
        return x


class Broken(nn.Module):
    """Graph breaks inside blocks whose parameters have the same last names: Dynamo serves both with the same graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.a = Block()
        self.b = Block()

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.b(self.a(self.table(ids)))
        return hidden


def ids(batch: int = 3, length: int = 5, vocabulary: int = V) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="bitdelta", options={**EAGER, **options})


def check(run: Callable[..., Any], base: nn.Module, tuned: nn.Module, *args: Tensor, limit: float = 1e-3) -> None:
    """`run` against dense fp32 weights; `tuned` may have been released: its encodings say what it was."""
    with torch.no_grad():
        found = run(*args)
        exact = materialized(base, tuned, encodings_of(base))(*args)
        assert found.dtype == next(tuned.parameters()).dtype
        assert error(found, exact, copy.deepcopy(base).float()(*args)) <= limit


class Loop(nn.Module):
    """A graph break in a loop: Dynamo leaves the loop to eager."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.layers = nn.ModuleList(nn.Linear(H, H) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.table(ids)
        return self.body(hidden)

    def body(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
            torch._dynamo.graph_break()
        return hidden


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of the two"),
        ({"base": nn.Linear(2, 2), "delta": "x"}, "exactly one of the two"),
        ({"base": "bert"}, "option base must be a loaded model"),
        ({"delta": 3}, "option delta must be a Delta or a path"),
        ({"base": nn.Linear(2, 2), "lower": "fast"}, "option lower"),
        ({"base": nn.Linear(2, 2), "release": "no"}, "option release"),
        ({"base": nn.Linear(2, 2), "planes": 5}, "planes must be an integer, 1 to 4"),
        ({"base": nn.Linear(2, 2), "planes": "2"}, "planes must be an integer"),
        ({"base": nn.Linear(2, 2), "rank": 1.5}, "rank must be an integer"),
        ({"base": nn.Linear(2, 2), "rank": -1}, "rank must be an integer, 0 or more"),
        ({"base": nn.Linear(2, 2), "method": "best"}, "method must be"),
        ({"base": nn.Linear(2, 2), "max_autotun": True}, 'unknown option "max_autotun"'),
        ({"base": nn.Linear(2, 2), "mode": "fastest"}, "unknown mode 'fastest'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_options(options)


def test_compression_options_do_not_go_with_a_delta() -> None:
    base = Classifier()
    delta = bdc.compress(base, fine_tuned(base), method="mean_abs")
    with pytest.raises(UnsupportedError, match="option planes belongs to compression"):
        parse_options({"delta": delta, "planes": 2})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BitDeltaError, match=r"cannot open the delta .*nothing\.safetensors: No such file"):
        parse_options({"delta": tmp_path / "nothing.safetensors"})


def test_inductor_options_and_mode_pass_through() -> None:
    base = nn.Linear(2, 2)
    assert parse_options({"base": base, "mode": "default"}).inductor == {}
    assert parse_options({"base": base, "max-autotune": False}).inductor == {"max_autotune": False}
    found = parse_options({"base": base, "mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}).inductor
    assert found["max_autotune"] is True
    assert found["epilogue_fusion"] is False


def test_errors_reach_the_caller_of_the_compiled_model() -> None:
    with pytest.raises(BackendCompilerFailed, match="exactly one of the two"):
        torch.compile(Classifier(), backend="bitdelta")(ids())


# Architectures


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=H, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.BertModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=H, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=V, d_model=H, d_kv=32, d_ff=96, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def call(model: Any, kind: str, tokens: Tensor) -> Tensor:
    kwargs = {"decoder_input_ids": tokens} if kind == "t5" else {}
    found: Tensor = model(input_ids=tokens, **kwargs, **({} if kind == "bert" else {"use_cache": False}))[0]
    return found


ARCHITECTURES = {"bert": bert, "llama": llama, "gpt2": gpt2, "t5": t5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_both_routes_match_dense_fp32_weights_at_every_batch_size(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = ARCHITECTURES[kind]().eval().to(dtype)
    # bf16 rounds the activations themselves to 0.4 %: the distance must be visible beside that.
    tuned = fine_tuned(base, 0.1 if dtype == torch.float32 else 0.3)
    wide_base = copy.deepcopy(base).float()
    delta = bdc.compress(base, tuned, tokens=256, quality="fast")  # of noise, all weights matter alike
    assert sum(encoding.kind == "sign" for encoding in delta.encodings.values()) >= 6
    routes: dict[str, tuple[Any, nn.Module]] = {}
    with torch.no_grad():
        exact = materialized(base, tuned, delta.encodings)
        for route in ("base", "delta"):
            torch._dynamo.utils.counters.clear()
            model = compiled(tuned, base=base) if route == "base" else compiled(base, delta=delta)
            for batch in (1, 2, 3, 64):
                tokens = ids(batch, 40 if batch == 1 else 4)
                found = call(model, kind, tokens)
                if batch == 1 and route == "base":
                    exact_base = materialized(base, tuned, encodings_of(base))
                wide = call(exact if route == "delta" else exact_base, kind, tokens)
                plain = call(wide_base, kind, tokens)
                assert (plain - wide).norm() > 0.02 * wide.norm()
                assert error(found, wide, plain) <= TOLERANCE[dtype], (route, batch)
            assert graphs() <= 3
            routes[route] = model, exact if route == "delta" else exact_base
    kinds = {line.kind for line in bdc.explain(routes["base"][0]).lines}
    assert "own" not in kinds
    assert kinds <= {"sign", "dense"}


# Inductor


def test_inductor_runs_the_rewritten_graph_with_its_own_options() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    options = {"base": base, "mode": "default", "max_autotune": False}
    model = torch.compile(tuned, backend="bitdelta", options=options)
    for batch in (1, 2, 5, 64):
        check(model, base, tuned, ids(batch))
    assert graphs() <= 3
    assert "delta_linear" in bdc.explain(model).graph("first")


# Graphs


@pytest.mark.parametrize("route", ["base", "delta"])
def test_graph_breaks_inside_submodules_find_their_parameters(route: str) -> None:
    base = Broken()
    tuned = fine_tuned(base)
    delta = bdc.compress(base, tuned, tokens=256)
    model = compiled(tuned, base=base) if route == "base" else compiled(base, delta=delta)
    with torch.no_grad():
        found = model(ids())
        encodings = encodings_of(base) if route == "base" else delta.encodings
        assert error(found, materialized(base, tuned, encodings)(ids()), base(ids())) <= 1e-3
    assert graphs() >= 3
    assert set(encodings) == set(dict(base.named_parameters()))


def test_layers_left_to_eager_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    base = Loop()
    model = compiled(base, delta=bdc.compress(base, fine_tuned(base), tokens=256))
    with torch.no_grad(), caplog.at_level(logging.WARNING, "bitdelta_compile.sources"):
        model(ids())
        model(ids())
        model(ids())
    warnings = [record.message for record in caplog.records if record.name == "bitdelta_compile.sources"]
    assert len(warnings) == 1
    assert "4 parameters" in warnings[0]
    assert "layers.0.bias" in warnings[0]
    assert "eager" in warnings[0]


def test_inference_mode() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    model = compiled(tuned, base=base)
    with torch.inference_mode():
        model(ids())
    check(model, base, tuned, ids())
    found = model(ids())
    assert error(found, materialized(base, tuned, encodings_of(base))(ids()), base(ids())) <= 1e-3


def test_layers_of_one_shape_encoded_otherwise_share_no_code(caplog: pytest.LogCaptureFixture) -> None:
    base = Broken()
    tuned = fine_tuned(base)
    with torch.no_grad():
        tuned.b.near[0].weight.copy_(base.b.near[0].weight)
    model = compiled(tuned, base=base)
    with caplog.at_level(logging.WARNING, "bitdelta_compile"):
        check(model, base, tuned, ids())
    assert "b.near.0.weight" in caplog.text
    assert "encoded otherwise" in caplog.text


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_compiled_one_by_one_share_the_code_and_not_the_delta() -> None:
    base = Stack()
    tuned = fine_tuned(base)
    for layer in tuned.layers:
        layer.compile(backend="bitdelta", options={"base": base})
    x = torch.randn(3, H, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = tuned(x)
        exact = Stack()
        exact.load_state_dict({name: e.apply(base.get_parameter(name)) for name, e in encodings_of(base).items()})
        assert error(found, exact(x), base(x)) <= 1e-3
    assert graphs() == 1


def test_graphs_share_one_packed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    encoded: list[str] = []
    encode = sources.encode

    def counting(base: Any, tuned: Any, *rest: Any, **options: Any) -> Any:
        encoded.extend(tuned)
        return encode(base, tuned, *rest, **options)

    monkeypatch.setattr(sources, "encode", counting)
    model = compiled(tuned, base=base)
    for batch in (1, 2, 3):
        check(model, base, tuned, ids(batch))
    assert graphs() > 1
    assert sorted(encoded) == sorted(name for name, _ in tuned.named_parameters())


def test_a_delta_file_is_opened_once_and_lives_as_long_as_its_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Classifier()
    path = tmp_path / "tuned.bitdelta.safetensors"
    bdc.compress(base, fine_tuned(base), tokens=256).save(path)
    opened: list[weakref.ref[Any]] = []
    load = bdc.Delta.load

    def counting(path: Any) -> Any:
        delta = load(path)
        opened.append(weakref.ref(delta))
        return delta

    monkeypatch.setattr(bdc.Delta, "load", counting)
    model = compiled(base, delta=str(path))
    with torch.no_grad():
        for batch in (1, 2, 3):
            model(ids(batch))
    assert graphs() > 1
    assert len(opened) == 1
    gc.collect()
    assert opened[0]() is not None
    del model
    torch._dynamo.reset()
    gc.collect()
    assert opened[0]() is None


def test_the_base_is_freed_with_the_compiled_model() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    model = compiled(tuned, base=base)
    model(ids())
    gone = weakref.ref(base)
    del base, model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_weights_loaded_later_are_compressed_anew() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    check(compiled(tuned, base=base), base, tuned, ids())
    other = fine_tuned(base, 0.2)
    tuned.load_state_dict(other.state_dict())
    torch._dynamo.reset()
    check(compiled(tuned, base=base), base, other, ids())
    for name, encoding in encodings_of(base).items():
        near, far = other.get_parameter(name), base.get_parameter(name)
        assert error(encoding.apply(far.detach()), near, far) < 0.7


def test_two_fine_tunes_of_one_base() -> None:
    base = Classifier()
    for amount in (0.05, 0.2):
        tuned = fine_tuned(base, amount)
        check(compiled(tuned, base=base), base, tuned, ids())


class Wrapper(nn.Module):
    """A fine-tune with a head of its own, which has the name of a layer of the base."""

    def __init__(self, body: nn.Module, *, breaks: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.breaks = breaks
        self.body = body
        self.head = nn.Sequential(nn.Linear(H, H))
        self.extra = nn.ModuleDict({"first": nn.Linear(H, H)})

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(ids)
        if self.breaks:
            torch._dynamo.graph_break()
        found: Tensor = self.extra["first"](self.head(hidden))
        return found


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("route", ["base", "delta"])
def test_a_wrapper_keeps_its_own_head(route: str, breaks: bool) -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    delta = bdc.compress(base, tuned, tokens=256)
    wrapped = Wrapper(tuned if route == "base" else base, breaks=breaks)
    model = compiled(wrapped, base=base) if route == "base" else compiled(wrapped, delta=delta)
    with torch.no_grad():
        found = model(ids())
        encodings = encodings_of(base) if route == "base" else delta.encodings
        exact = Wrapper(materialized(base, tuned, encodings), breaks=False)
        plain = Wrapper(base, breaks=False)
        assert error(found, exact(ids()), plain(ids())) <= 1e-3
    own = {line.name for line in bdc.explain(model).lines if line.kind == "own"}
    assert own == {"head.0.weight", "head.0.bias", "extra.first.weight", "extra.first.bias"}


@pytest.mark.parametrize("route", ["base", "delta"])
def test_a_function_over_a_model(route: str) -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    delta = bdc.compress(base, tuned, tokens=256)
    subject = tuned if route == "base" else base

    def pooled(tokens: Tensor) -> Tensor:
        out: Tensor = subject(tokens).mean(1)
        return out

    model = compiled(pooled, base=base) if route == "base" else compiled(pooled, delta=delta)
    with torch.no_grad():
        found = model(ids())
        encodings = encodings_of(base) if route == "base" else delta.encodings
        assert error(found, materialized(base, tuned, encodings)(ids()).mean(1), base(ids()).mean(1)) <= 1e-3


def test_names_that_start_with_a_digit() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(V, H), nn.Linear(H, H))
    tuned = fine_tuned(base)
    check(compiled(tuned, base=base), base, tuned, ids())


# What does not belong together


class Stranger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(V, H)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.words(ids)
        return out


@pytest.mark.parametrize("route", ["base", "delta"])
def test_a_model_that_shares_no_name_is_refused(route: str) -> None:
    base = Classifier()
    options: dict[str, Any] = (
        {"base": base} if route == "base" else {"delta": bdc.compress(base, fine_tuned(base), tokens=256)}
    )
    with pytest.raises(BackendCompilerFailed, match="their names have nothing in common"):
        compiled(Stranger(), **options)(ids())


def test_a_model_that_shares_names_only_is_refused() -> None:
    base = Classifier()
    with pytest.raises(BackendCompilerFailed, match=r"none of the 3 matrices of this graph is near the base's"):
        compiled(Classifier(seed=1), base=base)(ids())


def test_a_delta_for_another_base_is_refused_by_name() -> None:
    base = Classifier()
    delta = bdc.compress(base, fine_tuned(base), tokens=256)
    with pytest.raises(BackendCompilerFailed, match=r"not the base the delta was made for: table\.weight holds"):
        compiled(Classifier(seed=1), delta=delta)(ids())


def test_one_parameter_of_another_base_is_refused_by_name() -> None:
    base = Classifier()
    delta = bdc.compress(base, fine_tuned(base), tokens=256)
    with torch.no_grad():
        base.second.weight += 0.1
    with pytest.raises(BackendCompilerFailed, match=r"second\.weight holds"):
        compiled(base, delta=delta)(ids())


# Dtypes and modes


class TwoTables(nn.Module):
    """A lookup and a head of one shape, tied or not."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.head = nn.Linear(H, V, bias=False)
        if tie:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.table(ids)))
        return logits


@pytest.mark.parametrize(("base_tied", "way_out"), [(True, "untie them"), (False, "tie the base's weights")])
def test_weights_tied_on_one_side_only_are_refused(base_tied: bool, way_out: str) -> None:
    base, tuned = TwoTables(base_tied), TwoTables(not base_tied)
    with torch.no_grad():
        tuned.table.weight.copy_(base.table.weight + 0.01 * torch.randn(V, H))
        if base_tied:
            tuned.head.weight.copy_(base.table.weight + 0.01 * torch.randn(V, H))
    delta = bdc.compress(base, tuned, tokens=256)
    compiled = torch.compile(base, backend="bitdelta", options={"delta": delta, **EAGER})
    with pytest.raises(BackendCompilerFailed, match=way_out) as caught, torch.no_grad():
        compiled(torch.arange(5))
    assert "table.weight" in str(caught.value)
    assert "head.weight" in str(caught.value)


def test_base_in_another_dtype_warns_and_is_right(caplog: pytest.LogCaptureFixture) -> None:
    base = Classifier()
    tuned = fine_tuned(base).bfloat16()
    model = compiled(tuned, base=base)
    with caplog.at_level(logging.WARNING, "bitdelta_compile"), torch.no_grad():
        found = model(ids())
        exact = materialized(copy.deepcopy(base).bfloat16(), tuned, encodings_of(base))(ids())
        assert error(found, exact, base(ids())) <= 3e-2
    assert "first.weight is torch.float32 in the base and torch.bfloat16 in the tuned model" in caplog.text


def test_an_fp32_delta_on_a_bf16_copy_of_its_base() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    delta = bdc.compress(base, tuned, tokens=256)
    half = copy.deepcopy(base).bfloat16()
    with torch.no_grad():
        exact = materialized(copy.deepcopy(half).float(), tuned, delta.encodings)(ids())
        found = compiled(half, delta=delta)(ids())
        assert found.dtype == torch.bfloat16
        assert error(found, exact, base(ids())) <= 3e-2


@pytest.mark.parametrize("route", ["base", "delta"])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_grad_mode_gives_the_same_numbers(route: str, lower: str) -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    delta = bdc.compress(base, tuned, tokens=256)
    options: dict[str, Any] = {"base": base} if route == "base" else {"delta": delta}
    model = compiled(tuned if route == "base" else base, **options, lower=lower)
    found = model(ids())
    encodings = encodings_of(base) if route == "base" else delta.encodings
    assert error(found, materialized(base, tuned, encodings)(ids()), base(ids())) <= 1e-3


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("route", ["base", "delta"])
def test_autocast(route: str, inside: bool) -> None:
    base = Classifier()
    tuned = fine_tuned(base, 0.3)
    delta = bdc.compress(base, tuned, tokens=256)
    subject = tuned if route == "base" else base

    def within(tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = subject(tokens)
            return out

    model = compiled(within if inside else subject, **({"base": base} if route == "base" else {"delta": delta}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        found = model(ids())
    assert found.dtype == torch.bfloat16
    with torch.no_grad():
        encodings = encodings_of(base) if route == "base" else delta.encodings
        assert error(found, materialized(base, tuned, encodings)(ids()), base(ids())) <= 3e-2


# Release


def test_release_lets_go_of_the_tuned_weights() -> None:
    base = Broken()
    tuned = fine_tuned(base)
    expected = copy.deepcopy(tuned)
    old = [weakref.ref(parameter.untyped_storage()) for parameter in tuned.parameters()]
    model = compiled(tuned, base=base, release=True)
    for batch in (1, 2, 3):
        with torch.no_grad():
            found = model(ids(batch))
            assert error(found, expected(ids(batch)), base(ids(batch))) < 0.8  # one bit of a random delta: 0.6
        check(model, base, expected, ids(batch))
    gc.collect()
    assert all(reference() is None for reference in old)
    theirs = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr()


@pytest.mark.parametrize("route", ["base", "delta", "release"])
def test_a_model_converted_after_its_first_call(route: str) -> None:
    base = Classifier()
    tuned = fine_tuned(base, 0.3)
    ids = torch.randint(V, (8, 5))
    exact, plain = tuned(ids), base(ids)
    options: dict[str, Any] = {"delta": bdc.compress(base, tuned, tokens=256)} if route == "delta" else {"base": base}
    if route == "release":
        options["release"] = True
    model = base if route == "delta" else tuned
    compiled = torch.compile(model, backend="bitdelta", options={**options, **EAGER})
    with torch.no_grad():
        before = compiled(ids)
        model.to(torch.bfloat16)
        after = compiled(ids)
    assert after.dtype == torch.bfloat16
    assert error(before, exact, plain) < 0.8
    assert error(after, before, plain) < 3e-2
    assert "sign" in str(bdc.explain(compiled))


def test_release_does_not_go_with_a_delta() -> None:
    base = Classifier()
    delta = bdc.compress(base, fine_tuned(base), tokens=256)
    with pytest.raises(BackendCompilerFailed, match="leave the option out"):
        compiled(base, delta=delta, release=True)(ids())


RESIDENT = """
import ctypes, gc, resource, torch
from torch import nn
torch.set_num_threads(1)
def resident():
    gc.collect(); ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
def model():
    return nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(3)))
base, tuned = model(), model()
with torch.no_grad():
    for a, b in zip(base.parameters(), tuned.parameters()):
        b.copy_(a + 1e-4)
options = {"base": base, "release": True, "lower": "eager", "method": "mean_abs"}
run = torch.compile(tuned, backend="bitdelta", options=options)
before = resident()
with torch.no_grad():
    run(torch.ones(1, 4096))
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_release_returns_the_memory() -> None:
    """Three matrices of 64 MiB go, their packed deltas (2 MiB each) come."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 100


class Head(nn.Module):
    def __init__(self, labels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, labels)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(x))
        return scores


def test_a_head_of_another_size_is_refused_by_name() -> None:
    base, tuned = Head(2), fine_tuned(Head(3))
    compiled = torch.compile(
        base, backend="bitdelta", options={"delta": bdc.compress(base, tuned, tokens=256), **EAGER}
    )
    with pytest.raises(BackendCompilerFailed, match=r"head.*has shape \[2.* and \[3.*num_labels"), torch.no_grad():
        compiled(torch.randn(4, H))


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    base = Head(2)
    delta = bdc.compress(base, fine_tuned(base), tokens=256)
    delta.encodings["head.bias"].tensors()["value"][0] = float("nan")
    compiled = torch.compile(base, backend="bitdelta", options={"delta": delta, **EAGER})
    with pytest.raises(BackendCompilerFailed, match=r"head.bias: value holds NaN"), torch.no_grad():
        compiled(torch.randn(4, H))


def test_the_last_graph_that_torch_allows_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    base = Head(2)
    options = {"delta": bdc.compress(base, fine_tuned(base), tokens=256), **EAGER}
    compiled = torch.compile(base, backend="bitdelta", options=options, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3), torch.no_grad(), caplog.at_level(logging.ERROR):
        for rows in (1, 2):
            compiled(torch.randn(rows, H))
        assert "dynamic=True" not in caplog.text
        compiled(torch.randn(3, H))
    assert "dynamic=True" in caplog.text


def test_released_weights_do_not_pass_for_a_fine_tune() -> None:
    base = Head(2)
    tuned = fine_tuned(base)
    x = torch.randn(4, H)
    with torch.no_grad():
        torch.compile(tuned, backend="bitdelta", options={"base": base, "release": True, **EAGER})(x)
        again = torch.compile(tuned, backend="bitdelta", options={"base": base, "planes": 2, **EAGER})
        with pytest.raises(BackendCompilerFailed, match=r"weights of body.weight were released"):
            again(x)
    with pytest.raises(UnsupportedError, match=r"were released"):
        bdc.compress(base, tuned, tokens=256)


def test_weights_written_after_the_first_call_count_at_the_next() -> None:
    base = Head(2)
    tuned, other = fine_tuned(base), fine_tuned(base, 0.3)
    x = torch.randn(4, H)
    compiled = torch.compile(tuned, backend="bitdelta", options={"base": base, **EAGER})
    with torch.no_grad():
        compiled(x)
        tuned.load_state_dict(other.state_dict())
        found = compiled(x)
        assert error(found, other(x), base(x)) < 0.8
        assert graphs() == 1
        assert "sign" in str(bdc.explain(compiled))


def test_a_base_written_to_after_the_first_call_is_checked_again() -> None:
    base = Head(2)
    delta = bdc.compress(base, fine_tuned(base), tokens=256)
    x = torch.randn(4, H)
    with torch.no_grad():
        torch.compile(base, backend="bitdelta", options={"delta": delta, **EAGER})(x)
        base.body.weight.normal_()
        torch._dynamo.reset()
        with pytest.raises(BackendCompilerFailed, match=r"not the base.*body.weight"):
            torch.compile(base, backend="bitdelta", options={"delta": delta, **EAGER})(x)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(H, H))
        self.second = nn.Parameter(torch.randn(H, H))

    def forward(self, v: Tensor) -> Tensor:
        return self.second @ (self.first @ v)


def test_products_with_a_vector_one_after_the_other() -> None:
    base = Chain()
    tuned = fine_tuned(base)
    v = torch.randn(H)
    compiled = torch.compile(tuned, backend="bitdelta", options={"base": base, **EAGER})
    with torch.no_grad():
        found = compiled(v)
        dense = materialized(base, tuned, encodings_of(base))
        assert error(found, dense(v), base(v)) < 1e-3


@pytest.mark.parametrize("resized", [False, True])
def test_a_vocabulary_that_grew(resized: bool) -> None:
    """The table and the head have three rows more in the fine-tune; the base may have been resized for it or not."""
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    tuned = copy.deepcopy(base)
    tuned.resize_token_embeddings(93, mean_resizing=False)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.004)
    delta = bdc.compress(base, tuned, method="mean_abs")
    dense = copy.deepcopy(tuned)
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for name, value in delta.materialize(base, dtype=torch.float32):
            parameters[name].copy_(value)
    if resized:
        base.resize_token_embeddings(93, mean_resizing=False)
    ids = torch.tensor([[1, 5, 91, 92, 7]])
    compiled = torch.compile(base, backend="bitdelta", options={"delta": delta, "lower": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    """Writes to its buffers, and to a cache that the caller gives."""

    calls: Tensor
    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(H))

    def forward(self, x: Tensor, cache: Tensor, at: Tensor) -> Tensor:
        self.calls.add_(1)
        out: Tensor = self.linear(x)
        self.running.mul_(0.9).add_(out.mean(0))
        cache.index_add_(0, at, out)
        return out + cache.sum(0)


def test_compressing_while_compiling_leaves_what_the_graph_writes_to() -> None:
    torch.manual_seed(0)
    base = Counting()
    tuned = fine_tuned(base)
    model, x, at = copy.deepcopy(tuned), torch.randn(4, H), torch.arange(4)
    caches = [torch.zeros(8, H), torch.zeros(8, H)]
    with torch.no_grad():
        found = compiled(model, base=base)(x, caches[0], at)
        expected = tuned(x, caches[1], at)
        plain = copy.deepcopy(base)(x, torch.zeros(8, H), at)
    assert int(model.calls) == 1
    for one, other in ((found, expected), (caches[0], caches[1])):
        assert float((one - other).norm()) < 0.7 * float((expected - plain).norm())


def test_other_values_in_data_are_compressed_anew() -> None:
    base = Classifier()
    tuned = fine_tuned(base)
    other = fine_tuned(base, 0.2)
    model = compiled(tuned, base=base)
    model(ids())
    for parameter, given in zip(tuned.parameters(), other.parameters(), strict=True):
        parameter.data = given.data.clone()
    with torch.no_grad():
        assert error(model(ids()), other(ids()), base(ids())) < 0.8
