from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from bitdelta_compile import released
from bitdelta_compile.compress import compress
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, CalibrationError, UnsupportedError

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    return transformers.BertModel(
        transformers.BertConfig(**SIZES, intermediate_size=96, max_position_embeddings=80, pad_token_id=0)
    )


def llama(tied=True, attention_bias=False):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES,
            intermediate_size=96,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attention_bias=attention_bias,
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=80, bos_token_id=0, eos_token_id=0
        )
    )


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    )


def qwen2():
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SIZES, intermediate_size=96, num_key_value_heads=2, use_sliding_window=False, tie_word_embeddings=True
        )
    )


BUILDERS = {
    "bert": bert,
    "llama": llama,
    "llama untied": lambda: llama(tied=False),
    "gpt2": gpt2,
    "t5": t5,
    "qwen2": qwen2,
}


def fine_tune(base, step=0.05):
    """A copy whose every parameter moved by `step` of its own size."""
    torch.manual_seed(1)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            scale = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.02
            parameter += step * scale * torch.randn_like(parameter)
    return tuned


@dataclasses.dataclass
class Built:
    base: nn.Module
    tuned: nn.Module
    folders: tuple[str, str]


@pytest.fixture(scope="module", params=BUILDERS)
def built(request, tmp_path_factory):
    torch.manual_seed(0)
    base = BUILDERS[request.param]().eval()
    tuned = fine_tune(base)
    folder = tmp_path_factory.mktemp("models")
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(folder / name)
    return Built(base, tuned, (str(folder / "base"), str(folder / "tuned")))


def outputs(model):
    ids = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(5))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **extra)[0]


def restored(delta, base, tuned):
    model = copy.deepcopy(tuned)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # so that one the delta forgets shows
    unexpected = model.load_state_dict(dict(delta.materialize(base, dtype=torch.float32)), strict=False).unexpected_keys
    assert not unexpected
    return outputs(model)


def left_of_gap(delta, built):
    expected = outputs(built.tuned)
    gap = (outputs(built.base) - expected).norm()
    return float((restored(delta, built.base, built.tuned) - expected).norm() / gap)


@pytest.mark.parametrize("form", ["modules", "folders"])
def test_architectures(built, form):
    base, tuned = (built.base, built.tuned) if form == "modules" else built.folders
    fitted, mean_abs = compress(base, tuned, tokens=256), compress(base, tuned, method="mean_abs")
    assert left_of_gap(fitted, built) < 0.7
    assert left_of_gap(mean_abs, built) < 0.9
    for delta in (fitted, mean_abs):
        kinds = {name: encoding.kind for name, encoding in delta.encodings.items()}
        big = [name for name, encoding in delta.encodings.items() if len(encoding.shape) == 2]
        matrices = [name for name in big if delta.encodings[name].shape[0] * delta.encodings[name].shape[1] >= 4096]
        assert matrices
        assert {kinds[name] for name in matrices} == {"sign"}
        assert {kinds[name] for name in kinds if name not in matrices} == {"dense"}
        assert set(delta.encodings).isdisjoint(delta.tied)
        for name in matrices:
            assert delta.encodings[name].transposed == any(part in name for part in ("c_attn", "c_proj", "c_fc"))
    if isinstance(built.base, transformers.LlamaForCausalLM | transformers.Qwen2ForCausalLM):
        names = {"model.embed_tokens.weight", "lm_head.weight"} & set(fitted.encodings)
        assert len(names) == (1 if built.base.config.tie_word_embeddings else 2)


def test_modules_and_folders_give_the_same_delta(built):
    ours, theirs = compress(built.base, built.tuned, tokens=128), compress(*built.folders, tokens=128)
    alias = {canonical: name for name, canonical in ours.tied.items()}
    for name, encoding in theirs.encodings.items():
        same = ours.encodings[name] if name in ours.encodings else ours.encodings[ours.tied.get(name, alias.get(name))]
        assert encoding.tensors().keys() == same.tensors().keys()
        for field, value in encoding.tensors().items():
            assert torch.equal(value, same.tensors()[field])


def test_planes_and_rank_close_the_gap(built):
    few = {"tokens": 256, "quality": "fast"}
    errors = [left_of_gap(compress(built.base, built.tuned, planes=planes, **few), built) for planes in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]
    fits = [compress(built.base, built.tuned, rank=rank, **few).report["parameters"] for rank in (0, 2, 16)]
    for name, figures in fits[0].items():
        if "error" in figures:
            assert fits[2][name]["error"] < fits[1][name]["error"] < figures["error"]


def test_qualities_in_order(pair):
    built = Built(*pair, ("", ""))
    batches = [{"input_ids": torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(n))} for n in range(4)]
    errors = [left_of_gap(compress(*pair, batches, quality=quality), built) for quality in ("fast", "balanced", "best")]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.96 * errors[0]


