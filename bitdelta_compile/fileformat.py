"""Safetensors files read with suspicion and written atomically.

Format: 8 bytes little-endian header length; a JSON header `{name: {dtype, shape, data_offsets}}` with string
metadata under `__metadata__`; tensor bytes. Every claim of the header is checked against the file's length before a
tensor exists; tensors are then views of one mapping.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_DIMENSIONS = 16
MAX_INT = 2**63 - 1


class FormatError(ValueError):
    """The bytes are not a well-formed safetensors file; callers add which file and what to do."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `start` and `stop` are bytes after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A validated header: `entries` by name in stored order, `offset` of tensor data, `length` of the file."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its dtype and shape are known first, its values when `produce` is called."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    produce: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """`object_pairs_hook` of json that refuses an object which says the same key twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise FormatError(f"the header names {twice!r} twice")
    return found


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file.

    Raises:
        FormatError: not a file, too short, malformed JSON, duplicate names, unknown dtype, impossible shape,
            offsets that disagree with dtype and shape, overlap, leave gaps, or do not end where the file ends.
    """
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            if length < 8:
                raise FormatError(f"it has {length} bytes, too few for a safetensors header")
            size = int.from_bytes(file.read(8), "little")
            if size > min(length - 8, MAX_HEADER):
                raise FormatError(
                    f"its header claims {size} bytes but {length - 8} follow: truncated, or not a safetensors file"
                )
            raw = file.read(size)
    except IsADirectoryError:
        raise FormatError("it is a folder, not a file") from None
    except OSError as error:
        raise FormatError(f"it cannot be read ({error.strerror})") from None
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except FormatError:
        raise
    except (ValueError, RecursionError):
        raise FormatError("its header is not JSON: not a safetensors file") from None
    if not isinstance(parsed, dict):
        raise FormatError("its header is not a JSON object: not a safetensors file")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("its metadata is not a table of strings")
    entries = [_entry(name, fields) for name, fields in parsed.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    data = length - 8 - size
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise FormatError(f"{entry.name} at byte {entry.start} {kind}, which ends at byte {position}")
        position = entry.stop
    if position != data:
        what = "truncated" if position > data else "followed by bytes that no tensor claims"
        raise FormatError(f"its tensors claim {position} bytes but {data} follow the header: {what}")
    return Header({entry.name: entry for entry in entries}, metadata, 8 + size, length)


def _entry(name: str, fields: object) -> Entry:
    """One header entry; FormatError unless dtype, shape and offsets are well-formed and agree."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise FormatError(f"{name} has the dtype {str(fields['dtype'])[:40]!r}, which this version does not know")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not naturals(shape) or len(shape) > MAX_DIMENSIONS or math.prod(size for size in shape if size) > MAX_INT:
        raise FormatError(f"{name} has the impossible shape {str(shape)[:80]}")
    if not naturals(offsets) or len(offsets) != 2:
        raise FormatError(f"{name} has malformed data_offsets {str(offsets)[:80]}")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise FormatError(f"{name} of shape {shape} and dtype {fields['dtype']} cannot lie in bytes {start} to {stop}")
    return Entry(name, dtype, tuple(shape), start, stop)


def naturals(value: object) -> bool:
    """Whether a JSON value is a list of sizes: integers from 0 to 2**63 - 1."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_INT for item in value)


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """Every tensor of the file as a view of one private mapping: nothing is read until it is used.

    Tensors that do not lie at a multiple of their item size, which torch cannot view, are copied.
    """
    whole = torch.from_file(str(path), shared=False, size=header.length, dtype=torch.uint8)
    found = {}
    for entry in header.entries.values():
        start, stop = header.offset + entry.start, header.offset + entry.stop
        if start == stop:
            found[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
            continue
        raw = whole[start:stop]
        if start % entry.dtype.itemsize:
            raw = raw.clone()
        found[entry.name] = raw.view(entry.dtype).view(entry.shape)
    return found


def write_safetensors(path: str | Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file one tensor at a time, atomically.

    The header is written from the specs, then each tensor is produced, written and let go. Tensors are laid out by
    falling item size so that each lies at a multiple of its own. The file appears under its name only when
    complete; after any failure what was there stays.

    Raises:
        ValueError: a name used twice, a dtype that safetensors lacks, or a tensor that is not what its spec says.
    """
    path = Path(path)
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in ordered:
        if spec.name in table:
            raise ValueError(f"two tensors are named {spec.name!r}")
        if spec.dtype not in DTYPE_NAMES:
            raise ValueError(f"{spec.name} has dtype {spec.dtype}, which a safetensors file cannot hold")
        offsets = [position, position + spec.nbytes]
        table[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for spec in ordered:
                tensor = spec.produce()
                if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                    found = f"{tensor.dtype} {list(tensor.shape)}"
                    raise ValueError(
                        f"{spec.name} was announced as {spec.dtype} {list(spec.shape)} but came as {found}"
                    )
                if tensor.numel():
                    file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del tensor
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory as a safetensors file; see `write_safetensors`."""
    specs = [TensorSpec(name, t.dtype, tuple(t.shape), functools.partial(_itself, t)) for name, t in tensors.items()]
    write_safetensors(path, specs, metadata)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def load_pickle(path: Path) -> dict[str, Tensor] | None:
    """A table of tensors by name that torch.save wrote, mapped where its format allows; None if it holds anything else.

    Raises:
        FormatError: it does not load with `weights_only=True`; the first line of torch's reason.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises many kinds for a malformed file, and none of them names the file
        raise FormatError(str(error).partition("\n")[0]) from error
    if not isinstance(found, dict):
        return None
    named = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())
    return found if named else None
