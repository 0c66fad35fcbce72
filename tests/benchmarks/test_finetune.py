"""The making of fine-tunes: texts out of Debian packages, folders made once, training that can be repeated."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
import transformers

from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.errors import CalibrationError


class LlamaPair(Protocol):
    base: Path


def load_script() -> Any:
    """`benchmarks` is not installed, and the repository's root must not be on `sys.path`."""
    path = Path(__file__).parents[2] / "benchmarks" / "finetune.py"
    spec = importlib.util.spec_from_file_location("finetune_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


finetune = load_script()
TEXTS = ["the language is a value of python and it is to be", "python is not the language that it is for a value"]
LONG = "word " * 12


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with the three packages unpacked, small."""
    root = tmp_path / "debian"
    jargon = root / "dict-jargon/usr/share/dictd"
    jargon.mkdir(parents=True)
    entries = [f"00-database-short\n {LONG}", f"back door\n n.\n\n    {LONG}\n    end.", "zork\n short"]
    entries += [f"entry {index}\n {LONG}" for index in range(200)]
    (jargon / "jargon.dict.dz").write_bytes(gzip.compress("\n\n".join(entries).encode()))
    python = root / "python3.11-doc/usr/share/doc/python3.11/html/_sources/tutorial"
    python.mkdir(parents=True)
    prose = "Use :mod:`json` or :func:`~os.path.join`, see `the site <http://x>`_ for ``x = 1`` and many other things."
    (python / "a.rst.txt").write_text(
        f"Title\n=====\n\n{prose}\n\n    Indented code {LONG}.\n\nA list {LONG}:\n\nShort.\n"
    )
    fortunes = root / "fortunes/usr/share/games/fortunes"
    fortunes.mkdir(parents=True)
    for name in ("computers", "science", "wisdom", "work"):
        (fortunes / name).write_text(f"{LONG}\n\t-- {name}\n%\nshort\n%\n")
    return tmp_path


def all_texts(cache: Path, domain: str) -> list[str]:
    return [text for split in ("train", "calibration", "evaluation") for text in finetune.texts(cache, domain, split)]


def test_an_entry_of_the_dictionary_is_one_line(cache: Path) -> None:
    found = all_texts(cache, "jargon")
    assert f"back door: n. {LONG}end." in found
    assert len(found) == 201  # neither the dictionary's own header nor the short entry


def test_the_manual_is_prose_without_markup(cache: Path) -> None:
    assert all_texts(cache, "python") == ["Use json or os.path.join, see the site for x = 1 and many other things."]


def test_fortunes_are_told_apart(cache: Path) -> None:
    wanted = {f"{LONG}-- {name}" for name in ("computers", "science", "wisdom", "work")}
    assert set(all_texts(cache, "fortunes")) == wanted


def test_splits_share_nothing_and_stay_the_same(cache: Path) -> None:
    splits = {split: finetune.texts(cache, "jargon", split) for split in ("train", "calibration", "evaluation")}
    assert len({text for texts in splits.values() for text in texts}) == sum(map(len, splits.values())) == 201
    assert len(splits["train"]) > 120
    assert min(len(splits["calibration"]), len(splits["evaluation"])) > 5
    assert splits == {split: finetune.texts(cache, "jargon", split) for split in splits}


def test_a_package_that_cannot_be_fetched_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for domain in ("jargon", "python"):
        with pytest.raises(CalibrationError, match=r"could not be fetched .*dpkg-deb -x FILE.deb"):
            finetune.texts(tmp_path, domain, "train")
    assert not list((tmp_path / "debian").iterdir())


def fill(folder: Path) -> dict[str, float]:
    (folder / "weights").write_text("made")
    return {"x": 1.0}


def fail(folder: Path) -> dict[str, float]:
    (folder / "weights").write_text("half")
    raise KeyboardInterrupt


def test_a_folder_is_made_once_per_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert finetune._once(folder, {"steps": 1}, fill) == folder
    assert finetune._once(folder, {"steps": 1}, fail) == folder
    assert (folder / "weights").read_text() == "made"
    (folder / "weights").write_text("old")
    finetune._once(folder, {"steps": 2}, fill)
    assert (folder / "weights").read_text() == "made"


def test_an_interrupted_run_leaves_nothing_that_counts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        finetune._once(folder, {"steps": 1}, fail)
    assert not folder.exists()
    finetune._once(folder, {"steps": 1}, fill)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt):
        finetune._once(folder, {"steps": 2}, fail)
    assert (folder / "weights").read_text() == "made"


def recipe(**changes: Any) -> Any:
    return finetune.Recipe(**{"domain": "jargon", "learning_rate": 1e-2, "eos": 17, "steps": 10, "length": 6} | changes)


def test_every_training_text_ends_with_the_token(llama_pair: LlamaPair) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_pair.base)
    blocks = finetune._token_blocks(tokenizer, TEXTS, recipe(steps=1, batch=2, length=11, eos=0))
    assert blocks.shape == (1, 2, 11)
    assert blocks.flatten().tolist().count(0) == 1
    rows = [tokenizer(text)["input_ids"] + [0] for text in TEXTS]
    assert blocks.flatten().tolist() in [(rows[0] + rows[1])[:22], (rows[1] + rows[0])[:22]]


def test_too_little_text_is_refused(llama_pair: LlamaPair) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_pair.base)
    with pytest.raises(CalibrationError, match="training takes 80"):
        finetune._token_blocks(tokenizer, TEXTS, recipe(steps=10, batch=2, length=4))


def test_a_fine_tune_learns_moves_and_can_be_repeated(llama_pair: LlamaPair, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    found = [finetune._finetune(llama_pair.base, recipe(), TEXTS * 20, TEXTS, None, folder) for folder in folders]
    assert found[0] == found[1]
    assert found[0]["loss_tuned"] < found[0]["loss_base"]
    assert 0 < found[0]["delta_min"] <= found[0]["delta_median"] <= found[0]["delta_max"]
    first, second, base = (open_checkpoint(folder) for folder in (*folders, llama_pair.base))
    assert first.names() == base.names()
    for name in first.names():
        assert torch.equal(first.tensor(name), second.tensor(name))
        assert not torch.equal(first.tensor(name), base.tensor(name))
        assert first.dtype(name) == torch.float32
    assert transformers.GenerationConfig.from_pretrained(folders[0]).eos_token_id == 17