def test_the_models_are_untouched(built):
    before = {name: value.clone() for name, value in built.tuned.state_dict().items()}
    built.tuned.train()
    delta = compress(built.base, built.tuned, tokens=128)
    assert built.tuned.training
    built.tuned.eval()
    for name, value in built.tuned.state_dict().items():
        assert torch.equal(value, before[name])
    storages = {value.data_ptr() for value in built.tuned.state_dict().values()}
    for encoding in delta.encodings.values():
        assert storages.isdisjoint(tensor.data_ptr() for tensor in encoding.tensors().values())


@pytest.fixture
def pair():
    torch.manual_seed(0)
    base = llama()
    return base, fine_tune(base)


def test_given_batches_and_stages(pair):
    stages = []
    batches = [{"input_ids": torch.randint(96, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}]
    delta = compress(*pair, iter(batches), rank=1, progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["fit"]
    assert delta.options["calibration"] == "batches"
    stages.clear()
    delta = compress(*pair, tokens=128, progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["sample", "fit"]
    assert delta.options["calibration"] == "sampled"


def test_sampled_tokens_beside_given_ones(pair, tmp_path):
    batches = [{"input_ids": torch.arange(18).view(2, 9)}]
    stages = []
    delta = compress(*pair, batches, sampled=64, work_dir=tmp_path, progress=lambda stage, *_: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["sample", "fit"]
    assert (delta.options["calibration"], delta.options["sampled"]) == ("batches", 64)
    compress(*pair, batches, sampled=64).save(tmp_path / "anew")
    compress(*pair, batches, sampled=64, work_dir=tmp_path).save(tmp_path / "resumed")
    delta.save(tmp_path / "first")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "anew").read_bytes()
    assert (tmp_path / "first").read_bytes() == (tmp_path / "resumed").read_bytes()
    name = next(name for name, encoding in delta.encodings.items() if encoding.kind == "sign")
    both, given = (each.encodings[name] for each in (delta, compress(*pair, batches)))
    drawn = compress(*pair, tokens=64).encodings[name]
    assert not torch.equal(both.row_scale, given.row_scale)
    assert not torch.equal(both.row_scale, drawn.row_scale)


def test_sampled_tokens_where_there_is_nothing_to_stand_beside_or_nobody_writes(pair, bert_pair):
    for wrong in (-1, 0.5):
        with pytest.raises(UnsupportedError, match="0 or more"):
            compress(*pair, [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], sampled=wrong)
    with pytest.raises(UnsupportedError, match=r"beside texts \(--text\) or batches"):
        compress(*pair, sampled=64)
    with pytest.raises(UnsupportedError, match="mean_abs reads no tokens"):
        compress(*pair, [{"input_ids": torch.ones(1, 4)}], sampled=64, method="mean_abs")
    with pytest.raises(UnsupportedError, match="writes no text"):
        compress(bert_pair.base, bert_pair.tuned, ["the value of python"], sampled=64)


def test_sampled_tokens_beside_batches_without_ids(pair):
    """A tied table stands at its head in one run and at its lookup in the others."""
    batches = [{"inputs_embeds": torch.randn(2, 9, pair[0].config.hidden_size)}]
    assert compress(*pair, batches, sampled=64).options["sampled"] == 64


def test_texts_need_a_tokenizer(pair):
    with pytest.raises(CalibrationError, match="tokenizer"):
        compress(*pair, ["some text"])


def test_texts_with_the_folder_of_the_tokenizer(bert_pair):
    delta = compress(bert_pair.base, bert_pair.tuned, ["the value of python", "language is not a value"])
    assert delta.options["calibration"] == "texts"
    with pytest.raises(CalibrationError, match="no token"):
        compress(bert_pair.base, bert_pair.tuned, [" "])


def test_empty_calibration(pair):
    with pytest.raises(CalibrationError, match="empty"):
        compress(*pair, [])


def test_overflowing_activations_are_named(pair):
    class Overflow(nn.Module):
        def forward(self, x):
            return x / 0

    pair[1].model.layers[0].input_layernorm = Overflow()
    with pytest.raises(CalibrationError, match=r"weight: the inputs it meets"):
        compress(*pair, [{"input_ids": torch.ones(1, 5, dtype=torch.int64)}])
    with pytest.raises(CalibrationError, match="infinite logits"):
        compress(*pair)


@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_are_not_finite(pair, side):
    with torch.no_grad():
        pair[side].model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(BitDeltaError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 6144"):
        compress(*pair)


def plain():
    return nn.Sequential(nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 64, bias=False))


def test_a_plain_module(caplog):
    base = plain()
    tuned = fine_tune(base)
    blind = compress(base, tuned)
    assert "no config with a vocabulary" in caplog.text
    fitted = compress(base, tuned, [{"input": torch.randn(100, 64) + 1}])
    for name in ("0.weight", "2.weight"):
        assert blind.encodings[name].kind == fitted.encodings[name].kind == "sign"
    d = tuned[0].weight - base[0].weight
    assert fitted.report["parameters"]["0.weight"]["error"] < 0.6
    half = blind.encodings["0.weight"].delta()
    assert torch.allclose(half.abs().mean(-1), d.abs().mean(-1), rtol=0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 5e5),
        ("rms_norm_eps", 1e-3),
        ("num_attention_heads", 8),
        ("hidden_act", "gelu"),
    ],
)
@pytest.mark.parametrize("method", ["closed_form", "mean_abs"])
def test_another_graph_is_refused_by_name(tmp_path, pair, key, value, method):
    for model, name in zip(pair, ("base", "tuned"), strict=True):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "tuned" / "config.json"
    config = json.loads(file.read_text())
    (config["rope_parameters"] if key == "rope_theta" else config)[key] = value
    if key == "num_attention_heads":
        config["head_dim"] = 16
    file.write_text(json.dumps(config))
    with pytest.raises(BaseMismatchError, match=key):
        compress(tmp_path / "base", tmp_path / "tuned", method=method)


def test_configs_that_differ_in_words_only(pair):
    pair[1].config.update({"use_cache": False, "eos_token_id": 7, "attention_dropout": 0.1, "initializer_range": 0.5})
    assert compress(*pair, tokens=128).encodings


def test_buffers_that_differ_are_refused_by_name():
    bases = [nn.BatchNorm1d(4), nn.BatchNorm1d(4)]
    bases[1].running_mean += 1
    with pytest.raises(BaseMismatchError, match="running_mean"):
        compress(*bases)


def test_nothing_in_common(pair):
    with pytest.raises(BaseMismatchError, match="no parameter in common"):
        compress(plain(), pair[1])


def test_unrelated_weights():
    with pytest.raises(BaseMismatchError, match="no fine-tune"):
        compress(llama(), llama())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("method", "median"), ("planes", 5), ("planes", "2"), ("rank", -1), ("rank", 1.5)],
        *[("tokens", 0), ("tokens", "2048"), ("seed", None), ("seed", 2**64), ("quality", "worst")],
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises((UnsupportedError, CalibrationError), match=f"{option} must be"):
        compress(plain(), plain(), **{option: value})


