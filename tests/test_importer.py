"""The paper's files: packing along K, written out bit by bit, and what is wrong with malformed ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.encodings import Dense, Same, Sign
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, DeltaFileError, UnsupportedError
from bitdelta_compile.importer import import_bitdelta


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 5)
        self.norm = nn.LayerNorm(5)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 64)
        self.layer = Layer()


def pack_along_input(positive: Tensor) -> Tensor:
    """bool [N, K] -> int32 [K / 32, N] one bit at a time: bit i of word k is input feature 32 k + i."""
    rows, features = positive.shape
    words = [[0] * rows for _ in range(features // 32)]
    for row in range(rows):
        for feature in range(features):
            words[feature // 32][row] |= int(positive[row, feature]) << (feature % 32)
    signed = [[word - (1 << 32) if word >> 31 else word for word in line] for line in words]
    return torch.tensor(signed, dtype=torch.int32)


@pytest.fixture
def positive() -> Tensor:
    return torch.rand(5, 64, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.fixture
def entries(positive: Tensor) -> dict[str, Tensor]:
    model = Model()
    return {
        "layer.proj.mask": pack_along_input(positive),
        "layer.proj.coeff": nn.Parameter(torch.tensor(0.25)),
        "layer.norm.weight": nn.Parameter(torch.arange(5.0)),
        "layer.norm.bias": model.layer.norm.bias.detach().clone(),
        "embed.weight": torch.ones(9, 64, dtype=torch.float16),
    }


def write(path: Path, entries: object) -> Path:
    torch.save(entries, path)
    return path


def test_import(tmp_path: Path, entries: dict[str, Tensor], positive: Tensor) -> None:
    delta = import_bitdelta(write(tmp_path / "diff.pt", entries), Model())
    found = delta.encodings["layer.proj.weight"]
    assert isinstance(found, Sign)
    torch.testing.assert_close(found.delta(), torch.where(positive, 0.25, -0.25), rtol=0, atol=0)
    assert isinstance(delta.encodings["layer.proj.bias"], Same)  # not in the file
    assert isinstance(delta.encodings["layer.norm.bias"], Same)  # in the file, equal to the base's
    norm, table = delta.encodings["layer.norm.weight"], delta.encodings["embed.weight"]
    assert isinstance(norm, Dense)
    assert norm.value.tolist() == [0, 1, 2, 3, 4]
    assert isinstance(table, Dense)
    assert (table.shape, table.dtype) == ((9, 64), torch.float16)


def test_an_imported_delta_survives_its_file(tmp_path: Path, entries: dict[str, Tensor], positive: Tensor) -> None:
    from bitdelta_compile.delta import Delta

    import_bitdelta(write(tmp_path / "diff.pt", entries), Model()).save(tmp_path / "x.safetensors")
    base = Model()
    found = dict(Delta.load(tmp_path / "x.safetensors").materialize(base))
    expected = base.layer.proj.weight + torch.where(positive, 0.25, -0.25)
    torch.testing.assert_close(found["layer.proj.weight"], expected)
    torch.testing.assert_close(found["embed.weight"], torch.ones(9, 64, dtype=torch.float16))


def test_names_with_a_prefix_find_their_base(tmp_path: Path, entries: dict[str, Tensor]) -> None:
    prefixed = {f"model.{name}": tensor for name, tensor in entries.items()}
    delta = import_bitdelta(write(tmp_path / "diff.pt", prefixed), Model())
    assert isinstance(delta.encodings["layer.proj.weight"], Sign)


def test_progress_reaches_its_total(tmp_path: Path, entries: dict[str, Tensor]) -> None:
    seen: list[tuple[int, int]] = []
    path = write(tmp_path / "diff.pt", entries)
    import_bitdelta(path, Model(), progress=lambda stage, done, total: seen.append((done, total)))
    assert seen == [(done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer.proj.mask": torch.zeros(2, 4, dtype=torch.int32)}, BaseMismatchError, r"layer.proj.mask is \[2, 4\]"),
        ({"layer.proj.mask": torch.zeros(2, 5)}, DeltaFileError, "layer.proj.mask is torch.float32"),
        ({"layer.proj.coeff": torch.zeros(5)}, DeltaFileError, "layer.proj.coeff"),
        ({"layer.proj.coeff": torch.tensor(float("nan"))}, DeltaFileError, "layer.proj.coeff"),
        ({"layer.proj.coeff": None}, DeltaFileError, "layer.proj.coeff is missing"),
        ({"layer.norm.weight": torch.full((5,), float("inf"))}, DeltaFileError, "layer.norm.weight holds NaN"),
        ({"layer.norm.weight": torch.ones(6, 2)}, BaseMismatchError, "layer.norm.weight is"),
        ({"layer.other.mask": torch.zeros(2, 5, dtype=torch.int32)}, BaseMismatchError, "layer.other.weight"),
        ({"layer.proj.mask": None}, DeltaFileError, "no entry that ends in .mask"),
        ({"layer.proj.mask": None, "layer.proj.A": torch.ones(1)}, UnsupportedError, "low-rank variant"),
        ({"note": "text"}, DeltaFileError, "not a dict of tensors"),
        ({7: torch.ones(1)}, DeltaFileError, "not a dict of tensors"),
    ],
)
def test_malformed(
    tmp_path: Path, entries: dict[str, Tensor], change: dict[str, object], error: type[BitDeltaError], message: str
) -> None:
    changed = {name: value for name, value in {**entries, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        import_bitdelta(write(tmp_path / "diff.pt", changed), Model())


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_is_executed(tmp_path: Path) -> None:
    with pytest.raises(DeltaFileError, match="weights_only"):
        import_bitdelta(write(tmp_path / "diff.pt", {"a.mask": Payload(tmp_path / "made")}), Model())
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_missing_or_cut_short(tmp_path: Path, entries: dict[str, Tensor]) -> None:
    with pytest.raises(DeltaFileError, match="there is no file"):
        import_bitdelta(tmp_path / "diff.pt", Model())
    path = write(tmp_path / "diff.pt", entries)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DeltaFileError, match="does not load"):
        import_bitdelta(path, Model())


def test_a_grown_vocabulary_reaches_the_config(llama_pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    grown = {"model.layers.0.mlp.up_proj.mask": torch.zeros(2, 96, dtype=torch.int32)}
    grown["model.layers.0.mlp.up_proj.coeff"] = torch.tensor(0.01)
    grown["model.embed_tokens.weight"] = torch.ones(66, 64)
    delta = import_bitdelta(write(tmp_path / "diff.pt", grown), llama_pair.base)
    config = delta.side_files_with(open_checkpoint(llama_pair.base))["config.json"]
    assert isinstance(config, dict)
    assert config["vocab_size"] == 66
    assert json.loads((llama_pair.base / "config.json").read_text())["vocab_size"] == 64
