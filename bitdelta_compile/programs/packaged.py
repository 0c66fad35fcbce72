"""`bdc.load_package`: a package with its tenants by name, any of which can be replaced while it is loaded.

AOTInductor keeps the stacked tensors of the deltas as constants of the compiled model, and its runner hands out the
tensors that the code reads. A replacement writes one slot of them: nothing is compiled, copied or allocated, and no
call has to pass the deltas.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..checkpoint import match_names
from ..delta import Delta
from ..encodings import Encoding, Same
from ..errors import BaseMismatchError, UnsupportedError
from ..fileformat import DTYPES
from ..serve.slots import free_dense, lacks, write
from ..stack import Stack
from .package import check_cpu, read_metadata
from .program import PREFIX, TENANT


def load_package(path: str | Path) -> Package:
    """Load a package of `bdc.package` for this process.

    Raises:
        UnsupportedError: compiled for another CPU, or not a package of this format.
        BitDeltaError: the file cannot be read.
    """
    metadata = read_metadata(path)
    check_cpu(metadata, path)
    return Package(Path(path), metadata)


class Package:
    """A loaded package.

    Calls and replacements take turns: a call sees all of a tenant's old delta or all of its new one.

    Attributes:
        metadata: see `package`.
        slots: how many tenants there is room for; 0 in a package of one fine-tune.
        stacks: the tensors of every slot, by parameter; the compiled code reads them.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.metadata = dict(metadata)
        names: list[str | None] | None = json.loads(metadata["bitdelta.tenants"])
        self._names = names or []
        folder = tempfile.mkdtemp(prefix="bitdelta.")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._runner = _runner(path, Path(folder), metadata["AOTI_DEVICE_KEY"])
        in_spec, out_spec = self._runner.get_call_spec()
        self._in_spec, self._out_spec = pytree.treespec_loads(in_spec), pytree.treespec_loads(out_spec)
        self._lock = threading.RLock()  # over names and slots together
        constants: dict[str, Tensor] = self._runner.extract_constants_map(False)
        self._tied: dict[str, str] = json.loads(metadata["bitdelta.tied"])
        self.stacks = _stacks(json.loads(metadata["bitdelta.encodings"]), constants) if names else {}
        self.slots = len(self._names)
        own = {name: tensor for name, tensor in constants.items() if not name.startswith(PREFIX)}
        base = {self._tied.get(name, name): tensor for name, tensor in own.items()}
        # What is quantized is among the constants in a form that only its library knows.
        samples: dict[str, list[float]] = json.loads(metadata.get("bitdelta.quantized", "{}"))
        self._samples = {name: torch.tensor(sample) for name, sample in samples.items()}
        for name in self._samples.keys() & self.stacks.keys():
            base[name] = torch.empty(self.stacks[name].shape, dtype=self.stacks[name].dtype, device="meta")
        self._base = base | {name: stack.small[-1] for name, stack in self.stacks.items() if stack.small is not None}

    @property
    def tenants(self) -> dict[str, int]:
        """Names of the tenants, each with its slot."""
        return {name: slot for slot, name in enumerate(self._names) if name is not None}

    def __call__(self, *args: Any, tenants: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            args, kwargs: as the program was exported with.
            tenants: a name per row, None for the base. Default: the base throughout.

        Raises:
            UnsupportedError: an unknown tenant, as many names as there are no rows, or other arguments.
        """
        if not self.slots and tenants is not None:
            raise UnsupportedError("this package holds one unnamed fine-tune: package a merged program for tenants=")
        with self._lock:  # from the names to the end, so that a slot is not another tenant's by then
            if self.slots:
                kwargs[TENANT] = self.row_index(tenants, _rows(args, kwargs))
            flat, spec = pytree.tree_flatten((args, kwargs))
            if spec != self._in_spec:
                raise UnsupportedError(f"the package takes {self._in_spec} and was called with {spec}")
            outputs = self._runner.run([value for value in flat if isinstance(value, Tensor)])
        return pytree.tree_unflatten(outputs, self._out_spec)

    def row_index(self, tenants: Sequence[str | None] | None, rows: int) -> Tensor:
        """The row index for these names: int32 [rows].

        Raises:
            UnsupportedError: an unknown name, or another number of names than rows.
        """
        names = [None] * rows if tenants is None else list(tenants)
        with self._lock:
            slots = self.tenants
        unknown = [name for name in names if name is not None and name not in slots]
        if unknown:
            raise UnsupportedError(f"there is no tenant {unknown[0]!r}: the package has {', '.join(slots) or 'none'}")
        if len(names) != rows:
            raise UnsupportedError(f"{len(names)} tenants for {rows} rows: give one name, or None, per row")
        return torch.tensor([-1 if name is None else slots[name] for name in names], dtype=torch.int32)

    def replace(self, name: str, delta: Delta | str | Path) -> None:
        """Give a tenant another delta.

        Raises:
            UnsupportedError: an unknown tenant, or a delta that needs more room than the package has.
            BaseMismatchError: a delta of another base.
            Nothing has changed then.
        """
        given = Delta.load(delta) if isinstance(delta, str | Path) else delta
        with self._lock:
            self._write(name, self._slot(name), given)

    def add(self, name: str, delta: Delta | str | Path) -> None:
        """Put a tenant into a free slot; there are as many as `merge(slots=...)` was given beyond its programs.

        Raises:
            UnsupportedError: the name is taken, or no slot is free; and as `replace`.
        """
        given = Delta.load(delta) if isinstance(delta, str | Path) else delta
        with self._lock:
            slots = self.tenants
            if name in slots:
                raise UnsupportedError(f"there is a tenant {name} already: replace it, or choose another name")
            free = [slot for slot in range(self.slots) if slot not in slots.values()]
            if not free:
                raise UnsupportedError(
                    f"all {self.slots} slots are taken: replace a tenant, or merge with more slots=..."
                )
            self._write(name, free[0], given)

    def remove(self, name: str) -> None:
        """Forget a tenant and free its slot.

        Raises:
            UnsupportedError: an unknown tenant.
        """
        with self._lock:
            self._names[self._slot(name)] = None

    def _slot(self, name: str) -> int:
        slots = self.tenants
        if name not in slots:
            raise UnsupportedError(f"there is no tenant {name!r}: the package has {', '.join(slots) or 'none'}")
        return slots[name]

    def _write(self, name: str, slot: int, delta: Delta) -> None:
        encodings = self._encodings(name, delta)
        others = {other for other in self.tenants.values() if other != slot}
        for parameter, encoding in encodings.items():
            if isinstance(encoding, Same):
                continue
            missing = lacks(self.stacks[parameter], encoding, self._base[parameter], others)
            if missing:
                raise UnsupportedError(
                    f"tenant {name} needs more of {parameter} than the package has room for: {', '.join(missing)}; "
                    "merge and package again with reserve=..., or with it among the tenants"
                )
        with torch.no_grad():
            for parameter, stack in self.stacks.items():
                write(stack, slot, encodings.get(parameter), self._base[parameter], free_dense(stack, others))
            self._names[slot] = name

    def _encodings(self, name: str, delta: Delta) -> dict[str, Encoding]:
        """The delta's encodings by the package's names of parameters, checked against its base."""
        known = [*self._base, *self._tied]
        found = delta.encodings_for(known, self._tied, name)
        if not found:
            raise BaseMismatchError(f"tenant {name} has no parameter of this package's base: give a delta of that base")
        fingerprint = delta.fingerprint
        for theirs, alias in match_names(fingerprint.names, known).items():
            ours = self._tied.get(alias, alias)
            difference = fingerprint.difference(theirs, self._base[ours], self._samples.get(ours))
            if ours in found and difference is not None:
                raise BaseMismatchError(
                    f"tenant {name} was made for another base than this package's: {difference}; give a delta of it"
                )
        for ours, encoding in found.items():
            if ours not in self.stacks and not isinstance(encoding, Same):
                raise UnsupportedError(
                    f"tenant {name} changes {ours}, which is the base's for every row in this package: merge and "
                    "package again with it among the tenants"
                )
        return found


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """B: size of the first dimension of the first tensor."""
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise UnsupportedError("a call needs a tensor whose first dimension is the batch")
    return int(tensors[0].shape[0])


def _runner(path: Path, folder: Path, device: str) -> Any:
    """AOTInductor's runner of the model in a package, unpacked into `folder`.

    It is what `torch._inductor.aoti_load_package` runs, which does not hand out the constants.
    """
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    (library,) = folder.glob("**/*.so")
    runner = getattr(torch._C._aoti, f"AOTIModelContainerRunner{device.capitalize()}")
    extra = () if device == "cpu" else (device, str(library.parent))
    return runner(str(library), 1, *extra)


def _stacks(encodings: Mapping[str, Mapping[str, Any]], constants: Mapping[str, Tensor]) -> dict[str, Stack]:
    found: dict[str, Stack] = {}
    for name, about in encodings.items():
        fields = {key.rpartition(".")[2]: t for key, t in constants.items() if key.rpartition(".")[0] == PREFIX + name}
        found[name] = Stack(
            tuple(about["shape"]),
            DTYPES[about["dtype"]],
            about["transposed"],
            out_features=about["out_features"],
            **fields,
        )
    return found
