"""Models and inputs out of the ordinary: a right result, or an error that says what to do."""

from __future__ import annotations

import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import bitdelta_compile as bdc
from bitdelta_compile.compress import budget, sequence
from bitdelta_compile.compress.encode import encode
from bitdelta_compile.compress.settings import Allocation, Settings
from bitdelta_compile.compress.streams import Run, Stream
from bitdelta_compile.compress.weights import TunedValues
from bitdelta_compile.encodings import Sign
from bitdelta_compile.errors import CalibrationError, UnsupportedError
from bitdelta_compile.fidelity import verify

K = 64


class Net(nn.Module):
    """Two linears with biases over all rows at once, as GPT-2 has them, and one logit."""

    def __init__(self, seed=0, step=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.score = nn.Linear(K, 96), nn.Linear(96, K), nn.Linear(K, 1)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += step * torch.randn_like(parameter)

    def forward(self, x, attention_mask=None):
        hidden = self.second(self.first(x.view(-1, K)).relu()).view(x.shape)
        return SimpleNamespace(logits=self.score(hidden.tanh()))


def pair(step=0.01):
    return Net(), Net(1, step)


def batch(seed=0, rows=4, length=20, **others):
    return {"x": torch.randn(rows, length, K, generator=torch.Generator().manual_seed(seed)), **others}


def restored(delta, base):
    model = Net()
    model.load_state_dict(dict(delta.materialize(base, dtype=torch.float32)))
    return model


def same_bytes(folder, *deltas):
    for place, delta in enumerate(deltas):
        delta.save(folder / str(place))
    contents = [(folder / str(place)).read_bytes() for place in range(len(deltas))]
    return all(content == contents[0] for content in contents)


def test_a_budget_over_one_logit():
    """Of which every softmax is 1: what is lost is then a distance."""
    base, tuned = pair()
    delta = bdc.compress(base, tuned, [batch()], bits=8.0, quality="fast")
    x = batch(1)["x"]
    with torch.no_grad():
        before, found, expected = (model(x).logits for model in (base, restored(delta, base), tuned))
    assert (found - expected).norm() < 0.3 * (before - expected).norm()


def test_a_budget_where_tokens_are_masked():
    nothing = {"attention_mask": torch.zeros(4, 20)}
    base, tuned = pair()
    assert bdc.compress(base, tuned, [batch(**nothing), batch(1)], bits=4.0, quality="fast").encodings
    with pytest.raises(CalibrationError, match="every token"):
        bdc.compress(base, tuned, [batch(**nothing)], bits=4.0, quality="fast")


def test_a_budget_over_the_weights_alone(llama_pair, tmp_path):
    delta = bdc.compress(llama_pair.base, llama_pair.tuned, method="mean_abs", bits=6.0)
    delta.save(tmp_path / "delta")
    weights = sum(torch.Size(encoding.shape).numel() for encoding in delta.encodings.values())
    assert 8 * (tmp_path / "delta").stat().st_size <= 6.0 * weights
    with pytest.raises(UnsupportedError, match="a number above 0, got inf"):
        bdc.compress(llama_pair.base, llama_pair.tuned, bits=float("inf"))


def test_a_budget_is_measured_where_it_is_computed(monkeypatch):
    places = []

    def watched(*args, **options):
        places.append(options.get("device"))
        return encode(*args, **options)

    monkeypatch.setattr(budget, "encode", watched)
    bdc.compress(*pair(), [batch()], bits=4.0, quality="fast", device="cpu")
    assert places
    assert set(places) == {torch.device("cpu")}


@pytest.mark.parametrize("method", ["sequential", "closed_form", "mean_abs"])
def test_a_tuned_matrix_of_zeros_is_stored_outright(method):
    base, tuned = pair()
    with torch.no_grad():
        tuned.second.weight.zero_()
    delta = bdc.compress(base, tuned, [batch()], method=method)
    assert delta.encodings["second.weight"].kind == "dense"
    assert delta.encodings["first.weight"].kind == "sign"
    assert not restored(delta, base).second.weight.any()


@pytest.mark.parametrize("method", ["sequential", "closed_form"])
def test_matrices_passed_on_the_way_leave_no_copies(method, monkeypatch):
    torch.manual_seed(0)
    tuned = {f"w{n}": (torch.randn(K, K) / 8).bfloat16() for n in range(6)}
    base = {**tuned, "w5": tuned["w5"] + 0.01 * torch.randn(K, K).bfloat16()}
    held, matrix = [], TunedValues.matrix

    def watched(self, name):
        found = matrix(self, name)
        held.append(len(self._wide))
        return found

    def call():
        x = torch.randn(40, K, generator=torch.Generator().manual_seed(0))
        for weight in tuned.values():
            x = F.linear(x, weight).tanh()

    monkeypatch.setattr(TunedValues, "matrix", watched)
    encode(base, tuned, [Run(call), Run(call)], Settings(method))
    assert max(held) == 1


def test_a_matrix_refused_later_leaves_its_bias_alone():
    base, tuned = pair()
    handles = dict(tuned.named_parameters())

    def call(also):
        x = tuned.first(batch()["x"].view(-1, K) + 1)
        return tuned.second(x.relu() + tuned.first.weight.sum() if also else x.relu())

    runs = [Run(lambda: call(False)), Run(lambda: call(True))]
    found, report = encode(dict(base.named_parameters()), handles, runs, Settings("sequential"))
    assert "used by" in report["first.weight"]["why"]
    assert torch.equal(found["first.bias"].value, tuned.first.bias)
    assert not torch.equal(found["second.bias"].value, tuned.second.bias)


def test_what_only_a_later_batch_reaches_is_fitted_to_its_inputs():
    base, tuned = pair()
    named = dict(base.named_parameters()), dict(tuned.named_parameters())

    def run(further):
        x = torch.randn(200, K, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, K)
        y = F.linear(x, tuned.first.weight)
        return F.linear(y, tuned.second.weight) if further else y

    short, far = Run(lambda: run(False)), Run(lambda: run(True))
    found, _ = encode(*named, [short, far], Settings("closed_form"))
    alone, _ = encode(*named, [far], Settings("closed_form"))
    without, _ = encode(*named, [short], Settings("closed_form"))
    scales = [each["second.weight"].row_scale for each in (found, alone, without)]
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[0], scales[2])


