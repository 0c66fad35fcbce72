"""What an exported program says of itself, and programs on disk without a base of their own.

A program that `export` or `merge` made holds the base's parameters under their own names, the tensors of its deltas as
buffers `bitdelta.<parameter>.<field>`, and a buffer of JSON, `bitdelta.metadata`: a buffer is what survives saving,
loading, decomposition and another export alike. A weightless program has parameters on the meta device; whoever runs
it gets meta tensors, never numbers.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..checkpoint import Checkpoint, match_names, open_checkpoint
from ..delta import Delta
from ..encodings import Dense, Encoding, Rows, Same, Sign
from ..errors import BaseMismatchError, BitDeltaError, UnsupportedError
from ..fileformat import DTYPE_NAMES
from ..fingerprint import SAMPLES, Fingerprint
from ..kernels.layout import from_layout, layout_of
from ..stack import Stack

log = logging.getLogger(__name__)

PREFIX = "bitdelta."
METADATA = "bitdelta.metadata"
TENANT = "tenant"  # the input that takes the row index
FORMAT_VERSION = 1
_SIGN = ("signs", "row_scale", "col_scale", "left", "right")


@dataclasses.dataclass(frozen=True)
class About:
    """What a program says of itself.

    Attributes:
        fingerprint: of the base's parameters, by the program's names of them.
        tied: base parameters that are another one: alias -> canonical name.
        encodings: by parameter, what is not in its tensors: see `described`.
        tenants: name of the tenant in each slot, None for a free one; None for a program of one unnamed fine-tune,
            which has no row index.
        base: where the base's weights are: a checkpoint folder or hub id; None where nobody said.
        versions: of torch and of this package, when the program was made.
        extra: strings that the program's maker added, by name.
    """

    fingerprint: Fingerprint
    tied: Mapping[str, str]
    encodings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    tenants: tuple[str | None, ...] | None = None
    base: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: versions())
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensor(self) -> Tensor:
        """As the buffer `bitdelta.metadata`: UTF-8 of JSON, uint8 [bytes]."""
        fingerprint = self.fingerprint
        samples = fingerprint.samples.contiguous().view(torch.uint8).numpy().tobytes()
        contents = {
            "format_version": FORMAT_VERSION,
            "tenants": self.tenants,
            "encodings": dict(self.encodings),
            "tied": dict(self.tied),
            "base": self.base,
            "fingerprint": {
                "names": fingerprint.names,
                "shapes": fingerprint.shapes,
                "samples": base64.b64encode(samples).decode(),
                "digest": fingerprint.digest,
            },
            "versions": dict(self.versions),
            "extra": dict(self.extra),
        }
        return torch.frombuffer(bytearray(json.dumps(contents).encode()), dtype=torch.uint8)

    @classmethod
    def of(cls, program: ExportedProgram) -> About:
        """What `program` says of itself.

        Raises:
            UnsupportedError: it was not made by this package, by a newer version of it, or is damaged.
        """
        stored = program.state_dict.get(METADATA)
        if stored is None:
            raise UnsupportedError(
                f"the program has no buffer {METADATA}, so bdc.export did not make it: export its base with a delta"
            )
        try:
            found = json.loads(stored.cpu().numpy().tobytes())
            version = found["format_version"]
            if version == FORMAT_VERSION:
                about = found["fingerprint"]
                samples = torch.frombuffer(bytearray(base64.b64decode(about["samples"])), dtype=torch.bfloat16)
                fingerprint = Fingerprint(
                    tuple(about["names"]),
                    tuple(map(tuple, about["shapes"])),
                    samples.view(-1, SAMPLES),
                    about["digest"],
                )
                tenants = None if found["tenants"] is None else tuple(found["tenants"])
                rest = {key: found[key] for key in ("encodings", "tied", "base", "versions", "extra")}
                return cls(fingerprint=fingerprint, tenants=tenants, **rest)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UnsupportedError(f"the program's buffer {METADATA} is damaged ({error}): export it again") from None
        raise UnsupportedError(
            f"the program has format version {version} and this package reads {FORMAT_VERSION}: "
            "install the bitdelta_compile that made it, or export it again"
        )


def versions() -> dict[str, str]:
    """Versions that a program or package records."""
    from importlib.metadata import version

    return {"torch": torch.__version__, "bitdelta_compile": version("bitdelta_compile")}


def base_parameters(program: ExportedProgram) -> dict[str, Tensor]:
    """The base's parameters by name, aliases included; on the meta device in a weightless program."""
    names = program.graph_signature.inputs_to_parameters.values()
    return {name: program.state_dict[name] for name in names}


