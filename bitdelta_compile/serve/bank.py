"""The deltas of all tenants: preallocated slots that compiled graphs read, names that point at them.

A graph is compiled for the shapes of the bank's tensors and reads whatever they hold: tenants come and go by writing into
a free slot and pointing a name at it. A slot is written only while nothing reads it, and a name that is replaced points
at another slot from one call to the next, so a call that is under way sees the old tenant or the new one.

What a tenant lacks of a slot's room costs it nothing in the result and little in time: planes and low-rank parts it does
not have get zero scales, which the kernels skip; column scales it does not have are ones; a parameter that equals the
base's has all its planes so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checkpoint import match_names, open_checkpoint
from ..delta import Delta
from ..encodings import Dense, Encoding, Matrix, Rows, Same, Sign
from ..errors import DeltaFileError, UnsupportedError
from ..kernels.layout import words
from ..stack import Stack
from .reserve import Reserve, plan


class Base:
    """The base's parameters, each once.

    Attributes:
        parameters: canonical name -> tensor.
        aliases: other name -> canonical name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        seen: dict[int, str] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            canonical = seen.setdefault(id(tensor), name)
            if canonical == name:
                self.parameters[name] = tensor
            else:
                self.aliases[name] = canonical
        self.by_id = seen

    def encodings(self, tenant: str, delta: Delta) -> dict[str, Encoding]:
        """A delta's encodings by the names of this base's parameters, those that are the same left out.

        Raises:
            BaseMismatchError: the delta was made for another base.
            DeltaFileError: it holds NaN or infinite values.
            UnsupportedError: tensors that are one in the base and two in the fine-tune, or a shape of its own.
        """
        delta.fingerprint.check(open_checkpoint(self.module))
        names = [*self.parameters, *self.aliases]
        paired = match_names([*delta.encodings, *delta.tied], names)
        found: dict[str, tuple[str, Encoding]] = {}
        for theirs, ours in paired.items():
            source = delta.tied.get(theirs, theirs)
            encoding = delta.encodings[source]
            canonical = self.aliases.get(ours, ours)
            other, known = found.setdefault(canonical, (source, encoding))
            if known is not encoding:
                raise UnsupportedError(
                    f"{other} and {source} are one tensor in the base but two in tenant {tenant}: untie them in the "
                    f"base before attaching, giving {source} a copy of its own"
                )
        for name, encoding in delta.encodings.items():
            if name not in paired and not any(alias in paired for alias, of in delta.tied.items() if of == name):
                raise UnsupportedError(
                    f"tenant {tenant} has {name}, which the base does not: attach the model that has it "
                    "(the same class as the fine-tune)"
                )
            _check_finite(tenant, name, encoding)
        return {ours: self._checked(tenant, ours, encoding) for ours, (_, encoding) in found.items()}

    def _checked(self, tenant: str, name: str, encoding: Encoding) -> Encoding:
        base = self.parameters[name]
        under = encoding.over.shape if isinstance(encoding, Rows) and encoding.over is not None else encoding.shape
        grown = isinstance(encoding, Rows) and len(base.shape) == 2
        if under != tuple(base.shape) and not (grown and _grown_from(encoding, base)):
            raise UnsupportedError(
                f"{name} has shape {list(base.shape)} in the base and {list(encoding.shape)} in tenant {tenant}: give "
                "the base a parameter of that shape before attaching, for instance with num_labels=..."
            )
        return encoding


def _grown_from(encoding: Encoding, base: Tensor) -> bool:
    assert isinstance(encoding, Matrix)
    rows, features = (base.shape[1], base.shape[0]) if encoding.transposed else (base.shape[0], base.shape[1])
    return encoding.in_features == features and encoding.out_features >= rows


