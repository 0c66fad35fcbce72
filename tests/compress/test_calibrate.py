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


def words(text, truncation, max_length, **options):
    return {"input_ids": [len(word) for word in text.split()][:max_length]}


def make(model, calibration, tokens=100, tokenizer=no_tokenizer):
    return calibrate.make_batches(model, calibration, tokenizer, tokens=tokens)[0]


def drawn(model, tokens=100, seed=0):
    return calibrate.random_tokens(model, tokens, seed, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 7, 100, 2048])
def test_random_tokens_cover_the_count_and_the_vocabulary(tokens):
    batches = drawn(Reader(vocab_size=50), tokens)
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    assert ids.numel() >= tokens
    assert ids.numel() <= 2 * tokens + sum(calibrate.RANDOM_LENGTHS)
    assert 0 <= ids.min() <= ids.max() < 50
    if tokens == 2048:
        assert ids.unique().numel() == 50


def test_random_tokens_repeat_for_a_seed():
    first, again, other = (drawn(Reader(vocab_size=50), seed=seed)[0]["input_ids"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_sequences_fit_the_positions():
    batches = drawn(Reader(vocab_size=50, max_position_embeddings=20), 2048)
    assert max(batch["input_ids"].shape[1] for batch in batches) == 18


def test_encoder_decoders_read_tokens_on_both_sides():
    assert set(drawn(Reader(vocab_size=50, is_encoder_decoder=True))[0]) == {"input_ids", "decoder_input_ids"}


def test_no_vocabulary():
    with pytest.raises(CalibrationError, match="vocab_size"):
        drawn(nn.Linear(2, 2))


def test_texts_stop_at_the_token_count():
    texts = [f"{'x' * n} two three four" for n in range(1, 9)]
    batches = make(Reader(vocab_size=50), [*texts, " ", ""], 12, tokenizer=lambda: words)
    assert sum(batch["input_ids"].numel() for batch in batches) == 12


def test_texts_of_a_length_share_a_batch_without_padding():
    texts = [" ".join(["a" * (n % 7 + 1)] * (n % 5 + 3)) + " b" * n for n in range(60)]
    batches = make(Reader(vocab_size=50), texts, 10**6, tokenizer=lambda: words)
    assert len(batches) <= calibrate.TEXT_BATCHES
    assert all(set(batch) == {"input_ids"} for batch in batches)
    kept = sum(batch["input_ids"].numel() for batch in batches)
    assert 0.9 * sum(len(text.split()) for text in texts) < kept


def test_a_text_given_twice_counts_once():
    once, twice = (make(Reader(vocab_size=50), ["a bb ccc"] * n, tokenizer=lambda: words) for n in (1, 9))
    assert torch.equal(once[0]["input_ids"], twice[0]["input_ids"])


class Chat:
    """A tokenizer with a template."""

    def apply_chat_template(self, messages, tokenize):
        return "".join(f"<{message['role']}> {message['content']} " for message in messages)

    def __call__(self, *args, **options):
        return words(*args, **options)


def test_conversations_are_written_out_by_the_template():
    talk = [[{"role": "user", "content": "a bb"}, {"role": "assistant", "content": "ccc"}]]
    (batch,) = make(Reader(vocab_size=50), talk, tokenizer=Chat)
    assert batch["input_ids"].tolist() == [[6, 1, 2, 11, 3]]
    with pytest.raises(CalibrationError, match="chat template"):
        make(Reader(vocab_size=50), talk, tokenizer=lambda: words)


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


@pytest.mark.parametrize(("tokens", "seed"), [(0, 0), ("9", 0), (9, None), (9, 2**64)])
def test_amounts_that_are_none(tokens, seed):
    with pytest.raises(CalibrationError, match="must be an integer"):
        calibrate.check_amount(tokens, seed)


def test_the_run_leaves_the_model_as_it_was():
    model = Reader(vocab_size=50).train()
    model.table.eval()
    batches = drawn(model)
    with calibrate.evaluation(model):
        for run in calibrate.model_runs(model, batches):
            run.call()
    assert len(model.seen) == len(batches)
    assert all(not training and not gradients for _, training, gradients in model.seen)
    assert (model.training, model.table.training) == (True, False)


def test_masked_tokens_are_known_where_there_are_any():
    mask = torch.tensor([[1, 1, 0]])
    batches = [{"input_ids": torch.zeros(1, 3), "attention_mask": each} for each in (mask, torch.ones(1, 3))]
    some, none = calibrate.model_runs(Reader(vocab_size=50), batches)
    assert torch.equal(some.mask, mask.bool())
    assert none.mask is None


def test_narrow_inputs_are_widened():
    (batch,) = make(Reader(vocab_size=50), [{"pixels": torch.ones(2, dtype=torch.bfloat16), "n": 3}])
    assert batch["pixels"].dtype == torch.float32
    assert batch["n"] == 3


def test_a_batch_the_model_does_not_take():
    model = Reader(vocab_size=50)
    (run,) = calibrate.model_runs(model, make(model, [{"pixels": torch.ones(1)}]))
    with pytest.raises(CalibrationError, match=r"Reader does not run on calibration batch 0 \(pixels\)"):
        run.call()
    assert model.training