def delta_tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """The tensors of the program's deltas, by `<parameter>.<field>`."""
    state = program.state_dict.items()
    return {name.removeprefix(PREFIX): t for name, t in state if name.startswith(PREFIX) and name != METADATA}


def is_weightless(program: ExportedProgram) -> bool:
    """Whether the base's parameters are missing."""
    return any(tensor.is_meta for tensor in base_parameters(program).values())


def save_program(program: ExportedProgram, path: str | Path, *, base: str | Path | None = None) -> None:
    """Write a program to a `.pt2` file, atomically: after any failure the old file, if there was one, is still there.

    Args:
        program: from `export` or `merge`.
        path: ends in `.pt2`.
        base: where its base's weights are, a checkpoint folder or hub id. The file then holds this reference and the
            fingerprint in place of the weights. Default: the weights go into the file.

    The file is one of `torch.export.save`; `torch.export.load` reads it once `bitdelta_compile` is imported, which
    registers the ops.

    Raises:
        UnsupportedError: not a program of this package, or a weightless one saved without a reference.
        BitDeltaError: the file cannot be written.
    """
    about = About.of(program)
    if base is not None:
        program = with_tensors(program, {name: _without_values(t) for name, t in base_parameters(program).items()})
        program = with_about(program, dataclasses.replace(about, base=os.fspath(base)))
    elif is_weightless(program) and about.base is None:
        raise UnsupportedError("the program has no weights: give base=, a checkpoint folder or hub id to find them in")
    with replacing(Path(path)) as temporary:
        torch.export.save(program, temporary)


