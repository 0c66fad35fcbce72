"""The delta file: safetensors with tensors named `<parameter>//<field>`, everything else compressed in its metadata.

Metadata: `format` "bitdelta", `format_version`, and `contents`, the base64 of zlib-compressed JSON {"encodings":
{parameter: {"kind", "shape", "dtype", "transposed"?, "over"?}}, "tied", "fingerprint", "options", "report",
"side_files"}. The sign planes under `rows` are fields `over.signs` and so on; the base's sampled values are the tensor
`//fingerprint`.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import sidefiles
from .encodings import Dense, Encoding, Rows, Same, Sign
from .errors import BitDeltaError, DeltaFileError
from .fileformat import (
    DTYPE_NAMES,
    DTYPES,
    FormatError,
    map_tensors,
    naturals,
    read_header,
    unique_keys,
    write_tensors,
)
from .fingerprint import SAMPLES, Fingerprint
from .kernels import layout

FORMAT = "bitdelta"
FORMAT_VERSION = 1
FINGERPRINT = "//fingerprint"
MAX_CONTENTS = 1 << 28  # bytes of JSON once decompressed: more than any tokenizer needs, less than a bomb


class Parts(NamedTuple):
    """What a delta file holds, in the order of `Delta`'s attributes."""

    encodings: dict[str, Encoding]
    tied: dict[str, str]
    fingerprint: Fingerprint
    side_files: dict[str, object]
    options: dict[str, object]
    report: dict[str, object]


def write(path: Path, parts: Parts) -> None:
    """Write a delta file atomically.

    Raises:
        BitDeltaError: the file cannot be written; whatever was there is untouched.
    """
    tensors: dict[str, Tensor] = {FINGERPRINT: parts.fingerprint.samples}
    encodings: dict[str, object] = {}
    for name, encoding in parts.encodings.items():
        if "//" in name:
            raise BitDeltaError(f"the parameter name {name!r} contains '//', which a delta file cannot hold: rename it")
        encodings[name] = _describe(encoding)
        tensors |= {f"{name}//{field}": tensor for field, tensor in stored_tensors(encoding).items()}
    contents = {
        "encodings": encodings,
        "tied": dict(parts.tied),
        "fingerprint": {
            "names": parts.fingerprint.names,
            "shapes": parts.fingerprint.shapes,
            "digest": parts.fingerprint.digest,
        },
        "options": dict(parts.options),
        "report": dict(parts.report),
        "side_files": sidefiles.to_json(parts.side_files),
    }
    packed = base64.b64encode(zlib.compress(json.dumps(contents, separators=(",", ":")).encode(), 9)).decode()
    metadata = {"format": FORMAT, "format_version": str(FORMAT_VERSION), "contents": packed}
    try:
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise BitDeltaError(f"the delta cannot be written to {path}: {error.strerror}") from error


def stored_tensors(encoding: Encoding) -> dict[str, Tensor]:
    """An encoding's tensors by field name, those of sign planes under rows as `over.<field>`."""
    over = encoding.over if isinstance(encoding, Rows) else None
    under = {} if over is None else {f"over.{field}": tensor for field, tensor in over.tensors().items()}
    return encoding.tensors() | under


def require_finite(name: str, encoding: Encoding, tenant: str | None = None) -> None:
    """DeltaFileError where an encoding holds NaN or infinite values, which no fit gives."""
    for field, tensor in stored_tensors(encoding).items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            whose = "" if tenant is None else f"tenant {tenant}: "
            raise DeltaFileError(
                f"{whose}{name}: {field} holds NaN or infinite values: the delta is damaged, make it again"
            )


def _describe(encoding: Encoding) -> dict[str, object]:
    about: dict[str, object] = {
        "kind": encoding.kind,
        "shape": list(encoding.shape),
        "dtype": DTYPE_NAMES[encoding.dtype],
    }
    if isinstance(encoding, Sign | Rows) and encoding.transposed:
        about["transposed"] = True
    if isinstance(encoding, Rows) and encoding.over is not None:
        about["over"] = _describe(encoding.over)
    return about


def read(path: Path) -> Parts:
    """Read a delta file: everything is checked, tensors are views of a mapping.

    Raises:
        DeltaFileError: truncated, malformed, of a newer format, or holding what no encoding can be.
    """
    try:
        header = read_header(path)
        if header.metadata.get("format") != FORMAT:
            raise FormatError("it is a safetensors file but not a delta: make one with `bitdelta compress`")
        _check_version(header.metadata.get("format_version", ""))
        contents = _contents(header.metadata.get("contents", ""))
        tensors = map_tensors(path, header)
        encodings = {name: _encoding(name, about, tensors) for name, about in _table(contents, "encodings").items()}
        parts = Parts(
            encodings,
            _tied(_table(contents, "tied"), encodings),
            _fingerprint(_table(contents, "fingerprint"), tensors),
            sidefiles.from_json(contents.get("side_files")),
            _table(contents, "options"),
            _table(contents, "report"),
        )
        if tensors:
            raise FormatError(f"it holds the tensor {next(iter(tensors))!r}, which belongs to no encoding")
    except (FormatError, DeltaFileError) as error:
        raise DeltaFileError(f"{path} is not a readable delta: {error}") from None
    return parts


def _check_version(version: str) -> None:
    if not version.isdecimal() or not version.isascii():
        raise FormatError(f"its format version is {version[:20]!r}, not a number")
    if version != str(FORMAT_VERSION):
        raise FormatError(
            f"its format version is {version[:20]} and this package reads {FORMAT_VERSION}: "
            "install the bitdelta_compile that wrote it, or a newer one"
        )


