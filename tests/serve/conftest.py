"""Small models of the architectures that `generate` is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

V = 60
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_DECODER = _SIZES | _ENDS | {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))


def _qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_DECODER, tie_word_embeddings=True))


def _gpt2() -> Any:
    sizes = {"vocab_size": V, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **_ENDS, initializer_range=0.5))


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, initializer_factor=3.0,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    # Its own initialisation answers every prompt with one token over and over.
    torch.nn.init.normal_(model.lm_head.weight)
    return model


_ARCHITECTURES = {"llama": _llama, "qwen2": _qwen2, "gpt2": _gpt2, "t5": _t5}


@pytest.fixture(scope="session")
def made() -> Callable[..., Any]:
    """`made(kind)`: a new model with `V` tokens, always the same; kind is "llama", "qwen2", "gpt2" or "t5"."""

    def call(kind: str = "llama") -> Any:
        torch.manual_seed(0)
        return _ARCHITECTURES[kind]().eval()

    return call
