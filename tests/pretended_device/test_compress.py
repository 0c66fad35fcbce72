"""Compressing on a device that has the place of a GPU, with plain PyTorch in that of its kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from bitdelta_compile.lowering import device
from pretended import DEVICE, There, here, on
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitdelta_compile.compress import compress
from bitdelta_compile.compress import signs as choice
from bitdelta_compile.fidelity import verify

TEXTS = ["the value of python", "language is not a value"]


@pytest.fixture
def calls(monkeypatch):
    """Kernels of the device; counts their calls."""
    count = {"feed": 0, "flip": 0}

    def kernel(name, in_pytorch):
        def run(changed, signs, *others):
            count[name] += 1
            scale, columns = others[:2]
            for each in (changed, signs, scale) if columns is None else (changed, signs, scale, columns):
                assert isinstance(each, There)
                assert each.is_contiguous()
            in_pytorch(*here((changed, signs, *others)))

        return run

    on_gpu = SimpleNamespace(feed=kernel("feed", choice._feed), flip=kernel("flip", choice._flip))
    monkeypatch.setattr(device, "column_kernels", lambda place: on_gpu if place.type == DEVICE else None)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention is not the same on every device
        yield count


def assert_alike(ours, theirs):
    """The same delta but for rounding, all of it in host memory."""
    assert ours.encodings.keys() == theirs.encodings.keys()
    for name, encoding in ours.encodings.items():
        other = theirs.encodings[name]
        assert other.kind == encoding.kind, name
        for field, value in encoding.tensors().items():
            found = other.tensors()[field]
            assert type(found) in (torch.Tensor, torch.nn.Parameter)
            if field in ("signs", "index"):
                assert (found != value).float().mean() < 0.02, name
            elif field not in ("left", "right"):  # of which the product counts
                assert torch.allclose(found.float(), value.float(), rtol=0.02, atol=1e-4), (name, field)
        error, expected = (each.report["parameters"].get(name, {}).get("error", 0.0) for each in (theirs, ours))
        assert error == pytest.approx(expected, rel=0.01, abs=1e-3), name


@pytest.mark.parametrize(
    ("name", "calibration", "options"),
    [
        ("bert_pair", TEXTS, {}),
        ("bert_pair", None, {}),
        ("bert_pair", TEXTS, {"quality": "balanced"}),
        ("bert_pair", TEXTS, {"bits": 2.0}),
        ("llama_pair", TEXTS, {}),
        ("llama_pair", None, {}),
        ("llama_pair", TEXTS, {"planes": 2, "rank": 2}),
        ("llama_pair", TEXTS, {"quality": "fast"}),
        ("llama_pair", TEXTS, {"sampled": 64}),
    ],
)
def test_checkpoints_in_host_memory(name, calibration, options, request, calls):
    pair = request.getfixturevalue(name)
    ours = compress(pair.base, pair.tuned, calibration, tokens=256, **options)
    assert not any(calls.values())
    theirs = compress(pair.base, pair.tuned, calibration, tokens=256, device=DEVICE, **options)
    assert bool(calls["feed"]) == (options.get("quality") != "fast")
    assert_alike(ours, theirs)


def perturbed(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    return model.eval()


def gpt2(seed):
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    torch.manual_seed(0)
    return perturbed(transformers.GPT2LMHeadModel(config), seed)


def grown(seed):
    """A table and a head of which the fine-tune has rows that the base lacks."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    if seed:
        model.resize_token_embeddings(100, mean_resizing=False)
    return perturbed(model, seed)


def batches(place):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (2, 16), generator=generator).to(place)} for _ in range(2)]


@pytest.mark.parametrize("place", ["cpu", DEVICE])
@pytest.mark.parametrize("model", [gpt2, grown])
def test_models_in_memory(model, place, calls):
    """Stored [K, N] (gpt2), and rows beside planes (grown), on either side."""
    ours = compress(model(0), model(1), batches("cpu"))
    computes = None if place == DEVICE else DEVICE
    theirs = compress(on(model(0), place), on(model(1), place), batches(place), device=computes)
    assert_alike(ours, theirs)
    assert calls["feed"]
    if model is grown:
        assert ours.encodings["lm_head.weight"].kind == "rows"
        assert ours.encodings["lm_head.weight"].over is not None


@pytest.mark.parametrize("name", ["bert_pair", "llama_pair"])
def test_verify_with_a_base_on_the_device(name, request, calls):
    pair = request.getfixturevalue(name)
    delta = compress(pair.base, pair.tuned, method="mean_abs")
    load = transformers.AutoModel if name == "bert_pair" else transformers.AutoModelForCausalLM
    base = load.from_pretrained(pair.base, dtype=torch.float32, use_cache=False).eval()
    expected = verify(delta, base, pair.tuned, TEXTS)
    found = verify(delta, on(base, DEVICE), pair.tuned, TEXTS)
    for figure in ("base", "compressed", "count", "layers"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=0.02)