def _check_finite(tenant: str, name: str, encoding: Encoding) -> None:
    parts = [encoding, *([encoding.over] if isinstance(encoding, Rows) and encoding.over is not None else [])]
    for part in parts:
        for field, stored in part.tensors().items():
            if stored.is_floating_point() and not bool(stored.isfinite().all()):
                raise DeltaFileError(
                    f"tenant {tenant}: {name}: {field} holds NaN or infinite values: the delta is damaged, make it again"
                )


@dataclasses.dataclass(frozen=True)
class Lease:
    """Slots held by a forward or a generate, one per row; -1 is the base."""

    names: tuple[str | None, ...]
    slots: tuple[int, ...]


class Bank:
    """Slots for the tenants of one base.

    Args:
        base: its parameters.
        tenants: the first ones; they decide how much room there is besides the default.
        slots: how many tenants fit; a replacement needs a free one for a moment.
        reserve: more room, for every matrix or by parameter name.

    Raises:
        UnsupportedError: too few slots, or anything `Base.encodings` raises.
    """

    def __init__(
        self,
        base: Base,
        tenants: Mapping[str, Delta],
        slots: int,
        reserve: Reserve | Mapping[str, Reserve] | None = None,
    ) -> None:
        if slots < max(1, len(tenants)):
            raise UnsupportedError(f"{slots} slots cannot hold {len(tenants)} tenants: give attach(slots=...) more")
        self.base, self.slots = base, slots
        encodings = {name: base.encodings(name, delta) for name, delta in tenants.items()}
        self.reserve = plan(base.parameters, encodings, reserve)
        transposed = _orientation(base, encodings)
        self.stacks = {
            name: stack
            for name, room in self.reserve.items()
            if (stack := _allocate(base.parameters[name], room, slots, name in transposed)) is not None
        }
        self.refused: dict[str, str] = {}  # parameter -> why no graph can give each row its own
        self._lock = threading.Lock()
        self._slot: dict[str, int] = {}
        self._changed: dict[str, frozenset[str]] = {}  # tenant -> parameters that differ from the base's
        self._leases = [0] * slots
        self._retired: set[int] = set()
        for name, found in encodings.items():
            self._place(name, found)

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names, in the order they came."""
        return tuple(self._slot)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(stack.nbytes for stack in self.stacks.values())

    def slot(self, name: str) -> int:
        """Where a tenant is."""
        return self._slot[self._known(name)]

    def changed(self, parameter: str) -> tuple[str, ...]:
        """Tenants whose tensor differs from the base's there."""
        return tuple(name for name, parameters in self._changed.items() if parameter in parameters)

    def add(self, name: str, delta: Delta, *, replace: bool = False) -> None:
        """Put a tenant into a free slot; what is under way goes on with what it started with.

        Raises:
            UnsupportedError: the name is taken (`replace=True` to take it over) or unknown (with `replace`), no slot is
                free, or the delta needs more room than there is. Nothing has changed then.
            BaseMismatchError, DeltaFileError: as `Base.encodings`.
        """
        _check_name(name)
        with self._lock:
            if replace:
                self._known(name)
            elif name in self._slot:
                raise UnsupportedError(f"there is a tenant {name} already: replace it, or choose another name")
        found = self.base.encodings(name, delta)
        for parameter, encoding in found.items():
            self._check_room(name, parameter, encoding)
        with self._lock:
            self._place(name, found)

    def remove(self, name: str) -> None:
        """Forget a tenant and free its slot.

        Raises:
            UnsupportedError: unknown, or in use by a forward or a generate that is under way.
        """
        with self._lock:
            slot = self._slot[self._known(name)]
            if self._leases[slot]:
                raise UnsupportedError(
                    f"tenant {name} is in use by {self._leases[slot]} running call(s): remove it when they are done"
                )
            del self._slot[name], self._changed[name]

    @contextlib.contextmanager
    def lease(self, names: Sequence[str | None]) -> Iterator[Lease]:
        """The slots of these tenants, kept as they are until the end of the block.

        Raises:
            UnsupportedError: an unknown tenant.
        """
        with self._lock:
            slots = tuple(-1 if name is None else self._slot[self._known(name)] for name in names)
            for slot in slots:
                if slot >= 0:
                    self._leases[slot] += 1
        try:
            yield Lease(tuple(names), slots)
        finally:
            with self._lock:
                for slot in slots:
                    if slot >= 0:
                        self._leases[slot] -= 1

    def _known(self, name: str) -> str:
        if name not in self._slot:
            known = ", ".join(self._slot) or "none"
            raise UnsupportedError(f"there is no tenant {name!r}: the tenants are {known}; None is the base")
        return name

    def _check_room(self, tenant: str, parameter: str, encoding: Encoding) -> None:
        if isinstance(encoding, Same):
            return
        base, stack = self.base.parameters[parameter], self.stacks.get(parameter)
        if parameter in self.refused:
            raise UnsupportedError(f"tenant {tenant} changes {parameter}: {self.refused[parameter]}")
        needed, room = Reserve.needed(encoding, base), self.reserve[parameter]
        if needed.dense and stack is not None and stack.place is not None and room.dense:
            if self._free_dense(stack) is None:
                needed = dataclasses.replace(needed, dense=room.dense + 1)
        lacks = room.lacks(needed)
        if isinstance(encoding, Matrix) and not room.small and stack is not None:
            if encoding.transposed != stack.transposed:
                lacks.append(f"transposed={encoding.transposed}")
        if lacks:
            raise UnsupportedError(
                f"tenant {tenant} needs more of {parameter} than was reserved: {', '.join(lacks)}; attach with it among "
                "the first tenants or with reserve=..., or call grow(...), which compiles again"
            )

    def _free_dense(self, stack: Stack) -> int | None:
        assert stack.dense is not None and stack.place is not None
        live = {int(stack.place[slot]) for slot in self._in_use()}
        return next((entry for entry in range(stack.dense.shape[0]) if entry not in live), None)

    def _in_use(self) -> set[int]:
        return {*self._slot.values(), *(slot for slot, count in enumerate(self._leases) if count)}

    @torch.no_grad()
    def _place(self, name: str, encodings: Mapping[str, Encoding]) -> None:
        """Write a free slot, then point the name at it."""
        used = self._in_use()
        slot = next((each for each in range(self.slots) if each not in used), None)
        if slot is None:
            raise UnsupportedError(
                f"all {self.slots} slots are taken: remove a tenant, attach with more slots=..., or call grow(slots=...)"
            )
        for parameter, stack in self.stacks.items():
            encoding = encodings.get(parameter)
            _write(
                stack,
                slot,
                encoding,
                self.base.parameters[parameter],
                self._free_dense(stack) if stack.dense is not None else None,
            )
        self._slot[name] = slot
        self._changed[name] = frozenset(
            parameter for parameter, encoding in encodings.items() if not isinstance(encoding, Same)
        )

    def to_delta_state(self) -> dict[str, int]:
        """Tenant -> slot, a copy."""
        with self._lock:
            return dict(self._slot)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise UnsupportedError(f"a tenant's name is a string that is not empty, got {name!r}")