def _contents(packed: str) -> dict[str, object]:
    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(packed, validate=True), MAX_CONTENTS)
        if not inflater.eof:
            raise FormatError("its contents are cut short, or larger than any delta's")
        contents = json.loads(raw, object_pairs_hook=unique_keys)
    except FormatError:
        raise
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        raise FormatError("its contents are not compressed JSON") from None
    if not isinstance(contents, dict):
        raise FormatError("its contents are not a table")
    return contents


def _table(contents: Mapping[str, object], key: str) -> dict[str, object]:
    found = contents.get(key)
    if not isinstance(found, dict):
        raise FormatError(f"its contents lack the table {key!r}")
    return found


def _tied(table: Mapping[str, object], encodings: Mapping[str, Encoding]) -> dict[str, str]:
    tied: dict[str, str] = {}
    for alias, name in table.items():
        if not isinstance(name, str) or name not in encodings or alias in encodings:
            raise FormatError(f"it ties {alias!r} to {str(name)[:80]!r}, which has no encoding of its own")
        tied[alias] = name
    return tied


def _fingerprint(about: Mapping[str, object], tensors: dict[str, Tensor]) -> Fingerprint:
    names, shapes, digest = (about.get(key) for key in ("names", "shapes", "digest"))
    samples = tensors.pop(FINGERPRINT, None)
    if (
        samples is None
        or not isinstance(names, list)
        or not isinstance(shapes, list)
        or not isinstance(digest, str)
        or not all(isinstance(name, str) for name in names)
        or not all(naturals(shape) for shape in shapes)
        or not len(names) == len(shapes) == len(set(names))
        or samples.dtype != torch.bfloat16
        or tuple(samples.shape) != (len(names), SAMPLES)
    ):
        raise FormatError("its fingerprint of the base is malformed")
    return Fingerprint(tuple(names), tuple(tuple(shape) for shape in shapes), samples, digest)


def _encoding(name: str, about: object, tensors: dict[str, Tensor], prefix: str = "") -> Encoding:
    """One parameter's encoding; takes its tensors out of `tensors`."""
    if not isinstance(about, dict):
        raise FormatError(f"{name} is not described by a table")
    kind, shape, dtype_name, transposed = (about.get(key) for key in ("kind", "shape", "dtype", "transposed"))
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if not naturals(shape) or dtype is None or transposed not in (None, True, False):
        raise FormatError(f"{name} has a malformed shape, dtype or orientation")

    def take(field: str, expected: torch.dtype) -> Tensor:
        tensor = optional(field, expected)
        if tensor is None:
            raise FormatError(f"the tensor {name}//{prefix}{field} is missing")
        return tensor

    def optional(field: str, expected: torch.dtype) -> Tensor | None:
        tensor = tensors.pop(f"{name}//{prefix}{field}", None)
        if tensor is not None and tensor.dtype != expected:
            raise FormatError(f"{name}//{prefix}{field} is {tensor.dtype} and must be {expected}")
        return tensor

    size, flipped = tuple(cast(list[int], shape)), bool(transposed)
    try:
        if kind == "same":
            return Same(size, dtype)
        if kind == "dense":
            value = take("value", dtype)
            if tuple(value.shape) != size:
                raise FormatError(f"{name}//value has shape {list(value.shape)} and must have {shape}")
            return Dense(size, dtype, value)
        if kind == "sign":
            signs, row_scale = take("signs", torch.int32), take("row_scale", torch.float32)
            col_scale = optional("col_scale", torch.float32)
            left, right = optional("left", torch.bfloat16), optional("right", torch.bfloat16)
            sign = Sign(size, dtype, signs, row_scale, col_scale, left, right, flipped)
            _check_sign(f"{name}//{prefix}", sign)
            return sign
        if kind == "rows" and not prefix:
            over = _encoding(name, about["over"], tensors, "over.") if "over" in about else None
            if over is not None and not isinstance(over, Sign):
                raise FormatError(f"{name} has rows over {over.kind}, and only sign planes can lie under rows")
            rows = Rows(size, dtype, take("index", torch.int64), take("values", dtype), over, flipped)
            _check_rows(name, rows)
            return rows
    except (FormatError, DeltaFileError):
        raise
    except ValueError as error:
        raise FormatError(f"{name}: {error}") from None
    raise FormatError(f"{name} has the encoding {str(kind)[:40]!r}, which this version does not know")


def _check_sign(prefix: str, sign: Sign) -> None:
    """What the shapes do not show; reads scales, and the last words of rows where K is ragged."""
    if sign.planes < 1:
        raise FormatError(f"{prefix}signs have no plane")
    for field, tensor in (("row_scale", sign.row_scale), ("col_scale", sign.col_scale)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise FormatError(f"{prefix}{field} holds NaN or infinite scales")
    layout.check_ragged_bits(sign.signs, sign.in_features)


def _check_rows(name: str, rows: Rows) -> None:
    index = rows.index
    ascending = bool((index[1:] > index[:-1]).all())
    if index.numel() and not (ascending and int(index[0]) >= 0 and int(index[-1]) < rows.out_features):
        raise FormatError(f"{name}//index is not ascending within {rows.out_features} rows")
    if rows.over is not None:
        under = rows.over.out_features
        if rows.over.in_features != rows.in_features or under > rows.out_features:
            raise FormatError(
                f"{name} has rows of shape {list(rows.shape)} over sign planes of {list(rows.over.shape)}"
            )
        check_grown(name, rows, under)


def check_grown(name: str, rows: Rows, under: int) -> None:
    """FormatError unless every row at or past `under` is listed: nothing else says what it holds."""
    grown = max(0, rows.out_features - under)
    if int((rows.index >= under).sum()) != grown:
        raise FormatError(f"{name} grew from {under} to {rows.out_features} rows, and not all the new ones are stored")