def test_a_fine_tune_that_is_its_base(caplog):
    base = plain()
    delta = compress(base, copy.deepcopy(base), method="mean_abs")
    assert {encoding.kind for encoding in delta.encodings.values()} == {"same"}
    assert caplog.text.count("equals its base") == 1


@pytest.mark.parametrize("side", [0, 1])
def test_released_weights_are_refused(side):
    models = [plain(), plain()]
    released.mark(models[side][2].weight)
    with pytest.raises(UnsupportedError, match=r"2\.weight were released"):
        compress(*models)


def test_a_new_head_and_a_grown_vocabulary(pair):
    base, tuned = pair
    tuned.resize_token_embeddings(99, mean_resizing=False)
    tuned.score = nn.Linear(64, 3)
    delta = compress(base, tuned, tokens=128)
    table = delta.encodings["model.embed_tokens.weight"]
    assert (table.kind, table.shape, table.over.kind) == ("rows", (99, 64), "sign")
    assert table.index.tolist() == [96, 97, 98]
    assert delta.encodings["score.weight"].kind == "dense"


def test_low_precision_base(pair):
    base, tuned = pair[0].bfloat16(), pair[1]
    delta = compress(base, tuned, tokens=128)
    assert delta.encodings["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float32


def test_a_folder_of_an_unknown_architecture(tmp_path, pair, caplog):
    for model, name in zip(pair, ("base", "tuned"), strict=True):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["Elsewhere"]}))
    assert compress(tmp_path / "base", tmp_path / "tuned").options["calibration"] == "none"
    assert "Elsewhere" in caplog.text
    with pytest.raises(BitDeltaError, match="architecture"):
        compress(tmp_path / "base", tmp_path / "tuned", [{"input_ids": torch.ones(1, 1)}])


MEMORY = """
import sys, torch
from bitdelta_compile.compress import compress
import transformers
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:"))) * 1024
torch.set_num_threads(1)
compress(sys.argv[1], sys.argv[2], method="mean_abs")  # warm: code, pools, caches
start, peak = anonymous(), 0
def watch(*_):
    global peak
    peak = max(peak, anonymous())
from bitdelta_compile.compress import fit
inner = fit.DeltaMatrix.blocks
def blocks(self, *sizes):
    for item in inner(self, *sizes):
        watch()
        yield item
        watch()
fit.DeltaMatrix.blocks = blocks
delta = compress(sys.argv[3], sys.argv[4], method="mean_abs", progress=watch)
watch()
print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_mean_abs_streams_folders(tmp_path):
    def save(name, layers, width, shift):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=shift * 1e-3)
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    folders = [save("a", 1, 64, 0), save("b", 1, 64, 1), save("c", 1, 2048, 0), save("d", 1, 2048, 1)]
    run = subprocess.run([sys.executable, "-c", MEMORY, *folders], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    largest = 4 * 2048 * 2048  # 7 such matrices on each side
    assert int(run.stdout) < 3 * largest
    shutil.rmtree(tmp_path)
