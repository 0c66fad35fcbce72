"""Tiny real checkpoints, random weights, a tokenizer: a base and a fine-tune of it, per architecture."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

# The folder of benchmarks, under another name: it is not installed, and the repository must not be on `sys.path`.
BENCHMARKS = ModuleType("measured")
BENCHMARKS.__path__ = [str(Path(__file__).parents[1] / "benchmarks")]
sys.modules["measured"] = BENCHMARKS

WORDS = (
    "the",
    "a",
    "of",
    "and",
    "to",
    "is",
    "in",
    "that",
    "it",
    "for",
    "be",
    "not",
    "or",
    "language",
    "python",
    "value",
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Checkpoint folders; `stranger` is of the same architecture with other weights."""

    base: Path
    tuned: Path
    stranger: Path


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return transformers.BertModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def save_pair(folder: Path, build: Callable[[], nn.Module]) -> Pair:
    pair = Pair(folder / "base", folder / "tuned", folder / "stranger")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), unk_token="[UNK]", pad_token="[PAD]"
    )
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(pair.base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    model.save_pretrained(pair.tuned)
    build().save_pretrained(pair.stranger)
    for path in (pair.base, pair.tuned, pair.stranger):
        tokenizer.save_pretrained(path)
    return pair


def word_tokenizer() -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="session")
def bert_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("bert"), bert)


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("llama"), llama)


@pytest.fixture(scope="session")
def quantize() -> Callable[[nn.Module, str], nn.Module]:
    """Quantizes the linears of a model in place, weights only: to int8 per row, or int4 in groups of 32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid escape sequence")  # where its files have not been compiled before
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

    configs = {
        "int8": Int8WeightOnlyConfig(),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # a byte each
        "int4 packed": PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
    }

    def quantized(model: nn.Module, form: str) -> nn.Module:
        quantize_(model, configs[form])
        return model.eval()

    return quantized


@pytest.fixture(scope="session")
def run_alone() -> Callable[..., None]:
    """`run_alone(path, **environment)`: these tests in a process of their own, where all have to pass."""

    def run(path: Path, **environment: str) -> None:
        done = subprocess.run(
            [Path(sys.executable).with_name("pytest"), path, "-x", "-p", "no:cacheprovider"],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "passed" in done.stdout

    return run
