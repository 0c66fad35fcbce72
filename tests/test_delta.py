"""Saving, loading and materializing deltas: every encoding, dtype and orientation, and real architectures."""

import json
import logging

import pytest
import torch
import transformers
from bitdelta_compile.kernels import layout
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bitdelta_compile import encodings as encodings_module
from bitdelta_compile.checkpoint import Checkpoint, open_checkpoint
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Dense, Encoding, Rows, Same, Sign
from bitdelta_compile.errors import BaseMismatchError, BitDeltaError, DeltaFileError


def sign(shape, dtype=torch.float32, *, planes=1, col=False, rank=0, transposed=False, scale=0.01) -> Sign:
    rows, features = reversed(shape) if transposed else shape
    return Sign(
        tuple(shape),
        dtype,
        layout.pack(torch.rand(planes, rows, features) < 0.5),
        scale * torch.rand(planes, rows),
        torch.rand(planes, features) if col else None,
        scale * torch.randn(rows, rank).to(torch.bfloat16) if rank else None,
        torch.randn(rank, features).to(torch.bfloat16) if rank else None,
        transposed,
    )


def rows(shape, index, dtype=torch.float32, *, over=None, transposed=False) -> Rows:
    features = shape[0] if transposed else shape[1]
    return Rows(tuple(shape), dtype, torch.tensor(index), torch.randn(len(index), features).to(dtype), over, transposed)


def every_encoding() -> tuple[Checkpoint, dict[str, Encoding]]:
    """A base and encodings of all kinds; K = 37 leaves ragged bits."""
    torch.manual_seed(0)
    half, bf16 = torch.float16, torch.bfloat16
    base = {name: torch.randn(6, 37) for name in ("same", "sign", "rich", "rows", "over")}
    base |= {"flipped": torch.randn(37, 6), "flipped_rows": torch.randn(37, 6), "half": torch.randn(4, 8).half()}
    base |= {
        "empty": torch.zeros(0, 5),
        "no_features": torch.zeros(3, 0),
        "ids": torch.arange(3),
        "bias": torch.randn(9),
    }
    encodings: dict[str, Encoding] = {
        "same": Same((6, 37), bf16),
        "sign": sign((6, 37)),
        "rich": sign((6, 37), bf16, planes=3, col=True, rank=2),
        "rows": rows((6, 37), [1, 4]),
        "over": rows((8, 37), [0, 6, 7], bf16, over=sign((6, 37), bf16)),
        "flipped": sign((37, 6), transposed=True),
        "flipped_rows": rows((37, 7), [2, 6], over=sign((37, 6), transposed=True), transposed=True),
        "half": sign((4, 8), half),
        "empty": Same((0, 5), torch.float32),
        "no_features": sign((3, 0)),
        "ids": Dense((3,), torch.int64, torch.arange(3) + 1),
        "bias": Dense((9,), bf16, torch.randn(9).to(bf16)),
        "new.scalar": Dense((), torch.float32, torch.tensor(3.0)),
    }
    return Checkpoint("base", base), encodings


def make(base: Checkpoint, encodings: dict[str, Encoding], tied=None, side_files=None) -> Delta:
    tuned = Checkpoint("tuned", {}, side_files)
    tuned.tied = dict(tied or {})
    return Delta.of(base, tuned, encodings, options={"planes": 1}, report={"parameters": {"sign": {"error": 0.25}}})


def test_save_and_load_give_the_same_delta(tmp_path) -> None:
    base, encodings = every_encoding()
    delta = make(base, encodings, {"alias": "sign"}, {"config.json": {"a": 1}, "vocab.txt": "ä\n"})
    path = tmp_path / "x.bitdelta.safetensors"
    delta.save(path)
    loaded = Delta.load(str(path))
    assert list(loaded.encodings) == list(encodings)
    for name, encoding in encodings.items():
        other = loaded.encodings[name]
        assert (other.kind, other.shape, other.dtype) == (encoding.kind, encoding.shape, encoding.dtype)
        expected, found = encoding.tensors(), other.tensors()
        if isinstance(encoding, Rows) and encoding.over is not None:
            expected, found = expected | encoding.over.tensors(), found | other.over.tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[field], expected[field]) for field in expected)
    assert loaded.tied == {"alias": "sign"}
    assert loaded.side_files == {"config.json": {"a": 1}, "vocab.txt": "ä\n"}
    assert loaded.options == {"planes": 1}
    assert loaded.report == delta.report
    assert loaded.fingerprint.check(base) == "exact"
    assert loaded.nbytes == delta.nbytes
    data = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert data == delta.nbytes
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_loaded_tensors_are_mapped(tmp_path) -> None:
    base, encodings = every_encoding()
    make(base, encodings).save(tmp_path / "x")
    loaded = Delta.load(tmp_path / "x").encodings
    storages = {loaded[name].signs.untyped_storage().data_ptr() for name in ("sign", "rich", "flipped")}
    assert len(storages) == 1