def test_work_on_another_dtype_is_refused(tmp_path):
    base, tuned = (model.bfloat16() for model in pair())
    bdc.compress(base, tuned, [batch()], work_dir=tmp_path)
    with pytest.raises(UnsupportedError, match="its dtypes is another"):
        bdc.compress(base.float(), tuned.float(), [batch()], work_dir=tmp_path)


def test_a_mask_counts_where_tokens_are_in_one_dimension(tmp_path):
    mask = torch.arange(20) < torch.tensor([5, 20, 1, 9]).unsqueeze(-1)
    one, other = batch(attention_mask=mask), batch(attention_mask=mask)
    other["x"] = torch.where(mask.unsqueeze(-1), other["x"], 100.0)
    assert same_bytes(tmp_path, bdc.compress(*pair(), [one]), bdc.compress(*pair(), [other]))


def test_matrices_that_are_dense_on_request_are_no_other_model():
    base, tuned = pair()
    asked = {name: Allocation("dense") for name in ("first.weight", "second.weight")}
    delta = bdc.compress(base, tuned, [batch()], allocation=asked)
    assert all(encoding.kind == "dense" for encoding in delta.encodings.values())


def test_inputs_of_any_size():
    large, small = batch(), batch()
    large["x"][..., 3] = 1.7e18
    small["x"] *= 1e-20
    with pytest.raises(CalibrationError, match=r"first\.weight: .* enormous"):
        bdc.compress(*pair(), [large])
    scale = bdc.compress(*pair(), [small]).encodings["first.weight"].row_scale
    assert bool((scale > 0).all() and scale.isfinite().all())


@pytest.mark.parametrize("name", ["MambaForCausalLM", "OpenAIGPTLMHeadModel"])
def test_language_models_without_a_cache_of_keys_and_values_write_too(name):
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "state_size": 4, "n_positions": 64}
    config = model_class.config_class(**sizes, n_embd=64, n_layer=1, n_head=2)
    models = []
    for seed in (0, 1):
        torch.manual_seed(0)
        models.append(model_class(config))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in models[-1].parameters() if seed else ():
                parameter += 0.002 * torch.randn_like(parameter)
    delta = bdc.compress(*models, tokens=40)
    assert delta.options["calibration"] == "sampled"
    assert any(isinstance(encoding, Sign) for encoding in delta.encodings.values())


def test_very_many_batches_are_warned_about(caplog):
    bdc.compress(*pair(), [batch(seed, 1, 2) for seed in range(65)], quality="fast")
    assert any("fewer and larger" in record.message for record in caplog.records)
    caplog.clear()
    bdc.compress(*pair(), [batch()], quality="fast")
    assert not caplog.records


def test_under_inference_mode(tmp_path):
    expected = bdc.compress(*pair(), [batch()])
    with torch.inference_mode():
        found = bdc.compress(*pair(), [batch()])
    assert same_bytes(tmp_path, expected, found)


def test_models_in_fp64():
    base, tuned = (model.double() for model in pair())
    delta = bdc.compress(base, tuned, [{"x": batch()["x"].double()}])
    single = bdc.compress(*pair(), [batch()])
    for name in ("first.weight", "second.weight"):
        agree = (delta.encodings[name].signs ^ single.encodings[name].signs) == 0
        assert agree.float().mean() > 0.9
    assert restored(delta, base).first.weight.dtype == torch.float32


def test_a_config_without_a_model_type(llama_pair, tmp_path):
    for name in ("base", "tuned"):
        shutil.copytree(getattr(llama_pair, name), tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["model_type"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    delta = bdc.compress(tmp_path / "base", tmp_path / "tuned", tokens=40)
    assert delta.options["calibration"] == "sampled"


def test_weights_alone_of_a_folder_that_reads_no_tokens(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(0)
        model = transformers.ViTModel(config, add_pooling_layer=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter += 0.002 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    delta = bdc.compress(tmp_path / "base", tmp_path / "tuned", method="mean_abs")
    assert any(isinstance(encoding, Sign) for encoding in delta.encodings.values())
    with pytest.raises(CalibrationError, match="neither a tokenizer nor a vocabulary"):
        verify(delta, tmp_path / "base", tmp_path / "tuned")


def test_streams_unwind_even_if_waiting_for_them_is_interrupted(monkeypatch):
    _, tuned = pair()
    handles = dict(tuned.named_parameters())
    before = set(threading.enumerate())
    runs = [Run(lambda: tuned(**batch())) for _ in range(3)]
    found = sequence.arrivals(runs, handles, {"first.weight"}, TunedValues(handles), None, lambda use: None)
    next(found)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
