"""Compressing elsewhere than where the weights are: meta tensors serve as a second device, since no operation takes
them together with others."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from bitdelta_compile.compress import calibrate, compress
from bitdelta_compile.compress.fit import DeltaMatrix
from bitdelta_compile.compress.streams import Substitution
from bitdelta_compile.compress.weights import FittedValues, TunedValues
from bitdelta_compile.encodings import Dense, Same
from bitdelta_compile.errors import UnsupportedError

AWAY = torch.device("meta")


class Small(nn.Module):
    """Uses parameters in every way: looked up, multiplied, added, in a norm; a buffer; asks for device and dtype."""

    def __init__(self):
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(64, 32), nn.Linear(32, 48), nn.LayerNorm(48)
        self.matrix = nn.Parameter(torch.randn(48, 32))
        self.register_buffer("offset", torch.randn(32))

    def forward(self, input_ids):
        x = self.table(input_ids) + self.offset.to(self.matrix.dtype)
        x = self.norm(self.linear(x)) @ self.matrix
        return (x + torch.ones(32, device=self.matrix.device, dtype=self.table.weight.dtype),)


def small_llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [Small, small_llama])
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_elsewhere_than_its_weights_are(build, fitted, dtype):
    model = build().to(dtype)
    handles = dict(model.named_parameters())
    values = TunedValues(handles, AWAY)
    if fitted:
        values = FittedValues(handles, handles, AWAY)
        for name, tensor in handles.items():
            if tensor.dim() == 2:
                values.encodings[name] = Same(tuple(tensor.shape), tensor.dtype)
        values.encodings["table.weight"] = Dense((64, 32), dtype, torch.zeros(64, 32, dtype=dtype))
        values.vectors["linear.bias"] = torch.zeros(48, dtype=dtype)
    before = {name: tensor.device for name, tensor in [*handles.items(), *model.named_buffers()]}
    mode = Substitution(handles, lambda use: values.forget(), values)
    with calibrate.evaluation(model, AWAY), mode:
        found = model(input_ids=torch.zeros(2, 8, dtype=torch.int64))[0]
    assert found.device == AWAY
    assert found.dtype == torch.float32
    assert before == {name: tensor.device for name, tensor in [*handles.items(), *model.named_buffers()]}


def test_blocks_of_a_delta_are_on_the_device():
    base, tuned = torch.zeros(6, 8), torch.zeros(5, 8, dtype=torch.bfloat16)
    matrix = DeltaMatrix(base, tuned, device=AWAY)
    assert all(block.device == AWAY for _, block in matrix.blocks())
    assert matrix.rows_of_tuned(slice(0, 6)).device == AWAY


@pytest.mark.parametrize("calibration", [None, ["the value of python", "language is not a value"]])
def test_naming_the_device_of_the_weights_changes_nothing(llama_pair, tmp_path, calibration):
    options = {"tokens": 128, "quality": "balanced"}
    one = compress(llama_pair.base, llama_pair.tuned, calibration, **options)
    other = compress(llama_pair.base, llama_pair.tuned, calibration, device="cpu", **options)
    assert other.options == {**one.options, "device": "cpu"}
    for name, encoding in one.encodings.items():
        for field, value in encoding.tensors().items():
            assert torch.equal(value, other.encodings[name].tensors()[field])


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(llama_pair, device):
    with pytest.raises(UnsupportedError, match="cannot be used here"):
        compress(llama_pair.base, llama_pair.tuned, device=device)
