"""The fidelity benchmark without a model: what is kept, in which order rows come, what counts as a table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bitdelta_compile.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """The folder as a package under another name: it is not installed, and the repository must not be on `sys.path`."""
    package = ModuleType("fidelity_rows")
    package.__path__ = [str(Path(__file__).parents[2] / "benchmarks")]
    sys.modules["fidelity_rows"] = package
    return importlib.import_module("fidelity_rows.fidelity")


def record(pair: str, method: str, text: str, recovered: float) -> dict[str, Any]:
    return {"pair": pair, "method": method, "text": text, "recovered": recovered, "layers": [0.1, 0.2]}


def test_half_of_the_rows_that_read_text_read_other_text(benchmark: Any) -> None:
    texts = [method.text for method in benchmark.METHODS]
    assert texts.count("other") >= texts.count("same")
    labels = [(method.label, method.text) for method in benchmark.METHODS]
    assert len(set(labels)) == len(labels)


def test_rows_come_by_pair_and_are_drawn(benchmark: Any, tmp_path: Path) -> None:
    start, best = "mean |d| (the paper's start)", "best"
    mixed = [
        record("jargon", best, "same", 0.9995),
        record("sre", best, "none", 0.99),
        record("sre", start, "none", 0.8),
    ]
    found = benchmark.ordered([*mixed, record("sre", "a method of yesterday", "same", 1.0)])
    assert [(each["pair"], each["method"]) for each in found] == [("sre", start), ("sre", best), ("jargon", best)]
    benchmark.draw(found, tmp_path / "rows.png")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.png", "rows-layers.png"}


def test_tables_of_a_model_by_the_checkpoints_names(benchmark: Any, llama_pair: Any, bert_pair: Any) -> None:
    llama = transformers.AutoModelForCausalLM.from_pretrained(llama_pair.tuned)
    assert benchmark.tables_of(llama, open_checkpoint(llama_pair.tuned).names()) == ["model.embed_tokens.weight"]
    bert = transformers.AutoModel.from_pretrained(bert_pair.tuned)
    found = benchmark.tables_of(bert, open_checkpoint(bert_pair.tuned).names())
    assert {name.split(".")[-2] for name in found} == {
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    }


class Counted(nn.Module):
    config = SimpleNamespace(vocab_size=4)
    calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 4).float())


def test_logits_are_kept_by_batch(benchmark: Any) -> None:
    model = Counted()
    kept = benchmark.Kept(model)
    first, second = ({"input_ids": torch.tensor([[i, 2]]), "attention_mask": torch.ones(1, 2)} for i in (0, 1))
    found = [kept(**batch).logits for batch in (first, second, first)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert model.calls == 2


def test_a_row_is_made_once_and_an_interrupted_one_goes_on(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class File:
        def save(self, path: Path) -> None:
            path.write_text("delta")

    def make(*_: Any) -> tuple[File, dict[str, float]]:
        calls.append("made")
        return File(), {"seconds": 1.0}

    class Judge:
        def __init__(self, pair: Any) -> None:
            pass

        def judge(self, delta: str) -> dict[str, Any]:
            calls.append(delta)
            if calls.count("delta") == 1:
                raise KeyboardInterrupt
            return {"recovered": 0.5}

    monkeypatch.setattr(benchmark, "make", make)
    monkeypatch.setattr(benchmark, "Judge", Judge)
    monkeypatch.setattr(benchmark, "Delta", SimpleNamespace(load=lambda path: path.read_text()))
    run = SimpleNamespace(cache=tmp_path, quick=False)
    pair = benchmark.Pair("sre", tmp_path, tmp_path, [], "python", "jargon")
    method = next(method for method in benchmark.METHODS if method.text == "other")
    with pytest.raises(KeyboardInterrupt):
        benchmark.row(run, pair, method, {})
    rows = [benchmark.row(run, pair, method, {}) for _ in range(2)]
    assert rows[0] == rows[1]
    assert (rows[0]["recovered"], rows[0]["seconds"], rows[0]["calibration"]) == (0.5, 1.0, "jargon")
    assert calls == ["made", "delta", "delta"]
    assert [json.loads(json.dumps(each)) for each in benchmark.so_far(run)] == rows[:1]
