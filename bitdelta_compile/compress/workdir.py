"""A folder that keeps every fitted matrix, so that an interrupted compression goes on where it was; and the step that
a training has reached.

One file each, written to a temporary name and renamed: whatever is there is whole. Nothing in it tells the time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encodings import Sign
from ..errors import UnsupportedError
from ..fileformat import FormatError, map_tensors, read_header, write_tensors
from .fit import Fitted

_TASK = "task.json"
_STATE = "state.safetensors"
SAMPLED = "sampled-"  # how the names of files of sampled tokens begin, which are there before the task is known


class WorkDir:
    """Args:
        folder: new, empty, or of an interrupted run of the same task.
        task: what is compressed and how, as JSON values.

    Raises:
        UnsupportedError: the folder holds the work of another task.
    """

    def __init__(self, folder: Path, task: Mapping[str, object]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        wanted = json.dumps(task, sort_keys=True, indent=1)
        path = folder / _TASK
        if not path.exists():
            if any(not path.name.startswith(SAMPLED) for path in folder.glob("*.safetensors")):
                raise UnsupportedError(f"{folder} holds files of something else: give an empty folder")
            temporary = path.with_suffix(".tmp")
            temporary.write_text(wanted)
            os.replace(temporary, path)
        elif path.read_text() != wanted:
            raise UnsupportedError(
                f"{folder} holds the work of another compression ({_difference(path.read_text(), wanted)}): "
                "give another folder, or delete it"
            )

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"

    def __contains__(self, name: str) -> bool:
        """Whether a matrix was fitted earlier."""
        return self._path(name).exists()

    def load(self, name: str) -> Fitted | None:
        """A matrix fitted earlier, mapped; None where there is none."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            fields, about = _read(path, "fitted")
            dtype = getattr(torch, about["dtype"])
            lacking = fields.pop("lacking", None)
            sign = Sign(tuple(about["shape"]), dtype, **fields, transposed=about["transposed"])
            error, weight_error, energy = map(float, about["figures"])
            return Fitted(sign, error, weight_error, energy, lacking)
        except (FormatError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedError(f"{path} is damaged ({error}): delete it, and the matrix is fitted again") from None

    def store(self, name: str, fitted: Fitted) -> Fitted:
        """Keep a fitted matrix; what is returned is mapped from the file."""
        sign = fitted.sign
        about = {
            "name": name,
            "shape": sign.shape,
            "dtype": str(sign.dtype).removeprefix("torch."),
            "transposed": sign.transposed,
            "figures": [fitted.error, fitted.weight_error, fitted.energy],
        }
        tensors = sign.tensors() | ({} if fitted.lacking is None else {"lacking": fitted.lacking})
        write_tensors(self._path(name), tensors, {"fitted": json.dumps(about)})
        found = self.load(name)
        assert found is not None
        return found

    def load_state(self) -> tuple[dict[str, Tensor], list[float]] | None:
        """What a training had reached: its tensors by name, and the loss of every step; None where it has not begun.

        The tensors are mapped, and the file is replaced by the next `store_state`: copy what is to stay.
        """
        path = self.folder / _STATE
        if not path.exists():
            return None
        try:
            tensors, losses = _read(path, "losses")
            return tensors, [float(loss) for loss in losses]
        except (FormatError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedError(f"{path} is damaged ({error}): delete it, and training starts anew") from None

    def store_state(self, tensors: Mapping[str, Tensor], losses: Sequence[float]) -> None:
        """Keep what a training has reached, in place of what was kept before."""
        write_tensors(self.folder / _STATE, tensors, {"losses": json.dumps(list(losses))})


def _read(path: Path, about: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, mapped, and one entry of its metadata."""
    header = read_header(path)
    return map_tensors(path, header), json.loads(header.metadata[about])


def _difference(found: str, wanted: str) -> str:
    """The first setting that differs between two tasks."""
    try:
        ours, theirs = json.loads(found), json.loads(wanted)
    except ValueError:
        return "its task cannot be read"
    return next((f"its {key} is another" for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)), "")
