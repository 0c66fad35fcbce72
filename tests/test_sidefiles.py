"""Side files as patches of the base's."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitdelta_compile import sidefiles
from bitdelta_compile.errors import BaseMismatchError, DeltaFileError
from bitdelta_compile.sidefiles import FromBase

VOCABULARY = {f"token{index}": index for index in range(2000)}
BASE = {
    "config.json": {"hidden_size": 4},
    "tokenizer.json": {"model": {"vocab": VOCABULARY, "merges": [f"a b{index}" for index in range(500)]}, "pad": None},
    "vocab.txt": "\n".join(VOCABULARY) + "\n",
}

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False, width=16) | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)


@given(values, values)
@example({"a": 1, "b": [0]}, {"a": True, "b": [0.0]})
def test_any_value_is_made_of_any_other(old, new) -> None:
    patch = json.loads(json.dumps(sidefiles._diff(old, new)))
    assert sidefiles.canonical(sidefiles._patched(old, patch)) == sidefiles.canonical(new)


def test_equal_files_are_references_and_small_ones_stay_whole() -> None:
    packed = sidefiles.pack(BASE, BASE)
    assert packed["config.json"] == {"hidden_size": 4}
    assert packed["tokenizer.json"].patch is None
    assert packed["vocab.txt"].patch is None
    assert sidefiles.unpack(packed, BASE, "base") == BASE


def test_differences_are_small_patches() -> None:
    tokenizer = {
        "model": {"vocab": {**VOCABULARY, "new": 2000}, "merges": BASE["tokenizer.json"]["model"]["merges"][:-1]},
        "pad": 3,
    }
    tuned = {"tokenizer.json": tokenizer, "vocab.txt": BASE["vocab.txt"] + "new\n"}
    packed = sidefiles.pack(tuned, BASE)
    assert packed["vocab.txt"].patch == {"at": 2000, "cut": 0, "add": ["new"]}
    assert len(sidefiles.canonical(sidefiles.to_json(packed))) < 500
    restored = sidefiles.from_json(json.loads(json.dumps(sidefiles.to_json(packed))))
    assert sidefiles.unpack(restored, BASE, "base") == tuned


def test_unrelated_files_are_kept_whole() -> None:
    tuned = {"tokenizer.json": {"model": {"vocab": {f"other{index}": index for index in range(900)}}}}
    assert sidefiles.pack(tuned, {}) == tuned
    assert sidefiles.unpack(sidefiles.pack(tuned, BASE), BASE, "base") == tuned


def test_another_base_is_refused() -> None:
    packed = sidefiles.pack(BASE, BASE)
    with pytest.raises(BaseMismatchError, match=r"tokenizer\.json is stored as a patch .* and Llama has none"):
        sidefiles.unpack(packed, {}, "Llama")
    other = {**BASE, "tokenizer.json": {"model": {}}}
    with pytest.raises(BaseMismatchError, match=r"tokenizer\.json of other is not the one"):
        sidefiles.unpack(packed, other, "other")


@pytest.mark.parametrize(
    "patch",
    [
        7,
        [],
        {},
        {"at": "x"},
        {"at": 0, "cut": None, "add": 3},
        {"edit": {"99": None}},
        {"edit": 4},
        {"set": [1]},
        {"drop": 3},
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_malformed_patches_are_refused(patch, name) -> None:
    with pytest.raises(BaseMismatchError, match="is not the one"):
        sidefiles.unpack({name: FromBase(patch, "0" * 64)}, BASE, "base")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([], "not a table"),
        ({"../evil.json": {"value": 1}}, r"'../evil\.json' is none of those"),
        ({"/etc/passwd": {"value": "x"}}, "none of those"),
        ({"vocab.txt": {"value": 3}}, "not text"),
        ({"vocab.txt": {"value": "\ud800"}}, "not text"),
        ({"config.json": {}}, "malformed"),
        ({"config.json": {"patch": None, "sha256": 3}}, "malformed"),
    ],
)
def test_hostile_tables_are_refused(stored, message) -> None:
    with pytest.raises(DeltaFileError, match=message):
        sidefiles.from_json(stored)
