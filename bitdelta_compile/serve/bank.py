"""The deltas of all tenants: preallocated slots that compiled graphs read, names that point at them.

A graph is compiled for the shapes of the bank's tensors and reads whatever they hold: tenants come and go by writing
into a free slot and pointing a name at it. A slot is written only while nothing reads it, and a name that is replaced
points at another slot from one call to the next, so a call that is under way sees the old tenant or the new one.

What a tenant lacks of a slot's room costs it nothing in the result and little in time: planes that it does not have
get zero row scales, which the CPU kernel skips; a low-rank part that it does not have is zero; column scales that it
does not have are ones; a parameter that equals the base's has all its planes so.

Whether a matrix is stored [N, K] or [K, N] is said by the encodings of tenants. Where none has said it yet, it is
settled by the first graph that uses the matrix, or the first tenant that changes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checkpoint import open_checkpoint
from ..delta import Delta
from ..deltafile import require_finite
from ..encodings import Encoding, Matrix, Rows, Same
from ..errors import UnsupportedError
from ..quantized import is_quantized
from ..stack import Stack
from .reserve import Reserve, plan
from .slots import allocate, copy, free_dense, lacks, write


class Base:
    """The base's parameters, each once.

    Attributes:
        parameters: canonical name -> tensor.
        aliases: other name -> canonical name.
        by_id: id of a tensor -> canonical name.
        checkpoint: the same tensors, with the base's side files.

    Raises:
        UnsupportedError: parameters without data, on several devices, or of a kind of their own (distributed).
    """

    def __init__(self, module: nn.Module) -> None:
        _check_plain(module)
        self.module = module
        self.checkpoint = open_checkpoint(module)
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
        delta.fingerprint.check(self.checkpoint)
        found = delta.encodings_for([*self.parameters, *self.aliases], self.aliases, tenant)
        met = {id(encoding) for encoding in found.values()}
        for name, encoding in delta.encodings.items():
            if id(encoding) not in met and not isinstance(encoding, Same):  # a buffer, or a parameter of a head
                raise UnsupportedError(
                    f"tenant {tenant} has {name}, which the base does not: attach the model that has it "
                    "(the same class as the fine-tune)"
                )
            require_finite(name, encoding, tenant)
        return {ours: self._checked(tenant, ours, encoding) for ours, encoding in found.items()}

    def _checked(self, tenant: str, name: str, encoding: Encoding) -> Encoding:
        base = self.parameters[name]
        grown = isinstance(encoding, Rows) and encoding.shape != tuple(base.shape)
        if grown and Reserve.default(base).small:
            raise UnsupportedError(
                f"{name} has shape {list(base.shape)} in the base and {list(encoding.shape)} in tenant {tenant}, and "
                "is too small a table for rows of its own: give the base a parameter of that shape before attaching"
            )
        if encoding.shape != tuple(base.shape) and not (grown and _grown_from(encoding, base)):
            raise UnsupportedError(
                f"{name} has shape {list(base.shape)} in the base and {list(encoding.shape)} in tenant {tenant}: give "
                "the base a parameter of that shape before attaching, for instance with num_labels=..."
            )
        return encoding


def _check_plain(module: nn.Module) -> None:
    places: dict[torch.device, str] = {}
    for name, tensor in module.named_parameters():
        if type(tensor) is not nn.Parameter and not is_quantized(tensor):
            raise UnsupportedError(
                f"{name} of the base is a {type(tensor).__name__}, which many tenants cannot share yet: attach a base "
                "of plain tensors, or of quantized ones that can be dequantized"
            )
        if tensor.is_meta:
            raise UnsupportedError(f"{name} of the base has no data (it is a meta tensor): load the model first")
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        (one, first), (other, second), *_ = places.items()
        raise UnsupportedError(
            f"the base is spread over devices ({first} on {one}, {second} on {other}): load it onto one of them"
        )


def _grown_from(encoding: Encoding, base: Tensor) -> bool:
    assert isinstance(encoding, Matrix)
    rows, features = (base.shape[1], base.shape[0]) if encoding.transposed else (base.shape[0], base.shape[1])
    return encoding.in_features == features and encoding.out_features > rows


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
        for name in tenants:
            _check_name(name)
        if slots < max(1, len(tenants)):
            raise UnsupportedError(f"{slots} slots cannot hold {len(tenants)} tenants: give attach(slots=...) more")
        self.base, self.slots = base, slots
        encodings = {name: base.encodings(name, delta) for name, delta in tenants.items()}
        self.reserve = plan(base.parameters, encodings, reserve)
        said = _said(encodings)
        self.stacks = _stacks(base, self.reserve, slots, said)
        self._open = {name for name, stack in self.stacks.items() if stack.small is None} - said.keys()
        self.refused: dict[str, str] = {}  # parameter -> why no graph can give each row its own
        self._lock = threading.Lock()
        self._slot: dict[str, int] = {}
        self._changed: dict[str, frozenset[str]] = {}  # tenant -> parameters that differ from the base's
        self._leases = [0] * slots
        self.side_files: dict[str, Mapping[str, object]] = {}  # tenant -> its config, generation config and so on
        for name, found in encodings.items():
            self._place(name, found, tenants[name])

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names, in the order they came."""
        return tuple(self._slot)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(stack.nbytes for stack in self.stacks.values())

    @property
    def padding_bytes(self) -> int:
        """Of these, what only fills up the device's layout of the signs."""
        return sum(stack.padding_bytes for stack in self.stacks.values())

    def slot(self, name: str) -> int:
        """Where a tenant is."""
        return self._slot[self._known(name)]

    def changed(self, parameter: str) -> tuple[str, ...]:
        """Tenants whose tensor differs from the base's there."""
        with self._lock:
            return self._changing(parameter)

    def refuse(self, refused: Mapping[str, str]) -> bool:
        """Let no later tenant change parameters that a graph takes to be the base's for every row.

        Args:
            refused: each with the reason.

        Returns:
            False, and nothing has changed, where some tenant has come meanwhile that changes one.
        """
        with self._lock:
            if any(map(self._changing, refused)):
                return False
            self.refused = self.refused | dict(refused)
            return True

    def _changing(self, parameter: str) -> tuple[str, ...]:
        return tuple(name for name, parameters in self._changed.items() if parameter in parameters)

    def add(self, name: str, delta: Delta, *, replace: bool = False) -> None:
        """Put a tenant into a free slot; what is under way goes on with what it started with.

        Raises:
            UnsupportedError: the name is taken (`replace=True` to take it over) or unknown (with `replace`), no slot is
                free, or the delta needs more room than there is. Nothing has changed then.
            BaseMismatchError, DeltaFileError: as `Base.encodings`.
        """
        _check_name(name)
        self._check_free(name, replace)  # also before reading the delta, which takes a while
        found = self.base.encodings(name, delta)
        with self._lock:
            self._check_free(name, replace)
            for parameter, encoding in found.items():
                self._check_room(name, parameter, encoding)
            self._place(name, found, delta)

    def _check_free(self, name: str, replace: bool) -> None:
        if replace:
            self._known(name)
        elif name in self._slot:
            raise UnsupportedError(f"there is a tenant {name} already: replace it, or choose another name")

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
            del self._slot[name], self._changed[name], self.side_files[name]

    @contextlib.contextmanager
    def lease(self, names: Sequence[str | None]) -> Iterator[tuple[int, ...]]:
        """The slots of these tenants, -1 for the base, kept as they are until the end of the block.

        Raises:
            UnsupportedError: an unknown tenant.
        """
        with self._lock:
            slots = tuple(-1 if name is None else self._slot[self._known(name)] for name in names)
            for slot in slots:
                if slot >= 0:
                    self._leases[slot] += 1
        try:
            yield slots
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
        missing = lacks(stack, encoding, base, self._in_use(), oriented=parameter not in self._open)
        if missing:
            raise UnsupportedError(
                f"tenant {tenant} needs more of {parameter} than was reserved: {', '.join(missing)}; attach with it "
                "among the first tenants or with reserve=..., or call grow(fit=[delta]), which compiles again"
            )

    def settle(self, parameter: str, transposed: bool | None) -> Stack:
        """The stack of a matrix, from now on stored as a graph that uses it says, unless a tenant has said it.

        Args:
            transposed: it is stored [K, N]; None: nothing can be said.
        """
        with self._lock:
            if transposed is not None:
                self._settle(parameter, transposed)
            return self.stacks[parameter]

    @torch.no_grad()
    def _settle(self, parameter: str, transposed: bool) -> None:
        """No tenant has planes or rows of an open matrix: what may move is dense."""
        if parameter not in self._open:
            return
        self._open.discard(parameter)
        old, base = self.stacks[parameter], self.base.parameters[parameter]
        if old.transposed == transposed:
            return
        new = allocate(base, self.reserve[parameter], self.slots, transposed)
        assert new is not None
        for slot in self._in_use():
            write(new, slot, None, base, None)
        if old.dense is not None and old.place is not None:
            assert new.dense is not None
            assert new.place is not None
            new.dense.copy_(old.dense.mT)
            new.place.copy_(old.place)
        self.stacks[parameter] = new

    def _in_use(self) -> set[int]:
        return {*self._slot.values(), *(slot for slot, count in enumerate(self._leases) if count)}

    @torch.no_grad()
    def _place(self, name: str, encodings: Mapping[str, Encoding], delta: Delta) -> None:
        """Write a free slot, then point the name at it."""
        used = self._in_use()
        slot = next((each for each in range(self.slots) if each not in used), None)
        if slot is None:
            raise UnsupportedError(
                f"all {self.slots} slots are taken: remove a tenant, attach with more slots=..., or call "
                "grow(slots=...), which compiles again"
            )
        for parameter, transposed in _said({name: encodings}).items():
            self._settle(parameter, transposed)
        for parameter, stack in self.stacks.items():
            write(stack, slot, encodings.get(parameter), self.base.parameters[parameter], free_dense(stack, used))
        self._slot[name], self.side_files[name] = slot, delta.side_files
        self._changed[name] = frozenset(
            parameter for parameter, encoding in encodings.items() if not isinstance(encoding, Same)
        )

    @torch.no_grad()
    def grown(self, slots: int | None, reserve: Reserve | Mapping[str, Reserve] | None, fit: Sequence[Delta]) -> Bank:
        """A bank with more room that holds the same tenants.

        Args:
            slots: how many, at least as many as now; None for as many.
            reserve: room for every matrix, or by parameter name, where it is more than now.
            fit: deltas to have room for.

        Raises:
            UnsupportedError: fewer slots than now, or a call is under way.
        """
        wider = slots if slots is not None else self.slots
        if wider < self.slots:
            raise UnsupportedError(f"there are {self.slots} slots: grow(slots={wider}) would take some away")
        with self._lock:
            if any(self._leases):
                raise UnsupportedError("calls are under way: grow when they are done")
            more = {f"delta {at}": self.base.encodings(f"delta {at}", delta) for at, delta in enumerate(fit)}
            bank = Bank(self.base, {}, wider)
            wanted = plan(self.base.parameters, more, reserve)
            bank.reserve = {name: room | wanted[name] for name, room in self.reserve.items()}
            for name, stack in self.stacks.items():  # whole matrices are shared out: what is taken stays taken
                taken = 0 if stack.place is None else sum(int(stack.place[at]) >= 0 for at in self._slot.values())
                most = max(self.reserve[name].dense, taken + wanted[name].dense if wanted[name].dense else 0)
                bank.reserve[name] = dataclasses.replace(bank.reserve[name], dense=most)
            for name, transposed in _said(more).items():
                self._settle(name, transposed)
            settled = {name: stack.transposed for name, stack in self.stacks.items() if name not in self._open}
            said = _said(more) | settled
            bank.stacks = _stacks(self.base, bank.reserve, wider, said)
            bank._open = {name for name, stack in bank.stacks.items() if stack.small is None} - said.keys()
            for name, stack in self.stacks.items():
                if (stack.small is None) != (bank.stacks[name].small is None):
                    raise UnsupportedError(
                        f"{name} has room for planes in every slot, which grow cannot turn into tensors of its own: "
                        "attach anew with that reserve"
                    )
            for slot in self._slot.values():
                for name, stack in bank.stacks.items():
                    dense = None if stack.place is None else int(stack.place.max()) + 1
                    copy(self.stacks.get(name), stack, slot, self.base.parameters[name], dense)
            bank._slot, bank._changed = dict(self._slot), dict(self._changed)
            bank.side_files = dict(self.side_files)
            return bank


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise UnsupportedError(f"a tenant's name is a string that is not empty, got {name!r}")


def _said(tenants: Mapping[str, Mapping[str, Encoding]]) -> dict[str, bool]:
    """Whether a matrix is stored [K, N], for those of which some tenant says it."""
    return {
        name: encoding.transposed
        for encodings in tenants.values()
        for name, encoding in encodings.items()
        if isinstance(encoding, Matrix)
    }


def _stacks(base: Base, reserve: Mapping[str, Reserve], slots: int, said: Mapping[str, bool]) -> dict[str, Stack]:
    transposed = {name for name, stored in said.items() if stored}
    found = {name: allocate(base.parameters[name], room, slots, name in transposed) for name, room in reserve.items()}
    return {name: stack for name, stack in found.items() if stack is not None}
