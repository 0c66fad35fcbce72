from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from bitdelta_compile.compress import calibrate
from bitdelta_compile.errors import CalibrationError


class Reader(nn.Module):
    """A model with a config, remembering what it was called with."""

    def __init__(self, **config):
        super().__init__()
        self.config = types.SimpleNamespace(**config)
        self.table = nn.Embedding(50, 4)
        self.seen = []

    def forward(self, input_ids):
        self.seen.append((input_ids, self.training, torch.is_grad_enabled()))
        return self.table(input_ids)


def no_tokenizer():
    raise AssertionError("only texts need a tokenizer")


def words(text, truncation, max_length, return_tensors):
    ids = [len(word) for word in text.split()][:max_length]
    return {"input_ids": torch.tensor([ids], dtype=torch.int64)}


def make(model, calibration=None, tokens=100, seed=0, tokenizer=no_tokenizer):
    return calibrate.make_batches(model, calibration, tokenizer, tokens=tokens, seed=seed)


@pytest.mark.parametrize("tokens", [1, 7, 100, 2048])
def test_random_tokens_cover_the_count_and_the_vocabulary(tokens):
    batches = make(Reader(vocab_size=50), tokens=tokens)
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    assert ids.numel() >= tokens
    assert ids.numel() <= 2 * tokens + sum(calibrate.RANDOM_LENGTHS)
    assert 0 <= ids.min() <= ids.max() < 50
    if tokens == 2048:
        assert ids.unique().numel() == 50


def test_random_tokens_repeat_for_a_seed():
    first, again, other = (make(Reader(vocab_size=50), seed=seed)[0]["input_ids"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_sequences_fit_the_positions():
    batches = make(Reader(vocab_size=50, max_position_embeddings=20), tokens=2048)
    assert max(batch["input_ids"].shape[1] for batch in batches) == 18


def test_encoder_decoders_read_tokens_on_both_sides():
    assert set(make(Reader(vocab_size=50, is_encoder_decoder=True))[0]) == {"input_ids", "decoder_input_ids"}


def test_no_vocabulary():
    with pytest.raises(CalibrationError, match="vocab_size"):
        make(nn.Linear(2, 2))


def test_texts_stop_at_the_token_count():
    batches = make(Reader(vocab_size=50), ["one two three four", "  ", "five six"] * 10, 12, tokenizer=lambda: words)
    assert sum(batch["input_ids"].numel() for batch in batches) == 12


@pytest.mark.parametrize("calibration", [[""], ["", " \n"], ""])
def test_texts_without_a_token(calibration):
    with pytest.raises(CalibrationError, match="no token"):
        make(Reader(vocab_size=50), calibration, tokenizer=lambda: words)


@pytest.mark.parametrize("calibration", [[], iter(())])
def test_empty_calibration(calibration):
    with pytest.raises(CalibrationError, match="empty"):
        make(Reader(vocab_size=50), calibration)


@pytest.mark.parametrize("calibration", [[torch.ones(2)], ["text", {"input_ids": torch.ones(1, 1)}]])
def test_calibration_of_another_kind(calibration):
    with pytest.raises(CalibrationError, match="calibration item 0"):
        make(Reader(vocab_size=50), calibration)


def test_tokens_must_be_positive():
    with pytest.raises(CalibrationError, match="at least 1"):
        make(Reader(vocab_size=50), tokens=0)


def test_the_run_leaves_the_model_as_it_was():
    model = Reader(vocab_size=50).train()
    model.table.eval()
    stages = []
    run = calibrate.runner(model, make(model), lambda *stage: stages.append(stage))
    run()
    assert all(not training and not gradients for _, training, gradients in model.seen)
    assert (model.training, model.table.training) == (True, False)
    assert stages[-1] == ("calibrate", len(model.seen), len(model.seen))


def test_a_batch_the_model_does_not_take():
    model = Reader(vocab_size=50)
    run = calibrate.runner(model, make(model, [{"pixels": torch.ones(1)}]))
    with pytest.raises(CalibrationError, match=r"Reader does not run on calibration batch 0 \(pixels\)"):
        run()
    assert model.training