def test_materialize_applies_every_encoding(tmp_path) -> None:
    base, encodings = every_encoding()
    delta = make(base, encodings, {"alias": "sign"})
    delta.save(tmp_path / "x")
    for source in (delta, Delta.load(tmp_path / "x")):
        tuned = dict(source.materialize(base))
        assert list(tuned) == list(encodings)
        for name, encoding in encodings.items():
            under = base.tensor(name) if name in base else torch.empty(0)
            assert tuned[name].shape == encoding.shape
            assert torch.equal(tuned[name], encoding.apply(under).to(encoding.dtype))
    dense = base.tensor("sign") + encodings["sign"].delta()
    torch.testing.assert_close(tuned["sign"], dense, rtol=0, atol=1e-6)
    assert torch.equal(tuned["flipped_rows"][:, 6], encodings["flipped_rows"].values[1])
    assert torch.equal(tuned["over"][6:], encodings["over"].values[1:])
    full = dict(delta.materialize(base, dtype=torch.float32))
    assert {tensor.dtype for tensor in full.values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("transposed", [False, True])
def test_unpacking_in_blocks_makes_no_difference(monkeypatch, transposed) -> None:
    shape = (37, 11) if transposed else (11, 37)
    encoding = sign(shape, planes=2, col=True, rank=3, transposed=transposed)
    base = torch.randn(shape)
    monkeypatch.setattr(encodings_module, "_BLOCK", 4 * 37)
    torch.testing.assert_close(encoding.apply(base), base + encoding.delta(), rtol=0, atol=1e-6)


def test_materialize_leaves_the_base_alone() -> None:
    base, encodings = every_encoding()
    before = {name: base.tensor(name).clone() for name in base.names()}
    list(make(base, encodings).materialize(base))
    assert all(torch.equal(base.tensor(name), before[name]) for name in before)


def test_rounding_that_loses_the_delta_is_said_once(caplog) -> None:
    torch.manual_seed(0)
    base = Checkpoint("base", {"a": torch.randn(64, 64), "b": torch.randn(64, 64)})
    delta = make(base, {name: sign((64, 64), scale=2e-3) for name in ("a", "b")})
    with caplog.at_level(logging.WARNING, "bitdelta_compile"):
        list(delta.materialize(base))
        assert not caplog.records
        list(delta.materialize(base, dtype=torch.bfloat16))
    assert len(caplog.messages) == 1
    assert "dtype=torch.float32 keeps it whole" in caplog.messages[0]


class Accounting(TorchDispatchMode):
    """Counts the bytes of live storages that operators made while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_materialize_holds_a_couple_of_tensors_at_a_time(tmp_path, monkeypatch, dtype) -> None:
    monkeypatch.setattr(encodings_module, "_BLOCK", 1 << 12)
    monkeypatch.setattr("bitdelta_compile.materialize._BLOCK", 1 << 12)
    shape = (256, 512)
    torch.manual_seed(0)
    base = Checkpoint("base", {f"p{index}": torch.randn(shape) for index in range(8)})
    encodings = {f"p{index}": sign(shape) for index in range(6)}
    encodings |= {"p6": rows(shape, [3], over=sign(shape)), "p7": Dense(shape, torch.float32, torch.randn(shape))}
    delta = make(base, encodings)
    with Accounting() as accounting:
        for _, tensor in delta.materialize(base, dtype=dtype):
            del tensor
        delta.save_pretrained(base, tmp_path / "out", dtype=dtype)
    largest = 4 * shape[0] * shape[1]
    assert largest <= accounting.peak < 2.5 * largest


def test_other_bases_are_refused_before_anything_is_made() -> None:
    base, encodings = every_encoding()
    delta = make(base, encodings)
    other = Checkpoint("stranger", {name: base.tensor(name).float() + 1 for name in base.names()})
    with pytest.raises(BaseMismatchError, match="stranger is not the base"):
        delta.materialize(other)
    unchecked = Delta(encodings, {}, make(base, {}).fingerprint)
    for change, message in (
        ({"sign": torch.randn(5, 37)}, r"sign has shape \[5, 37\] in changed and the delta needs \[6, 37\]"),
        ({"over": torch.randn(8, 37)}, r"over has shape \[8, 37\]"),
        ({"rows": torch.randn(5, 37)}, "rows grew from 5 to 6 rows"),
        ({"rows": torch.randn(6, 36)}, r"rows has shape \[6, 36\]"),
        ({"rows": torch.randn(6)}, r"rows has shape \[6\]"),
        ({"rows": torch.tensor(1.0)}, r"rows has shape \[\]"),
        ({"flipped_rows": torch.randn(6, 37)}, r"flipped_rows has shape"),
        ({"same": torch.randn(7)}, r"same has shape \[7\]"),
    ):
        changed = Checkpoint("changed", {name: base.tensor(name) for name in base.names()} | change)
        with pytest.raises(BaseMismatchError, match=message):
            unchecked.materialize(changed)
    without = Checkpoint("partial", {name: base.tensor(name) for name in base.names() if name != "sign"})
    with pytest.raises(BaseMismatchError, match="partial has no parameter for sign, whose delta is stored as sign"):
        unchecked.materialize(without)


@pytest.mark.parametrize("field", ["value", "left", "over.right"])
def test_damaged_values_are_found_on_use(field) -> None:
    base, _ = every_encoding()
    encoding: Encoding = Dense((6, 37), torch.float32, torch.randn(6, 37))
    if field != "value":
        encoding = sign((6, 37), rank=2)
    if field == "over.right":
        encoding = rows((6, 37), [1], over=encoding)
    holder = encoding.over if isinstance(encoding, Rows) else encoding
    getattr(holder, field.rpartition(".")[2])[0, 0] = float("nan")
    with pytest.raises(DeltaFileError, match=rf"sign: {field} holds NaN or infinite"):
        list(make(base, {"sign": encoding}).materialize(base))


def test_names_with_the_separator_are_refused(tmp_path) -> None:
    base, _ = every_encoding()
    with pytest.raises(BitDeltaError, match="'a//b' contains '//'"):
        make(base, {"a//b": Same((6, 37), torch.float32)}).save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_named(tmp_path) -> None:
    base, encodings = every_encoding()
    delta = make(base, encodings)
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "absent" / "x", tmp_path / "folder"):
        with pytest.raises(BitDeltaError, match="the delta cannot be written to"):
            delta.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_summary_counts_by_kind() -> None:
    delta = make(*every_encoding())
    lines = delta.summary().splitlines()
    assert [line.split()[0] for line in lines] == ["encoding", "same", "dense", "sign", "rows", "all"]
    assert lines[-1].split()[1] == str(len(delta.encodings))
    assert lines[-1].split()[3] == str(delta.nbytes - delta.fingerprint.samples.nbytes)


def bert() -> nn.Module:
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 20}
    return transformers.BertModel(transformers.BertConfig(**size, num_hidden_layers=1, num_attention_heads=2))


def bert_masked() -> nn.Module:
    return transformers.BertForMaskedLM(bert().config)


def llama(tied: bool = True, vocabulary: int = 40) -> nn.Module:
    size = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, num_attention_heads=2, tie_word_embeddings=tied)
    )


def untied_llama() -> nn.Module:
    return llama(tied=False)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=20)
    )


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def encode_model(base: Checkpoint, tuned: Checkpoint) -> dict[str, Encoding]:
    encodings: dict[str, Encoding] = {}
    for name in tuned.names():
        tensor = tuned.tensor(name)
        shape = tuple(tensor.shape)
        if tensor.dim() != 2:
            encodings[name] = Dense(shape, tensor.dtype, tensor)
        elif shape != base.shape(name):
            over = sign(base.shape(name), tensor.dtype)
            grown = list(range(base.shape(name)[0], shape[0]))
            encodings[name] = Rows(shape, tensor.dtype, torch.tensor(grown), tensor[grown], over)
        else:
            encodings[name] = sign(shape, tensor.dtype, transposed="c_attn" in name)
    return encodings


@pytest.mark.parametrize("build", [bert, bert_masked, llama, untied_llama, gpt2, t5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saved_checkpoints_load_in_transformers(tmp_path, build, dtype) -> None:
    torch.manual_seed(0)
    base, tuned = build().to(dtype), build().to(dtype)
    opened = open_checkpoint(base)
    delta = Delta.of(opened, open_checkpoint(tuned), encode_model(opened, open_checkpoint(tuned)))
    delta.save(tmp_path / "x")
    folder = tmp_path / "out"
    Delta.load(tmp_path / "x").save_pretrained(base, folder)
    loaded, report = type(base).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == dtype
    found = dict(loaded.named_parameters(remove_duplicate=False))
    expected = {name: e.apply(opened.tensor(name)).to(dtype) for name, e in delta.encodings.items()}
    assert found.keys() == expected.keys() | delta.tied.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[delta.tied.get(name, name)]), name


def test_tied_weights_that_the_config_does_not_tie_are_written_out(tmp_path) -> None:
    base, tuned = untied_llama(), untied_llama()
    for model in (base, tuned):
        model.lm_head.weight = model.model.embed_tokens.weight
    opened = open_checkpoint(base)
    delta = Delta.of(opened, open_checkpoint(tuned), encode_model(opened, open_checkpoint(tuned)))
    assert delta.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    delta.save_pretrained(base, tmp_path / "out")
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_a_body_serves_as_base_and_a_vocabulary_may_grow(tmp_path) -> None:
    torch.manual_seed(0)
    base, tuned = llama(), llama(vocabulary=43)
    opened = open_checkpoint(base)
    delta = Delta.of(opened, open_checkpoint(tuned), encode_model(opened, open_checkpoint(tuned)))
    delta.side_files["config.json"]["torch_dtype"] = "float32"
    delta.save_pretrained(base.model, tmp_path / "out", dtype=torch.bfloat16)
    assert "torch_dtype" not in open_checkpoint(tmp_path / "out").side_files["config.json"]
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 43
    assert loaded.dtype == torch.bfloat16
    grown = tuned.model.embed_tokens.weight[40:].to(torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight[40:], grown)


def test_shards_and_side_files(tmp_path) -> None:
    torch.manual_seed(0)
    base = bert()
    opened = open_checkpoint(base)
    opened.side_files["vocab.txt"] = "\n".join(f"word{index}" for index in range(2000))
    tuned = Checkpoint("tuned", {name: opened.tensor(name) for name in opened.names()}, opened.side_files)
    tuned.side_files |= {"tokenizer_config.json": {"unk": "ä"}, "1_Pooling/config.json": {"mean": True}}
    delta = Delta.of(opened, tuned, encode_model(opened, tuned))
    delta.save_pretrained(opened, tmp_path / "out", max_shard_size=4000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert not any(transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)[1].values())
    written = open_checkpoint(tmp_path / "out")
    assert written.side_files == tuned.side_files
    assert all(torch.equal(written.tensor(name), tensor) for name, tensor in delta.materialize(opened))
    with pytest.raises(
        BaseMismatchError, match=r"vocab\.txt is stored as a patch of the base's, and BertModel has none"
    ):
        delta.save_pretrained(base, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_folders_in_use_are_refused_and_failures_leave_nothing(tmp_path) -> None:
    base, encodings = every_encoding()
    delta = make(base, encodings)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for taken in (tmp_path / "used", tmp_path / "used" / "file"):
        with pytest.raises(BitDeltaError, match="exists and is not an empty folder"):
            delta.save_pretrained(base, taken)
    encodings["bias"].value[0] = float("inf")
    with pytest.raises(DeltaFileError, match="bias: value"):
        delta.save_pretrained(base, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["used"]
    (tmp_path / "empty").mkdir()
    encodings["bias"].value[0] = 0
    delta.save_pretrained(base, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "model.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
