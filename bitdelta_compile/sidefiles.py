"""What is not a weight (config, generation config, tokenizer), stored against the base's copy where that is shorter.

A packed side file is its plain value (parsed JSON, or text), or `FromBase`: a patch of the base's file of that name.
Patches are structural: of a table {"set": {key: value}, "drop": [keys], "edit": {key: patch}}; of a list {"edit":
{index: patch}} or {"at": first, "cut": how many, "add": [values]}; of anything {"value": replacement}; null where
nothing changes. Text is patched as its list of lines.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import cast

from .checkpoint import SIDE_FILES
from .errors import BaseMismatchError, DeltaFileError

# Files below this size stay whole: they compress to next to nothing, and can then be read without the base.
WHOLE_BELOW = 4096  # bytes of canonical JSON
MAX_DEPTH = 100  # levels of nesting in a file or patch: more than any tokenizer has, less than exhausts the stack


@dataclasses.dataclass(frozen=True)
class FromBase:
    """A side file as a patch of the base's; `sha256` is that of the canonical bytes of the result."""

    patch: object
    sha256: str


def canonical(value: object) -> bytes:
    """The bytes that stand for a side file: JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _sha256(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def pack(tuned: Mapping[str, object], base: Mapping[str, object]) -> dict[str, object]:
    """The tuned model's side files, large ones as patches of the base's where that is shorter once compressed."""
    packed: dict[str, object] = {}
    for name, value in tuned.items():
        packed[name] = value
        whole = canonical(value)
        if name not in base or len(whole) < WHOLE_BELOW or isinstance(base[name], str) != isinstance(value, str):
            continue
        patch = _diff(_as_json(base[name]), _as_json(value))
        if len(zlib.compress(canonical(patch))) < len(zlib.compress(whole)):
            packed[name] = FromBase(patch, _sha256(value))
    return packed


def unpack(packed: Mapping[str, object], base: Mapping[str, object], source: str) -> dict[str, object]:
    """The inverse of `pack`.

    Args:
        base: the base's side files.
        source: the base, for messages.

    Raises:
        BaseMismatchError: the base's file is missing or is not the one the patch was made against.
    """
    return {name: resolve(name, value, base, source) for name, value in packed.items()}


def resolve(name: str, value: object, base: Mapping[str, object], source: str) -> object:
    """One packed side file as its plain value; see `unpack`."""
    if not isinstance(value, FromBase):
        return value
    if name not in base:
        raise BaseMismatchError(
            f"{name} is stored as a patch of the base's, and {source} has none: give the base as its folder or hub id"
        )
    try:
        patched = _patched(_as_json(base[name]), value.patch)
        result = "\n".join(cast(list[str], patched)) if isinstance(base[name], str) else patched
        matches = _sha256(result) == value.sha256
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        matches = False
    if not matches:
        raise BaseMismatchError(
            f"{name} of {source} is not the one that the delta's is a patch of: give the base it was compressed against"
        )
    return result


def to_json(packed: Mapping[str, object]) -> dict[str, object]:
    """Packed side files as a JSON value; `from_json` is the inverse."""
    return {
        name: {"patch": value.patch, "sha256": value.sha256} if isinstance(value, FromBase) else {"value": value}
        for name, value in packed.items()
    }


def from_json(stored: object) -> dict[str, object]:
    """Packed side files out of a delta file.

    Raises:
        DeltaFileError: a file name that is not one of `SIDE_FILES` (it would be written to disk), or a malformed entry.
    """
    if not isinstance(stored, dict):
        raise DeltaFileError("the side files are not a table")
    packed: dict[str, object] = {}
    for name, entry in stored.items():
        if name not in SIDE_FILES:
            raise DeltaFileError(f"the side file {name[:80]!r} is none of those a checkpoint has")
        if not _nests_within(entry, MAX_DEPTH):
            raise DeltaFileError(f"the side file {name} nests deeper than {MAX_DEPTH} levels")
        if isinstance(entry, dict) and set(entry) == {"value"}:
            packed[name] = entry["value"]
            if not name.endswith(".json") and not _is_text(entry["value"]):
                raise DeltaFileError(f"the side file {name} is not text")
        elif isinstance(entry, dict) and set(entry) == {"patch", "sha256"} and isinstance(entry["sha256"], str):
            packed[name] = FromBase(entry["patch"], entry["sha256"])
        else:
            raise DeltaFileError(f"the side file {name} is malformed")
    return packed


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _nests_within(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_nests_within(item, levels - 1) for item in inner if isinstance(item, dict | list))


def _as_json(value: object) -> object:
    return value.split("\n") if isinstance(value, str) else value


def _equal(old: object, new: object) -> bool:
    """Equality as JSON sees it, where 1, 1.0 and true are three values."""
    return old == new and canonical(old) == canonical(new)


def _diff(old: object, new: object) -> object:
    """The patch that makes `new` of `old`."""
    if _equal(old, new):
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        patch: dict[str, object] = {
            "set": {key: value for key, value in new.items() if key not in old},
            "drop": [key for key in old if key not in new],
            "edit": {key: _diff(old[key], new[key]) for key in new if key in old and not _equal(old[key], new[key])},
        }
        return {key: part for key, part in patch.items() if part}
    if isinstance(old, list) and isinstance(new, list):
        choices: list[object] = [_splice(old, new)]
        if len(old) == len(new):
            changed = (index for index in range(len(old)) if not _equal(old[index], new[index]))
            choices.append({"edit": {str(index): _diff(old[index], new[index]) for index in changed}})
        return min(choices, key=lambda choice: len(canonical(choice)))
    return {"value": new}


def _splice(old: list[object], new: list[object]) -> object:
    """What lies between the common head and the common tail of two lists."""
    shorter = min(len(old), len(new))
    head = 0
    while head < shorter and _equal(old[head], new[head]):
        head += 1
    tail = 0
    while tail < shorter - head and _equal(old[-1 - tail], new[-1 - tail]):
        tail += 1
    return {"at": head, "cut": len(old) - tail - head, "add": new[head : len(new) - tail]}


def _patched(old: object, patch: object) -> object:
    """`old` with a patch applied; raises whatever error a patch that does not fit runs into."""
    if patch is None:
        return old
    if not isinstance(patch, dict):
        raise TypeError("a patch is a table or null")
    if "value" in patch:
        return patch["value"]
    if "at" in patch:
        listed = cast(list[object], old)
        return listed[: patch["at"]] + patch["add"] + listed[patch["at"] + patch["cut"] :]
    if isinstance(old, list):
        items = list(old)
        for index, part in patch["edit"].items():
            items[int(index)] = _patched(items[int(index)], part)
        return items
    table = {key: value for key, value in cast(dict[str, object], old).items() if key not in patch.get("drop", ())}
    for key, part in patch.get("edit", {}).items():
        table[key] = _patched(table[key], part)
    return table | patch.get("set", {})
