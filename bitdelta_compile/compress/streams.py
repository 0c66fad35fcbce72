"""Many runs of one model side by side, each stopping before it uses a matrix that is not fitted yet.

A stream is one run on one batch, in a thread of its own; threads never run at the same time, so they are coroutines
that need nothing of the model's code. The order in which streams stop is the model's own order of execution, whatever
its architecture, and what a stopped stream holds is what the model holds at that point: no layer is run twice.

Nothing of the model is changed: a function mode puts other values in the place of its parameters, in fp32 and on the
device that computes, while an operation runs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .uses import Use, UseRecorder

_NARROW = (torch.bfloat16, torch.float16)
# Questions about a tensor and views of it: answered without a converted copy.
_VIEWS = frozenset((
    "size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point", "data_ptr", "detach", "t",
    "storage_offset", "transpose", "permute", "view", "reshape", "expand", "unsqueeze", "squeeze", "select", "narrow",
    "chunk", "split",
))  # fmt: skip
# Operations that want their operands in one dtype: a graph may cast some of them to a narrow one by name.
_ALIKE = frozenset(("scaled_dot_product_attention", "linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm"))


@dataclasses.dataclass(frozen=True)
class Run:
    """The model on one batch.

    Attributes:
        call: runs it; it must do the same at every call.
        mask: bool [B, S] or None: which tokens of inputs [B, S, *] count.
    """

    call: Callable[[], object]
    mask: Tensor | None = None


class Values(Protocol):
    """What a stream computes with in the place of parameters.

    Attributes:
        device: where it computes, None where the parameters are.
    """

    device: torch.device | None

    def matrix(self, name: str) -> Tensor | None:
        """fp32, as stored; None: the parameter itself."""

    def rows(self, name: str, ids: Tensor) -> Tensor | None:
        """Looked-up rows, fp32 [*ids, K]; None: the parameter's."""

    def vector(self, name: str) -> Tensor | None:
        """A bias, fp32 [N]; None: the parameter itself."""

    def forget(self, name: str | None = None) -> None:
        """Let go of a converted copy, or of all."""


class Ended(BaseException):
    """Unwinds a run of which nothing more is wanted."""


class Substitution(UseRecorder):
    """Reports uses, and computes with `values` in the place of parameters.

    A copy that `values` converts is let go when the operation that uses it is over.

    Args:
        keeps: whether other runs will want the copy of the parameter of this name; the caller then lets go of it.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        on_use: Callable[[Use], None],
        values: Values,
        keeps: Callable[[str], bool] = lambda name: False,
    ) -> None:
        super().__init__(parameters, on_use)
        self._values, self._keeps = values, keeps

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _ALIKE:
            args, kwargs = tree_map_only(
                Tensor, lambda leaf: leaf if self._owner(leaf) is not None else _wide(leaf), (args, kwargs or {})
            )
        return super().__torch_function__(func, types, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], uses: Sequence[Use]) -> Any:
        try:
            return self._call(func, args, kwargs, uses)
        finally:
            for use in uses:
                if not self._keeps(use.name):
                    self._values.forget(use.name)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], uses: Sequence[Use]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            found = func(*args, **kwargs)
            if isinstance(found, torch.device):
                return self._values.device or found
            return torch.float32 if isinstance(found, torch.dtype) and found in _NARROW else found
        if name in _VIEWS:
            return func(*args, **kwargs)
        for use in uses:
            if use.kind == "embedding" and use.operand is not None:
                found = self._values.rows(use.name, use.operand)
                return _wide(func(*args, **kwargs)) if found is None else found
        replaced = {use.name: self._values.matrix(use.name) for use in uses}
        replaced |= {use.bias: self._values.vector(use.bias) for use in uses if use.bias is not None}

        def value(leaf: Tensor) -> Tensor:
            owner = self._owner(leaf)
            if owner is None:
                return leaf
            other = replaced.get(owner[0])
            if other is None:
                return _wide(leaf if self._values.device is None else leaf.to(self._values.device))
            return other if self._whole(leaf, owner[0]) == "as stored" else other.T

        return func(*tree_map_only(Tensor, value, args), **tree_map_only(Tensor, value, kwargs))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _NARROW else tensor


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where that is the C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def return_memory() -> None:
    """Give freed memory back to the system: of every thread's heap glibc keeps some, up to twice 32 MB, and each
    stream has a thread."""
    if (trim := _trim()) is not None:
        trim(0)


class Stream:
    """One run of the model in its own thread.

    Attributes:
        run: on one batch.
        use: what it stands before; None before the first `advance`, and once it has ended.
    """

    def __init__(
        self, run: Run, parameters: Mapping[str, Tensor], values: Values, stops: Callable[[Use], bool]
    ) -> None:
        self.run = run
        self.use: Use | None = None
        self._stops, self._ending = stops, False
        self._stood_before: set[str] = set()  # the other streams stand there too, and use it next
        self._mode = Substitution(parameters, self._before, values, self._stood_before.__contains__)
        self._failure: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._body, daemon=True)
        self._started = False

    def advance(self) -> None:
        """Run until the next use that `stops` holds up, or to the end.

        Raises:
            Whatever the model raises.
        """
        self.use = None
        if not self._started:
            self._started = True
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._failure is not None:
            raise self._failure

    def dismiss(self) -> None:
        """Have the thread unwind by itself; what it holds is let go."""
        self.use = None
        if self._started and not self._ending:
            self._ending = True
            self._go.release()

    def end(self) -> None:
        """`dismiss`, and wait until it has."""
        self.dismiss()
        if self._started:
            self._thread.join()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._ending:
                with torch.no_grad(), self._mode:
                    self.run.call()
        except Ended:
            pass
        except BaseException as error:
            self._failure = error
        self.use = None
        self._back.release()

    def _before(self, use: Use) -> None:
        if not self._stops(use):
            return
        self.use = use
        self._stood_before.add(use.name)
        self._back.release()
        self._go.acquire()
        if self._ending:
            raise Ended