def _orientation(base: Base, tenants: Mapping[str, Mapping[str, Encoding]]) -> set[str]:
    """Matrices that are stored [K, N]: as some tenant says, or as its module's kind does elsewhere."""
    said = {
        name: encoding.transposed
        for encodings in tenants.values()
        for name, encoding in encodings.items()
        if isinstance(encoding, Matrix)
    }
    kind = {
        f"{path}.{name}" if path else name: type(module)
        for path, module in base.module.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    kinds = {kind.get(name) for name, transposed in said.items() if transposed}
    return {name for name in base.parameters if said.get(name, kind.get(name) in kinds)}


def _allocate(base: Tensor, room: Reserve, slots: int, transposed: bool) -> Stack | None:
    """The tensors of one parameter's slots, with no tenant in any; None for no room."""
    shape, dtype, device = tuple(base.shape), base.dtype, base.device
    if room == Reserve():
        return None
    if room.small:
        small = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
        small[slots].copy_(base.detach())
        return Stack(shape, dtype, small=small)
    outputs, features = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    tensors: dict[str, Tensor] = {}
    if room.planes:
        tensors["signs"] = torch.zeros(slots, room.planes, outputs, words(features), dtype=torch.int32, device=device)
        tensors["row_scale"] = torch.zeros(slots, room.planes, outputs, device=device)
        if room.col_scale:
            tensors["col_scale"] = torch.zeros(slots, room.planes, features, device=device)
        if room.rank:
            tensors["left"] = torch.zeros(slots, outputs, room.rank, dtype=torch.bfloat16, device=device)
            tensors["right"] = torch.zeros(slots, room.rank, features, dtype=torch.bfloat16, device=device)
    largest = max(room.out_features, outputs)
    if room.rows:
        tensors["rows_index"] = torch.full((slots, room.rows), largest, dtype=torch.int64, device=device)
        tensors["rows_values"] = torch.zeros(slots, room.rows, features, dtype=dtype, device=device)
    if room.out_features > outputs:
        tensors["vocabulary"] = torch.full((slots + 1,), outputs, dtype=torch.int64, device=device)
    if room.dense:
        tensors["dense"] = torch.zeros(room.dense, *((outputs, features)), dtype=dtype, device=device)
        tensors["place"] = torch.full((slots,), -1, dtype=torch.int64, device=device)
    more = largest if room.rows or room.out_features > outputs else 0
    return Stack(shape, dtype, transposed, out_features=more, **tensors)  # type: ignore[arg-type]


def _write(stack: Stack, slot: int, encoding: Encoding | None, base: Tensor, dense: int | None) -> None:
    """Fill one slot of one parameter; None and `same` are the base's tensor."""
    if stack.small is not None:
        value = base.detach() if encoding is None or isinstance(encoding, Same) else encoding.apply(base.detach())
        stack.small[slot].copy_(value)
        return
    sign = encoding.over if isinstance(encoding, Rows) else encoding
    sign = sign if isinstance(sign, Sign) else None
    if stack.signs is not None and stack.row_scale is not None:
        planes = 0 if sign is None else sign.planes
        stack.row_scale[slot, planes:].zero_()
        if stack.col_scale is not None:
            stack.col_scale[slot].fill_(1.0)
        if stack.left is not None and stack.right is not None:
            stack.left[slot].zero_()
            stack.right[slot].zero_()
        if sign is not None:
            stack.signs[slot, :planes].copy_(sign.signs)
            stack.row_scale[slot, :planes].copy_(sign.row_scale)
            if sign.col_scale is not None:
                assert stack.col_scale is not None
                stack.col_scale[slot, :planes].copy_(sign.col_scale)
            if sign.left is not None and sign.right is not None:
                assert stack.left is not None and stack.right is not None
                stack.left[slot, :, : sign.rank].copy_(sign.left)
                stack.right[slot, : sign.rank].copy_(sign.right)
    rows = encoding if isinstance(encoding, Rows) else None
    if stack.rows_index is not None and stack.rows_values is not None:
        count = 0 if rows is None else rows.index.numel()
        stack.rows_index[slot, count:].fill_(stack.out_features)
        stack.rows_values[slot, count:].zero_()
        if rows is not None:
            stack.rows_index[slot, :count].copy_(rows.index)
            stack.rows_values[slot, :count].copy_(rows.values)
    if stack.vocabulary is not None:
        stack.vocabulary[slot] = stack.base_rows if rows is None else rows.out_features
    if stack.place is not None and stack.dense is not None:
        stack.place[slot] = -1
        if isinstance(encoding, Dense):
            assert dense is not None
            value = encoding.value.T if stack.transposed else encoding.value
            stack.dense[dense].copy_(value)
            stack.place[slot] = dense
