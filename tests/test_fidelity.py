"""Cosines, KL and the recovered share, on models whose outputs are written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bitdelta_compile import fidelity
from bitdelta_compile.errors import CalibrationError, CheckpointError, UnsupportedError

BATCH = {"input_ids": torch.tensor([[1, 2], [3, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}


def encoder(hidden: list[list[list[float]]]) -> Callable[..., SimpleNamespace]:
    return lambda **inputs: SimpleNamespace(last_hidden_state=torch.tensor(hidden))


def language_model(probabilities: list[list[list[float]]]) -> Callable[..., SimpleNamespace]:
    return lambda **inputs: SimpleNamespace(logits=torch.tensor(probabilities).log())


class Echo(torch.nn.Module):
    """An encoder whose hidden state is its ids."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=input_ids.unsqueeze(-1).float())


def test_pooling_leaves_out_padding() -> None:
    found = fidelity.encoder_outputs(encoder([[[1.0, 0.0], [3.0, 2.0]], [[5.0, 5.0], [99.0, -99.0]]]), [BATCH])
    assert found.pooled.tolist() == [[2.0, 1.0], [5.0, 5.0]]
    assert found.tokens.tolist() == [[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]]


def test_mean_cosine() -> None:
    tuned = fidelity.EncoderOutputs(torch.empty(0, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    other = fidelity.EncoderOutputs(torch.empty(0, 2), torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    assert fidelity.mean_cosine(tuned, other) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_share_of_gap_is_relative_to_the_base_to_tuned_distance() -> None:
    def outputs(value: float) -> fidelity.EncoderOutputs:
        return fidelity.EncoderOutputs(torch.full((4, 1), value), torch.empty(0))

    assert fidelity.share_of_gap(outputs(3.0), outputs(3.5), outputs(1.0), outputs(6.0)) == pytest.approx(0.1)


def test_kl_is_per_token_without_padding_and_in_this_direction() -> None:
    even, skewed = [0.5, 0.5], [0.75, 0.25]
    batch = {"input_ids": torch.tensor([[1, 0], [1, 0]]), "attention_mask": BATCH["attention_mask"]}
    tuned = language_model([[skewed, even], [even, skewed]])
    other = language_model([[even, even], [even, even]])
    found = fidelity.token_figures(tuned, other, [batch])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # one of three tokens differs
    assert (found.kl, found.tokens) == (pytest.approx(expected / 3), 3)


def test_kl_of_a_smaller_vocabulary_compares_what_both_have() -> None:
    batch = {"input_ids": torch.tensor([[1, 0], [1, 0]]), "attention_mask": BATCH["attention_mask"]}
    tuned = language_model([[[0.4, 0.4, 0.2]] * 2] * 2)
    other = language_model([[[0.5, 0.5]] * 2] * 2)
    assert fidelity.token_figures(tuned, other, [batch]).kl == pytest.approx(0, abs=1e-6)


def test_perplexity_is_that_of_the_next_token_without_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[0, 1, 0], [0, 1, 1]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    tuned = language_model([[[0.5, 0.5], [0.1, 0.9], [0.1, 0.9]], [[0.2, 0.8], [0.75, 0.25], [0.9, 0.1]]])
    other = language_model([[[0.5, 0.5]] * 3] * 2)
    found = fidelity.token_figures(tuned, other, [batch])
    # Tokens that follow one: 1 at probability 0.5, 1 at 0.8, 1 at 0.25; the last of each row and padding predict none.
    assert found.perplexity_tuned == pytest.approx((0.5 * 0.8 * 0.25) ** (-1 / 3))
    assert found.perplexity == pytest.approx(2)


def test_rank_correlation_is_of_the_order_of_pairs() -> None:
    def outputs(*angles: float) -> fidelity.EncoderOutputs:
        pooled = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
        return fidelity.EncoderOutputs(torch.empty(0, 2), pooled)

    tuned = outputs(0.0, 0.1, 0.5)  # pairs by nearness: 01, 12, 02
    assert fidelity.rank_correlation(tuned, outputs(0.0, 0.3, 1.0)) == pytest.approx(1)
    assert fidelity.rank_correlation(tuned, outputs(0.0, 0.7, 0.1)) == pytest.approx(-1)  # 02, 12, 01
    assert fidelity.rank_correlation(outputs(0.0, 0.1), outputs(0.0, 0.2)) == 1


def test_what_is_lost_by_layer_is_a_share_of_the_bases_distance() -> None:
    tuned, base, other = ([torch.full((3, 2), value) for value in values] for values in ([1, 2], [1, 6.0], [1, 3.0]))
    assert fidelity.lost_by_layer(tuned, base, other) == (0.0, pytest.approx(1 / 16))


@pytest.mark.parametrize(
    ("kind", "base", "compressed", "recovered"),
    [
        ("encoder", 0.9, 0.99, 0.9),
        ("encoder", 0.9, 0.8, -1.0),
        ("encoder", 1.0, 1.0, None),
        ("language model", 0.5, 0.05, 0.9),
        ("language model", 0.0, 0.0, None),
    ],
)
def test_recovered(kind: fidelity.Kind, base: float, compressed: float, recovered: float | None) -> None:
    found = fidelity.Fidelity(kind, base, compressed, 1, "").recovered
    assert found == (None if recovered is None else pytest.approx(recovered))


def test_held_out_texts_are_distinct_paragraphs_and_always_the_same() -> None:
    texts = fidelity.held_out_texts(50)
    assert len(set(texts)) == 50
    assert texts == fidelity.held_out_texts(50)
    assert all(len(text.split()) >= 12 and "\n" not in text for text in texts)


def test_read_texts(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one\ntwo\n\n\n  three \n\n", encoding="utf-8")
    assert fidelity.read_texts(file) == ["one two", "three"]
    file.write_text(" \n\n ")
    with pytest.raises(CalibrationError, match="holds no text"):
        fidelity.read_texts(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="UTF-8"):
        fidelity.read_texts(file)
    with pytest.raises(CalibrationError, match="missing"):
        fidelity.read_texts(tmp_path / "missing.txt")


def test_token_batches_pad_and_mask() -> None:
    def tokenizer(text: str, truncation: bool, max_length: int) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()][:max_length]}

    short, long = fidelity.token_batches(tokenizer, ["aa b", "", "a", "a a a a a"], max_length=3, batch_size=2)
    assert short["input_ids"].tolist() == [[1, 0], [2, 1]]
    assert short["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert long["input_ids"].tolist() == [[1, 1, 1]]
    with pytest.raises(CalibrationError, match="no tokens"):
        fidelity.token_batches(tokenizer, ["", " "])


def test_a_token_past_the_vocabulary_is_refused_by_name() -> None:
    model = Echo()
    model.config = SimpleNamespace(vocab_size=3)  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="token 3, past the 3 of Echo"):
        fidelity.encoder_outputs(model, [BATCH])


def test_load_model_knows_its_kind(bert_pair, llama_pair) -> None:  # type: ignore[no-untyped-def]
    assert fidelity.load_model(bert_pair.base)[1] == "encoder"
    assert fidelity.load_model(llama_pair.base)[1] == "language model"


def test_load_model_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=tmp_path.name):
        fidelity.load_model(tmp_path)


@pytest.mark.parametrize("pair", ["bert_pair", "llama_pair"])
def test_verify_of_a_lossless_delta_recovers_everything(pair: str, request: pytest.FixtureRequest) -> None:
    folders = request.getfixturevalue(pair)
    found = fidelity.verify(
        lossless(folders),
        folders.base,
        folders.tuned,
        ["the language of python", "a value", "it is not in the language"],
    )
    assert found.data == "3 given texts"
    assert found.recovered == pytest.approx(1, abs=1e-3)
    assert found.beside is not None
    assert found.beside.compressed == pytest.approx(found.beside.tuned, rel=1e-4)
    assert found.beside.name == ("perplexity" if pair == "llama_pair" else "rank correlation")
    if pair == "llama_pair":
        assert abs(found.beside.base / found.beside.tuned - 1) > 1e-3


def test_verify_without_a_tokenizer_uses_random_tokens(bert_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tuned, _ = fidelity.load_model(bert_pair.tuned)
    tuned.save_pretrained(tmp_path)
    assert fidelity.verify(lossless(bert_pair), bert_pair.base, tmp_path).data == "random tokens"
    with pytest.raises(CalibrationError, match="no tokenizer"):
        fidelity.verify(lossless(bert_pair), bert_pair.base, tmp_path, ["the"])


def lossless(folders):  # type: ignore[no-untyped-def]
    """A delta that stores every tuned parameter in full."""
    from bitdelta_compile.checkpoint import open_checkpoint
    from bitdelta_compile.delta import Delta
    from bitdelta_compile.encodings import Dense
    from bitdelta_compile.fingerprint import Fingerprint

    tuned = open_checkpoint(folders.tuned)
    return Delta(
        encodings={name: Dense(tuned.shape(name), tuned.dtype(name), tuned.tensor(name)) for name in tuned.names()},
        tied=dict(tuned.tied),
        fingerprint=Fingerprint.of(open_checkpoint(folders.base)),
        side_files=tuned.side_files,
        options={},
        report={},
    )
