"""Delta files that are damaged or malicious: each gives one clear error, allocates nothing, and changes nothing."""

import base64
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitdelta_compile.kernels import layout
from safetensors.torch import save_file

from bitdelta_compile.checkpoint import Checkpoint, open_checkpoint
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Dense, Rows, Same, Sign
from bitdelta_compile.errors import BaseMismatchError, CheckpointError, DeltaFileError

BASE = {"m": torch.ones(4, 37), "t": torch.ones(5, 37), "b": torch.ones(3), "s": torch.ones(2, 2)}


def sign(rows: int) -> Sign:
    return Sign((rows, 37), torch.float32, layout.pack(torch.ones(1, rows, 37, dtype=torch.bool)), torch.ones(1, rows))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    encodings = {
        "m": sign(4),
        "t": Rows((6, 37), torch.float32, torch.tensor([1, 5]), torch.ones(2, 37), sign(5)),
        "b": Dense((3,), torch.float32, torch.ones(3)),
        "s": Same((2, 2), torch.float32),
    }
    path = tmp_path / "x.bitdelta.safetensors"
    base = Checkpoint("base", BASE)
    Delta.of(base, Checkpoint("tuned", {}, {"config.json": {"a": 1}}), encodings).save(path)
    return path


class Forged:
    """A delta file taken apart: `header` (tensor entries), `metadata`, `contents` (decompressed), `data`."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + size])
        self.metadata: dict[str, Any] = self.header.pop("__metadata__")
        self.contents: Any = json.loads(zlib.decompress(base64.b64decode(self.metadata["contents"])))
        self.data = bytearray(raw[8 + size :])

    def set(self, name: str, offset: int, value: bytes) -> None:
        start = self.header[name]["data_offsets"][0] + offset
        self.data[start : start + len(value)] = value

    def write(self, path: Path, *, repack: bool = True) -> None:
        if repack:
            self.metadata["contents"] = base64.b64encode(zlib.compress(json.dumps(self.contents).encode())).decode()
        header = json.dumps({"__metadata__": self.metadata, **self.header}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + self.data)


def assert_refused(path: Path, message: str) -> None:
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(DeltaFileError, match=message) as caught:
        Delta.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert before is None or path.read_bytes() == before


def test_an_unforged_file_loads(path) -> None:
    Forged(path).write(path)
    assert set(Delta.load(path).encodings) == {"m", "t", "b", "s"}


def test_every_truncation_is_refused(path) -> None:
    whole = path.read_bytes()
    for length in [*range(0, 40), *range(40, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert_refused(path, "header claims|too few|truncated|is not JSON")
    path.write_bytes(whole + b"x")
    assert_refused(path, "bytes that no tensor claims")


def test_not_files_and_not_safetensors(tmp_path) -> None:
    assert_refused(tmp_path, "it is a folder")
    assert_refused(tmp_path / "absent", "No such file")
    target = tmp_path / "x"
    for content, message in (
        (b"PK\x03\x04" + bytes(100), "header claims"),
        (b"\xff" * 200, "header claims"),
        (struct.pack("<Q", 4) + b"\xff\xfe\x00\x01", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 20000) + b"[" * 20000, "not JSON"),
        (struct.pack("<Q", 18) + b'{"__metadata__":3}', "not a table of strings"),
        (struct.pack("<Q", 2) + b"{}", "not a delta"),
    ):
        target.write_bytes(content)
        assert_refused(target, message)
    save_file({"a": torch.ones(2)}, target)
    assert_refused(target, "a safetensors file but not a delta")


def test_duplicate_names(path) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip()
    twice = header[:-1] + b',"b//value":' + json.dumps(json.loads(header)["b//value"]).encode() + b"}"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + raw[8 + size :])
    assert_refused(path, "names 'b//value' twice")
    path.write_bytes(raw)
    forged = Forged(path)
    doubled = json.dumps(forged.contents)[:-1] + ', "tied": {}}'
    forged.metadata["contents"] = base64.b64encode(zlib.compress(doubled.encode())).decode()
    forged.write(path, repack=False)
    assert_refused(path, "names 'tied' twice")


def entry(name: str, **fields: object) -> Callable[[Forged], None]:
    return lambda forged: forged.header[name].update(fields)


HUGE = 1 << 60
HEADERS = {
    "huge": (entry("b//value", shape=[HUGE], data_offsets=[0, 4 * HUGE]), "overlaps|claim|cannot lie"),
    "huge in the middle": (entry("b//value", shape=[HUGE]), "b//value .* cannot lie in bytes"),
    "product overflow": (entry("b//value", shape=[HUGE, HUGE, 0]), "impossible shape"),
    "beyond 63 bits": (entry("b//value", shape=[1 << 64]), "impossible shape"),
    "negative": (entry("b//value", shape=[-3]), "impossible shape"),
    "fraction": (entry("b//value", shape=[3.0]), "impossible shape"),
    "boolean": (entry("b//value", shape=[True, 3]), "impossible shape"),
    "many dimensions": (entry("b//value", shape=[3, *[1] * 100000]), "impossible shape"),
    "unknown dtype": (entry("b//value", dtype="F7"), "dtype 'F7'"),
    "dtype of no kind": (entry("b//value", dtype=["F32"]), "dtype"),
    "wide dtype": (entry("b//value", dtype="F64"), "cannot lie"),
    "offsets reversed": (entry("b//value", data_offsets=[12, 0]), "cannot lie"),
    "three offsets": (entry("b//value", data_offsets=[0, 4, 12]), "malformed data_offsets"),
    "extra field": (entry("b//value", more=1), "is not described by"),
    "no table": (lambda forged: forged.header.update({"b//value": 3}), "is not described by"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers(path, case) -> None:
    change, message = HEADERS[case]
    forged = Forged(path)
    change(forged)
    forged.write(path)
    assert_refused(path, message)


@pytest.mark.parametrize(("shift", "message"), [(-4, "overlaps the tensor before"), (4, "leaves a gap before")])
def test_overlaps_and_gaps(path, shift, message) -> None:
    forged = Forged(path)
    moved = forged.header["m//row_scale"]
    moved["data_offsets"] = [offset + shift for offset in moved["data_offsets"]]
    forged.write(path)
    assert_refused(path, message)


def contents(change: Callable[[Any], object]) -> Callable[[Forged], None]:
    def apply(forged: Forged) -> None:
        change(forged.contents)

    return apply


def metadata(**fields: str) -> Callable[[Forged], None]:
    return lambda forged: forged.metadata.update(fields)


def tensor(name: str, value: object, offset: int = 0) -> Callable[[Forged], None]:
    kind = "<f" if isinstance(value, float) else "<q"
    return lambda forged: forged.set(name, offset, struct.pack(kind, value))


def rename(old: str, new: str) -> Callable[[Forged], None]:
    return lambda forged: forged.header.update({new: forged.header.pop(old)})


def about(name: str, **fields: object) -> Callable[[Forged], None]:
    return contents(lambda c: c["encodings"][name].update(fields))


CONTENTS = {
    "newer": (metadata(format_version="2"), "format version is 2 and this package reads 1"),
    "much newer": (metadata(format_version="9" * 5000), "format version is 9+ and"),
    "no number": (metadata(format_version="1.5b"), "not a number"),
    "empty version": (metadata(format_version=""), "not a number"),
    "other format": (metadata(format="pt"), "not a delta"),
    "no encodings": (contents(lambda c: c.pop("encodings")), "lack the table 'encodings'"),
    "encodings a list": (contents(lambda c: c.update(encodings=[])), "lack the table 'encodings'"),
    "encoding a list": (contents(lambda c: c["encodings"].update(m=[])), "m is not described by a table"),
    "unknown kind": (about("m", kind="ternary"), "'ternary', which this version does not know"),
    "kind a list": (about("m", kind=["sign"]), "does not know"),
    "shape mismatch": (about("b", shape=[4]), r"b//value has shape \[3\] and must have \[4\]"),
    "sign rows mismatch": (about("m", shape=[5, 37]), "m: signs .* do not fit 5"),
    "sign words mismatch": (about("m", shape=[4, 65]), "m: signs .* expected 3 words"),
    "sign of a vector": (about("m", shape=[4]), "m: a sign encoding is of a matrix"),
    "orientation": (about("m", transposed=True), "m: signs"),
    "orientation a number": (about("m", transposed=[]), "malformed shape, dtype or orientation"),
    "shape a string": (about("m", shape="4x37"), "malformed shape"),
    "dtype unknown": (about("m", dtype="F7"), "malformed shape, dtype"),
    "dtype mismatch": (about("b", dtype="BF16"), r"b//value is torch\.float32 and must be torch\.bfloat16"),
    "field missing": (rename("m//row_scale", "m//scale"), "m//row_scale is missing"),
    "field extra": (rename("b//value", "m//col_scale"), "m: col_scale must be"),
    "left without right": (rename("b//value", "m//left"), "m//left is torch.float32 and must be torch.bfloat16"),
    "tensor of nobody": (contents(lambda c: c["encodings"].pop("b")), "'b//value', which belongs to no encoding"),
    "rows over rows": (
        contents(lambda c: c["encodings"]["t"]["over"].update(kind="rows")),
        "t has the encoding 'rows'",
    ),
    "rows over same": (contents(lambda c: c["encodings"]["t"]["over"].update(kind="same")), "only sign planes"),
    "rows of a vector": (about("t", shape=[6]), "t: a rows encoding is of a matrix"),
    "rows too short": (about("t", shape=[4, 37]), "not ascending within 4 rows"),
    "rows too many": (about("t", shape=[8, 37]), "not all the new ones are stored"),
    "index unsorted": (tensor("t//index", 5), "not ascending"),
    "index negative": (tensor("t//index", -1), "not ascending"),
    "index beyond": (tensor("t//index", 6, 8), "not ascending"),
    "index misses new row": (tensor("t//index", 4, 8), "not all the new ones"),
    "scale nan": (tensor("m//row_scale", float("nan"), 4), "m//row_scale holds NaN or infinite"),
    "scale inf": (tensor("t//over.row_scale", float("inf")), "t//over.row_scale holds NaN or infinite"),
    "ragged bits": (
        lambda forged: forged.set("m//signs", 4, b"\xff\xff\xff\xff"),
        "m: signs carry bits past feature 37",
    ),
    "tied to nothing": (contents(lambda c: c.update(tied={"a": "z"})), "ties 'a' to 'z'"),
    "tied to a number": (contents(lambda c: c.update(tied={"a": 3})), "ties 'a'"),
    "tied twice": (contents(lambda c: c.update(tied={"b": "m"})), "ties 'b'"),
    "fingerprint gone": (contents(lambda c: c.pop("fingerprint")), "lack the table 'fingerprint'"),
    "fingerprint short": (contents(lambda c: c["fingerprint"]["names"].pop()), "fingerprint of the base is malformed"),
    "fingerprint shapes": (contents(lambda c: c["fingerprint"].update(shapes=["x"] * 4)), "fingerprint .* malformed"),
    "fingerprint names": (contents(lambda c: c["fingerprint"].update(names=[[]] * 4)), "fingerprint .* malformed"),
    "fingerprint dtype": (entry("//fingerprint", dtype="F16"), "fingerprint .* malformed"),
    "side file outside": (
        contents(lambda c: c.update(side_files={"../x.json": {"value": 1}})),
        r"'\.\./x\.json' is none of those",
    ),
    "side files gone": (contents(lambda c: c.pop("side_files")), "side files are not a table"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_hostile_contents(path, case) -> None:
    change, message = CONTENTS[case]
    forged = Forged(path)
    change(forged)
    forged.write(path)
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("", "not compressed JSON|cut short"),
        ("é", "not compressed JSON"),
        ("AAAA", "not compressed JSON"),
        (base64.b64encode(zlib.compress(b"{}")[:-3]).decode(), "cut short"),
        (base64.b64encode(zlib.compress(b"[]")).decode(), "not a table"),
        (base64.b64encode(zlib.compress(b"[" * 100000)).decode(), "not compressed JSON"),
    ],
)
def test_hostile_compression(path, packed, message) -> None:
    forged = Forged(path)
    forged.metadata["contents"] = packed
    forged.write(path, repack=False)
    assert_refused(path, message)


def test_decompression_bombs_are_not_inflated(path, monkeypatch) -> None:
    monkeypatch.setattr("bitdelta_compile.deltafile.MAX_CONTENTS", 1 << 16)
    forged = Forged(path)
    forged.contents["report"] = {"bomb": "0" * (1 << 20)}
    forged.write(path)
    assert_refused(path, "larger than any delta's")


def test_hostile_side_files(path, tmp_path) -> None:
    forged = Forged(path)
    base = Checkpoint("base", BASE, {"tokenizer.json": {"a": 1}})
    forged.contents["side_files"] = {"tokenizer.json": {"patch": {"edit": {"b": None}}, "sha256": ""}}
    forged.write(path)
    with pytest.raises(BaseMismatchError, match=r"tokenizer\.json of base is not the one"):
        Delta.load(path).save_pretrained(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    nested: object = None
    for _ in range(150):
        nested = {"edit": {"a": nested}}
    for entry in ({"patch": nested, "sha256": ""}, {"value": nested}):
        forged.contents["side_files"] = {"tokenizer.json": entry}
        forged.write(path)
        assert_refused(path, r"tokenizer\.json nests deeper than 100 levels")


def test_a_delta_for_another_base(path, tmp_path) -> None:
    delta = Delta.load(path)
    other = Checkpoint("other", {name: value + 1 for name, value in BASE.items()})
    for use in (delta.materialize, lambda base: delta.save_pretrained(base, tmp_path / "out")):
        with pytest.raises(BaseMismatchError, match=r"other is not the base .* \(4 of 4 parameters differ\)"):
            use(other)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_zero_sized_dimensions_work(tmp_path) -> None:
    base = {"e": torch.zeros(0, 40), "n": torch.zeros(3, 0), "f": torch.ones(3)}
    empty = layout.pack(torch.zeros(1, 0, 40, dtype=torch.bool))
    encodings = {
        "e": Sign((0, 40), torch.float32, empty, torch.zeros(1, 0)),
        "n": Rows((4, 0), torch.float32, torch.tensor([3]), torch.zeros(1, 0)),
        "f": Dense((0,), torch.float32, torch.zeros(0)),
    }
    Delta.of(Checkpoint("base", base), Checkpoint("tuned", {}), encodings).save(tmp_path / "x")
    delta = Delta.load(tmp_path / "x")
    assert {name: tuple(t.shape) for name, t in delta.materialize(Checkpoint("base", base))} == {
        "e": (0, 40),
        "n": (4, 0),
        "f": (0,),
    }
    delta.save_pretrained(Checkpoint("base", base), tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").shape("n") == (4, 0)


def test_hostile_checkpoints_are_refused(path, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    forged = Forged(path)
    forged.header["b//value"]["shape"] = [HUGE]
    forged.write(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a readable checkpoint: b//value .* cannot lie"):
        open_checkpoint(folder)