def load_program(path: str | Path, *, base: nn.Module | str | Path | None = None) -> ExportedProgram:
    """Read a program that `save_program` wrote.

    Args:
        path: the file.
        base: the base, for a program without weights: a module, checkpoint folder or hub id. Default: the reference
            in the file. The program shares the tensors of a module.

    Raises:
        UnsupportedError: not a program of this package, one without weights and nobody says where they are, or one
            with weights of a quantization library that is not installed.
        BaseMismatchError: `base` is another model.
        BitDeltaError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise BitDeltaError(f"{path} is not a .pt2 archive: give a file that save_program wrote")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # torch 2.11's own
            program = torch.export.load(path)
    except OSError as error:
        raise BitDeltaError(f"{path} cannot be read: {error.strerror}") from error
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        raise UnsupportedError(
            f"{path} holds quantized weights of {library}, which is not here: install {library}"
        ) from error
    about = About.of(program)
    own = base_parameters(program)
    program = with_tensors(program, {alias: own[name] for alias, name in about.tied.items()})
    if not is_weightless(program):
        return program
    reference = about.base if base is None else base
    if reference is None:
        raise UnsupportedError(f"{path} holds no weights and no reference to its base: give base=")
    return with_base(program, reference)


def with_base(program: ExportedProgram, base: nn.Module | str | Path) -> ExportedProgram:
    """The program with the parameters of `base`, which it shares, in place of its own.

    Raises:
        BaseMismatchError: `base` is not the program's base.
    """
    about = About.of(program)
    checkpoint = open_checkpoint(base)
    exactness = about.fingerprint.check(checkpoint)
    if exactness != "exact":
        log.warning("%s is the program's base %s", checkpoint.source, exactness)
    own = base_parameters(program)
    pairs = match_names(own, [*checkpoint.names(), *checkpoint.tied])
    missing = [name for name in own if name not in pairs]
    if missing:
        raise BaseMismatchError(
            f"{checkpoint.source} lacks {missing[0]} ({len(missing)} of {len(own)} parameters are missing); "
            "give the base that the program was exported from"
        )
    filled = {
        name: _as_parameter(checkpoint.held(pairs[name]), tensor)
        for name, tensor in own.items()
        if name not in about.tied
    }
    return with_tensors(program, filled | {alias: filled[name] for alias, name in about.tied.items()})


def with_about(program: ExportedProgram, about: About) -> ExportedProgram:
    """The program with other metadata."""
    return with_tensors(program, {METADATA: about.tensor()})


def with_extra(program: ExportedProgram, extra: Mapping[str, str], *, base: str | None = None) -> ExportedProgram:
    """The program with more strings in its metadata, and a reference to its base."""
    about = About.of(program)
    return with_about(
        program, dataclasses.replace(about, extra={**about.extra, **extra}, base=about.base if base is None else base)
    )


def base_of(program: ExportedProgram) -> tuple[Fingerprint, dict[str, str]]:
    """The fingerprint of the base's parameters, by the program's names of them, and which are tied."""
    checkpoint = Checkpoint("the exported base", base_parameters(program))
    return Fingerprint.of(checkpoint), checkpoint.tied


def described(encoding: Encoding | Stack) -> dict[str, Any]:
    """What an encoding, or the stack of many, is besides its tensors."""
    return {
        "kind": encoding.kind,
        "shape": list(encoding.shape),
        "dtype": DTYPE_NAMES[encoding.dtype],
        "transposed": getattr(encoding, "transposed", False),
        "out_features": encoding.out_features if isinstance(encoding, Stack) else 0,
    }


def delta_of(program: ExportedProgram) -> Delta:
    """The delta in a program of one fine-tune, by the program's names of parameters; without side files.

    Raises:
        UnsupportedError: it has a row index.
    """
    about, tensors, base = About.of(program), delta_tensors(program), base_parameters(program)
    if about.tenants is not None:
        raise UnsupportedError(
            f"the program has a row index, for {', '.join(filter(None, about.tenants))}: give the programs of one "
            "fine-tune each that it came from"
        )
    encodings: dict[str, Encoding] = {}
    for name, description in about.encodings.items():
        shape, transposed = tuple(description["shape"]), bool(description["transposed"])
        fields = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.rpartition(".")[0] == name}
        stacked = {field: tensor[0] for field, tensor in fields.items() if field != "dense"}
        dtype = base[name].dtype
        over = None
        if "signs" in fields:
            under = tuple(base[name].shape) if description["kind"] == "rows" else shape
            outputs, features = reversed(under) if transposed else under
            layout = layout_of(stacked["signs"], outputs, features)
            stacked["signs"] = from_layout(stacked["signs"], outputs, features, layout)
            over = Sign(under, dtype, **{key: stacked[key] for key in _SIGN if key in stacked}, transposed=transposed)
        if "rows_index" in fields:
            encodings[name] = Rows(shape, dtype, stacked["rows_index"], stacked["rows_values"], over, transposed)
        elif over is not None:
            encodings[name] = over
        elif "dense" in fields:
            encodings[name] = Dense(shape, dtype, fields["dense"])
        else:
            encodings[name] = Same(shape, dtype)
    return Delta(encodings, about.tied, about.fingerprint)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a place to write a `.pt2` to, whose file takes the name of `path` if nothing is raised.

    A folder beside `path` holds it meanwhile: torch names the folder inside an archive after the file.

    Raises:
        UnsupportedError: the name does not end in .pt2, which torch asks for.  BitDeltaError: it cannot be written.
    """
    if path.suffix != ".pt2":
        raise UnsupportedError(f"{path} does not end in .pt2, which torch asks of such a file: rename it")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise BitDeltaError(f"{path} cannot be written: {error.strerror}") from error


def with_tensors(program: ExportedProgram, tensors: Mapping[str, Tensor]) -> ExportedProgram:
    """The program with other tensors under some of its names."""
    changed = copy.copy(program)
    changed._state_dict = program.state_dict | tensors
    return changed


def _without_values(tensor: Tensor) -> nn.Parameter:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad)


def _as_parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.dtype == like.dtype:
        return tensor
    return nn.Parameter(tensor.detach().to(like.dtype), requires_grad=like.requires_grad)
