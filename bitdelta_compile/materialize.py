"""Base and delta back into dense tuned weights, one tensor at a time, and into a checkpoint folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, match_names, open_checkpoint
from .deltafile import check_grown, require_finite
from .encodings import Dense, Encoding, Rows, Sign
from .errors import BaseMismatchError, BitDeltaError
from .fileformat import FormatError, TensorSpec, write_safetensors
from .fingerprint import Fingerprint

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = 5_000_000_000  # bytes
LOST_SHARE = 0.05  # of the delta's norm: rounding that adds more is worth a warning
_BLOCK = 1 << 18  # weights compared at a time


class Merge:
    """A delta bound to a copy of its base: produces tuned tensors by name.

    Attributes:
        base: the base, recognised by the fingerprint.
        dtype: asked for, or None for the tuned model's own.
    """

    def __init__(
        self,
        encodings: Mapping[str, Encoding],
        fingerprint: Fingerprint,
        base: nn.Module | str | Path | Checkpoint,
        dtype: torch.dtype | None,
    ) -> None:
        self.base = base if isinstance(base, Checkpoint) else open_checkpoint(base)
        self.dtype = dtype
        self.encodings = encodings
        likeness = fingerprint.check(self.base)
        if likeness != "exact":
            log.info("%s is the delta's base %s", self.base.source, likeness)
        self._names = match_names(encodings, [*self.base.names(), *self.base.tied])
        for name, encoding in encodings.items():
            self._check(name, encoding)
        self._lost: dict[str, tuple[float, float]] = {}  # squared norms of the rounding error and of the delta

    def _check(self, name: str, encoding: Encoding) -> None:
        """BaseMismatchError unless the base has the parameter that the encoding builds on, in its shape."""
        if isinstance(encoding, Dense):
            return
        source = self.base.source
        if name not in self._names:
            raise BaseMismatchError(f"{source} has no parameter for {name}, whose delta is stored as {encoding.kind}")
        found = self.base.shape(self._names[name])
        if isinstance(encoding, Rows) and encoding.over is None and len(found) == 2:
            rows, features = reversed(found) if encoding.transposed else found
            if features == encoding.in_features:
                try:
                    return check_grown(name, encoding, rows)
                except FormatError as error:
                    raise BaseMismatchError(f"{source} does not fit the delta: {error}") from None
        under = encoding.over.shape if isinstance(encoding, Rows) and encoding.over is not None else encoding.shape
        if found != under:
            raise BaseMismatchError(f"{name} has shape {list(found)} in {source} and the delta needs {list(under)}")

    def target(self, name: str) -> torch.dtype:
        """The dtype in which `produce(name)` comes."""
        own = self.encodings[name].dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own

    def produce(self, name: str) -> Tensor:
        """The tuned parameter, dense, on the CPU; at most two copies of it exist meanwhile."""
        encoding, target = self.encodings[name], self.target(name)
        require_finite(name, encoding)
        base = torch.empty(0) if isinstance(encoding, Dense) else self.base.tensor(self._names[name]).cpu()
        tuned = encoding.apply(base)
        rounded = tuned.to(target)
        sign = encoding.over if isinstance(encoding, Rows) else encoding
        if isinstance(sign, Sign) and rounded is not tuned:
            rows = min(base.shape[0], tuned.shape[0])
            self._lost[name] = _squared_loss(base[:rows], tuned[:rows], rounded[:rows])
        return rounded

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tuned parameter in turn; warns at the end about what rounding lost."""
        for name in self.encodings:
            yield name, self.produce(name)
        self.warn_of_loss()

    def warn_of_loss(self) -> None:
        """Log once how much of the delta the target dtype rounded away, if that is much."""
        lost, kept = (math.fsum(pair[side] for pair in self._lost.values()) for side in (0, 1))
        if lost > LOST_SHARE**2 * kept:
            log.warning(
                "rounding to 16 bits adds an error of %.0f %% of the delta's norm: dtype=torch.float32 keeps it whole",
                100 * math.sqrt(lost / kept) if kept else 100,
            )


def _squared_loss(base: Tensor, tuned: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Squared norms of rounded - tuned and of tuned - base, a block of rows at a time."""
    lost = kept = 0.0
    step = max(1, _BLOCK // max(1, tuned.shape[1]))
    for start in range(0, tuned.shape[0], step):
        block = slice(start, start + step)
        lost += float((rounded[block].float() - tuned[block]).square().sum())
        kept += float((tuned[block] - base[block].float()).square().sum())
    return lost, kept


def write_checkpoint(
    merge: Merge,
    tied: Mapping[str, str],
    side_files: Mapping[str, object],
    folder: Path,
    max_shard_size: int,
) -> None:
    """Write weights and side files as a checkpoint folder, atomically; see `Delta.save_pretrained`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BitDeltaError(f"{folder} exists and is not an empty folder: choose another name or empty it")
    side_files = dict(side_files)
    config = side_files.get("config.json")
    if isinstance(config, dict) and merge.dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        side_files["config.json"] = config | {"dtype": str(merge.dtype).removeprefix("torch.")}
    folder = folder.absolute()
    if folder.resolve() == Path.cwd():
        raise BitDeltaError("the folder that you are in would be replaced: name another, which is made")
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, value in side_files.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            text = json.dumps(value, indent=2) + "\n" if name.endswith(".json") else str(value)
            path.write_bytes(text.encode())
        _write_weights(temporary, _specs(merge, tied, config), max_shard_size)
        os.replace(temporary, folder)
    except OSError as error:
        raise BitDeltaError(f"the checkpoint cannot be written to {folder}: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(temporary)
    merge.warn_of_loss()


def _specs(merge: Merge, tied: Mapping[str, str], config: object) -> list[TensorSpec]:
    """What to write: canonical parameters, and aliases where the config says that loading will not tie them."""
    names = {name: name for name in merge.encodings}
    if isinstance(config, dict) and config.get("tie_word_embeddings") is False:
        names |= tied

    def spec(name: str, source: str) -> TensorSpec:
        return TensorSpec(name, merge.target(source), merge.encodings[source].shape, lambda: merge.produce(source))

    return [spec(name, source) for name, source in names.items()]


def _write_weights(folder: Path, specs: list[TensorSpec], max_shard_size: int) -> None:
    """One safetensors file, or several of at most `max_shard_size` bytes (larger tensors alone) and their index."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + spec.nbytes > max_shard_size:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        return write_safetensors(folder / "model.safetensors", specs, {"format": "pt"})
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs)},
        "weight_map": {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
