"""Reading named tensors from modules, folders and shards, and pairing their names."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bitdelta_compile.checkpoint import Checkpoint, match_names, open_checkpoint
from bitdelta_compile.errors import BaseMismatchError, CheckpointError
from bitdelta_compile.fileformat import TensorSpec, write_safetensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.arange(3))
        self.register_buffer("derived", torch.ones(2), persistent=False)


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator),
        "b.bias": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c.ids": torch.arange(6).reshape(2, 3),
        "d.empty": torch.empty(0, 4, dtype=torch.float16),
        "e.scalar": torch.tensor(2.5),
        "f.flags": torch.tensor([True, False, True]),
    }


def assert_reads(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_module_names_ties_and_persistent_buffers() -> None:
    module = Tied()
    checkpoint = open_checkpoint(module)
    assert checkpoint.names() == ["embed.weight", "kept"]
    assert checkpoint.tied == {"head.weight": "embed.weight"}
    assert checkpoint.buffers() == ["kept"]
    assert checkpoint.tensor("head.weight").data_ptr() == module.embed.weight.data_ptr()
    assert "head.weight" in checkpoint
    assert "derived" not in checkpoint


def test_meta_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"embed\.weight of Tied is on the meta device"):
        open_checkpoint(Tied().to("meta"))


def test_folder_with_safetensors_and_side_files(tmp_path) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    (tmp_path / "vocab.txt").write_bytes("a\r\nä\n".encode())
    (tmp_path / "README.md").write_text("not ours")
    checkpoint = open_checkpoint(tmp_path)
    assert_reads(checkpoint, state())
    assert checkpoint.side_files == {"config.json": {"hidden_size": 4}, "vocab.txt": "a\r\nä\n"}
    assert_reads(open_checkpoint(str(tmp_path)), state())


def test_file_tensors_are_views_of_one_mapping(tmp_path) -> None:
    save_file({"a": torch.ones(64), "b": torch.ones(64)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    a, b = checkpoint.tensor("a"), checkpoint.tensor("b")
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    before = (tmp_path / "model.safetensors").read_bytes()
    a.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_misaligned_tensors_are_read(tmp_path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}
    header = json.dumps({"u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "f": entry}).encode()
    data = b"\x07" + torch.tensor([1.5]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert open_checkpoint(tmp_path).tensor("f").item() == 1.5


def test_sharded_folder(tmp_path) -> None:
    tensors = state()
    shards = {name: f"model-{1 + (index % 2)}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert_reads(open_checkpoint(tmp_path), tensors)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lists 'model-2\.safetensors'"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    save_file(tensors, tmp_path.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="not a file of that folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_with_ties(tmp_path, legacy) -> None:
    torch.save(Tied().state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == ["embed.weight", "kept"]
    assert checkpoint.tied == {"head.weight": "embed.weight"}


def test_pickled_code_is_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_sources_that_are_no_checkpoint(tmp_path, monkeypatch) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable checkpoint: it has 5 bytes"):
        open_checkpoint(tmp_path)

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="'some/model' is neither a folder nor a model"):
        open_checkpoint("some/model")


def test_hub_id_opens_the_snapshot_folder(tmp_path, monkeypatch) -> None:
    save_file(state(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert_reads(open_checkpoint("some/model"), state())


def test_written_file_is_what_the_library_reads(tmp_path) -> None:
    tensors = {**state(), "g.strided": torch.arange(12.0).reshape(3, 4).T}
    specs = [TensorSpec(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    write_safetensors(tmp_path / "model.safetensors", specs, {"format": "pt"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert_reads(open_checkpoint(tmp_path), tensors)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail() -> torch.Tensor:
        raise RuntimeError("producer failed")

    good = TensorSpec("a", torch.float32, (2,), lambda: torch.ones(2))
    for specs, message in (
        ([good, TensorSpec("b", torch.float32, (2,), fail)], "producer failed"),
        ([good, TensorSpec("b", torch.float32, (2,), lambda: torch.ones(3))], "b was announced as"),
        ([good, good], "two tensors are named 'a'"),
        ([TensorSpec("b", torch.complex128, (2,), fail)], "cannot hold"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            write_safetensors(path, specs, {})
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
        assert path.read_bytes() == b"old"


BODY = ["embed.weight", "layer.0.weight", "layer.0.bias"]


@pytest.mark.parametrize("prefix", ["bert.", "model.", "a.b."])
def test_prefix_on_either_side(prefix) -> None:
    prefixed = [prefix + name for name in BODY]
    assert match_names(BODY, [*prefixed, "head.weight"]) == dict(zip(BODY, prefixed, strict=True))
    assert match_names([*prefixed, "head.weight"], BODY) == dict(zip(prefixed, BODY, strict=True))


def test_exact_names_win_and_new_names_stay_unpaired() -> None:
    assert match_names([*BODY, "head.weight"], [*BODY, "other.head.weight"]) == {name: name for name in BODY}
    assert match_names(["model." + name for name in BODY] + ["head.weight"], [*BODY, "head.weight"]) == {
        **{"model." + name: name for name in BODY},
        "head.weight": "head.weight",
    }
    assert match_names(["x"], ["y"]) == {}
    assert match_names([], BODY) == {}


def test_two_readings_are_ambiguous() -> None:
    both = [side + name for side in ("encoder.", "decoder.") for name in BODY]
    with pytest.raises(BaseMismatchError, match=r"3 parameter names can be paired in two ways"):
        match_names(BODY, both)
