"""A compressed fine-tune: what to do to a base to get the tuned model, in memory and on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from . import deltafile, sidefiles
from .checkpoint import Checkpoint, match_names
from .encodings import KINDS, Encoding
from .errors import UnsupportedError
from .fingerprint import Fingerprint
from .materialize import MAX_SHARD_SIZE, Merge, write_checkpoint

__all__ = ["Delta"]


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """One fine-tune against one base.

    Attributes:
        encodings: by the tuned model's canonical parameter name.
        tied: alias -> canonical name.
        fingerprint: of the base.
        side_files: the tuned model's config, tokenizer and so on, by file name: plain values, or `sidefiles.FromBase`
            for large ones that differ little from the base's (`side_files_with` resolves those).
        options: how the delta was made.
        report: how well it fits; `parameters` maps names to figures.
    """

    encodings: Mapping[str, Encoding]
    tied: Mapping[str, str]
    fingerprint: Fingerprint
    side_files: Mapping[str, object] = dataclasses.field(default_factory=dict)
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    report: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        encodings: Mapping[str, Encoding],
        *,
        options: Mapping[str, object] | None = None,
        report: Mapping[str, object] | None = None,
    ) -> Delta:
        """The delta of `tuned` against `base` with these encodings of tuned's canonical parameters.

        The fingerprint covers the base's parameters that the encodings' names pair with, so that a base with a head the
        tuned model lacks is recognised without it; side files are packed against the base's.
        """
        paired = match_names(encodings, [*base.names(), *base.tied]).values()
        names = list(dict.fromkeys(base.tied.get(name, name) for name in paired))
        return cls(
            dict(encodings),
            {alias: name for alias, name in tuned.tied.items() if name in encodings},
            Fingerprint.of(base, names),
            sidefiles.pack(tuned.side_files, base.side_files),
            dict(options or {}),
            dict(report or {}),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that `save` writes."""
        return sum(encoding.nbytes for encoding in self.encodings.values()) + self.fingerprint.samples.nbytes

    def encodings_for(self, names: Iterable[str], tied: Mapping[str, str], tenant: str) -> dict[str, Encoding]:
        """The encodings by a base's canonical names of parameters; those that the base lacks are left out.

        Args:
            names: all of the base's, aliases among them.
            tied: the base's aliases -> canonical names.
            tenant: what an error calls this delta.

        Raises:
            UnsupportedError: tensors that are one in the base and two in the fine-tune.
            BaseMismatchError: as `match_names`.
        """
        found: dict[str, tuple[str, Encoding]] = {}
        for theirs, ours in match_names([*self.encodings, *self.tied], names).items():
            source = self.tied.get(theirs, theirs)
            encoding = self.encodings[source]
            other, known = found.setdefault(tied.get(ours, ours), (source, encoding))
            if known is not encoding:
                raise UnsupportedError(
                    f"{other} and {source} are one tensor in the base but two in tenant {tenant}: untie them in the "
                    f"base first, giving {source} a copy of its own"
                )
        return {name: encoding for name, (_, encoding) in found.items()}

    def save(self, path: str | Path) -> None:
        """Write the delta to a file, atomically: after any failure the old file, if there was one, is still there."""
        parts = (dict(getattr(self, field)) for field in ("side_files", "options", "report"))
        deltafile.write(Path(path), deltafile.Parts(dict(self.encodings), dict(self.tied), self.fingerprint, *parts))

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Open a delta file: checked throughout, its tensors mapped and not yet read.

        Raises:
            DeltaFileError: not a delta, damaged, or of a newer format.
        """
        return cls(*deltafile.read(Path(path)))

    def side_files_with(self, base: Checkpoint) -> dict[str, object]:
        """The tuned side files, complete.

        Raises:
            BaseMismatchError: one is stored as a patch of a file that `base` lacks or has otherwise.
        """
        return sidefiles.unpack(self.side_files, base.side_files, base.source)

    def materialize(
        self, base: nn.Module | str | Path | Checkpoint, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tuned parameters, dense, one at a time by canonical name; aliases (`tied`) are left out.

        Args:
            base: the base model: a module, a checkpoint folder or a hub id.
            dtype: of floating-point tensors; default: the tuned model's own. Where 16 bits round away a good part of
                the delta a warning says how much: `dtype=torch.float32` keeps it.

        Raises:
            BaseMismatchError: `base` is not the one the delta was made against (before anything is yielded).
            DeltaFileError: a stored tensor holds NaN or infinite values.
        """
        merge = Merge(self.encodings, self.fingerprint, base, dtype)
        return merge.tensors()

    def save_pretrained(
        self,
        base: nn.Module | str | Path | Checkpoint,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> None:
        """Write the tuned model as a checkpoint folder that `from_pretrained` loads: weights and side files.

        Args:
            base, dtype: as in `materialize`.
            folder: new or empty; it appears only when complete.
            max_shard_size: bytes of weights per file.

        Raises:
            BitDeltaError: the folder exists and is not empty, or cannot be written; and as `materialize`.
        """
        merge = Merge(self.encodings, self.fingerprint, base, dtype)
        write_checkpoint(merge, self.tied, self.side_files_with(merge.base), Path(folder), max_shard_size)

    def summary(self) -> str:
        """A table by kind of encoding: parameters, weights, bytes, bits per weight."""
        rows = [("encoding", "parameters", "weights", "bytes", "bits/weight")]
        groups = [(kind, [e for e in self.encodings.values() if e.kind == kind]) for kind in KINDS]
        for kind, group in [*groups, ("all", list(self.encodings.values()))]:
            weights, size = sum(math.prod(e.shape) for e in group), sum(e.nbytes for e in group)
            if group:
                rows.append((kind, f"{len(group)}", f"{weights}", f"{size}", f"{8 * size / max(1, weights):.2f}"))
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in rows
        )
