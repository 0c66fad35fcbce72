"""Deltas made by the authors' own code of BitDelta (arXiv 2402.10193), read as data.

Such a file is a pickled dict of tensors. A compressed linear `<module>` has `<module>.mask`, int32 [K / 32, N], and
`<module>.coeff`, one number: bit i of word k is input feature 32 k + i, 1 means +1. Every other entry is a tuned
parameter in full; parameters that are not listed are the base's.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from . import sidefiles
from .checkpoint import Checkpoint, match_names, open_checkpoint
from .delta import Delta
from .encodings import Dense, Encoding, Same, Sign
from .errors import BaseMismatchError, DeltaFileError, UnsupportedError
from .fileformat import FormatError, load_pickle
from .fingerprint import Fingerprint
from .kernels import layout
from .progress import Progress

log = logging.getLogger(__name__)

_MASK, _COEFF = ".mask", ".coeff"


def import_bitdelta(diff: str | Path, base: nn.Module | str | Path, *, progress: Progress | None = None) -> Delta:
    """Convert one of the paper's delta files.

    Args:
        diff: the `.pt` file; it is never unpickled beyond plain tensors.
        base: the base model it was made for (module, checkpoint folder or hub id).
        progress: called with (stage, done, total).

    Raises:
        DeltaFileError: not such a file, or an entry of it is malformed.
        BaseMismatchError: its parameters are not the base's.
        UnsupportedError: it holds the low-rank (SVD) variant.
    """
    entries = _read(Path(diff))
    checkpoint = open_checkpoint(base)
    parameters = {_parameter_of(name): name for name in entries if not name.endswith(_COEFF)}
    matched = match_names(parameters, [*checkpoint.names(), *checkpoint.tied])
    missing = [name for name in parameters if name not in matched]
    if missing:
        raise BaseMismatchError(
            f"{missing[0]} and {len(missing) - 1} more of the {len(parameters)} parameters in {diff} are not in "
            f"{checkpoint.source}: give the base that this file was made from"
        )
    encodings: dict[str, Encoding] = {
        name: Same(checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names()
    }
    for done, (parameter, entry) in enumerate(parameters.items()):
        name = checkpoint.tied.get(matched[parameter], matched[parameter])
        encodings[name] = _encode(entry, entries, checkpoint, name)
        if progress is not None:
            progress("Converting", done + 1, len(parameters))
    return Delta(
        encodings=encodings,
        tied=dict(checkpoint.tied),
        fingerprint=Fingerprint.of(checkpoint),
        side_files=sidefiles.pack(_side_files(checkpoint, encodings), checkpoint.side_files),
        options={"method": "imported", "planes": 1, "rank": 0},
        report={},
    )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DeltaFileError(f"there is no file {path}")
    try:
        found = load_pickle(path)
    except FormatError as error:
        raise DeltaFileError(f"{path} does not load with weights_only=True: {error}") from error
    if found is None:
        raise DeltaFileError(f"{path} is not a dict of tensors by name, as BitDelta's save_diff writes it")
    if not any(name.endswith(_MASK) for name in found):
        low_rank = [name for name in found if name.endswith(".A")]
        if low_rank:
            raise UnsupportedError(f"{low_rank[0]} in {path} is the low-rank variant: only sign masks can be imported")
        raise DeltaFileError(f"{path} has no entry that ends in {_MASK}: it is not a BitDelta diff")
    return {name: tensor.detach() for name, tensor in found.items()}


def _parameter_of(entry: str) -> str:
    return f"{entry.removesuffix(_MASK)}.weight" if entry.endswith(_MASK) else entry


def _encode(entry: str, entries: dict[str, Tensor], checkpoint: Checkpoint, name: str) -> Encoding:
    shape, dtype, value = checkpoint.shape(name), checkpoint.dtype(name), entries[entry]
    if entry.endswith(_MASK):
        return _sign(entry, value, entries.get(entry.removesuffix(_MASK) + _COEFF), shape, dtype)
    if len(value.shape) != len(shape) or tuple(value.shape[1:]) != shape[1:]:
        raise BaseMismatchError(
            f"{entry} is {list(value.shape)} but {name} of {checkpoint.source} is {list(shape)}: "
            "give the base that this file was made from"
        )
    if tuple(value.shape) == shape and torch.equal(value.to(dtype), checkpoint.tensor(name)):
        return Same(shape, dtype)
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise DeltaFileError(f"{entry} holds NaN or infinite values")
    return Dense(tuple(value.shape), value.dtype, value)


def _sign(entry: str, mask: Tensor, coeff: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Sign:
    if len(shape) != 2 or shape[1] % layout.WORD_BITS or tuple(mask.shape) != (shape[1] // layout.WORD_BITS, shape[0]):
        raise BaseMismatchError(
            f"{entry} is {list(mask.shape)}, which is not [K / 32, N] of a base weight {list(shape)}: "
            "give the base that this file was made from"
        )
    if mask.dtype != torch.int32:
        raise DeltaFileError(f"{entry} is {mask.dtype}, not int32")
    if coeff is None or coeff.numel() != 1 or not math.isfinite(float(coeff)):
        raise DeltaFileError(f"{entry.removesuffix(_MASK)}{_COEFF} is missing or is not one finite number")
    signs = mask.T.contiguous().unsqueeze(0)  # [1, N, W]
    return Sign(shape, dtype, signs, torch.full((1, shape[0]), float(coeff)))


def _side_files(checkpoint: Checkpoint, encodings: dict[str, Encoding]) -> dict[str, object]:
    """The base's own, as these files carry none; a table that grew sets the config's vocabulary size."""
    files = copy.deepcopy(checkpoint.side_files)
    config = files.get("config.json")
    vocabulary = config.get("vocab_size") if isinstance(config, dict) else None
    for name, encoding in encodings.items():
        before = checkpoint.shape(name)
        if isinstance(config, dict) and before != encoding.shape and before[0] == vocabulary:
            config["vocab_size"] = encoding.shape[0]
            log.warning(
                "the vocabulary grew from %d to %d: the file has no tokenizer for it", before[0], encoding.shape[0]
            )
            vocabulary = None
    return files
