"""How a model uses each of its parameters: found by watching torch calls, never by a parameter's name.

A parameter is recognised by its memory (storage, offset, strides), so views, tied names and renamed modules all lead
back to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

Kind = Literal["linear", "embedding", "other"]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one parameter.

    Attributes:
        name: of the parameter.
        kind: `linear` (a matrix product with the whole parameter), `embedding` (rows looked up by id), or `other`.
        operand: `linear`: x [*, K]; `embedding`: the ids [*]; `other`: None.
        transposed: the parameter is stored [K, N], the product contracts its first dimension.
        op: the name of the torch function.
        bias: the parameter that the operation adds to the product, None where there is none.
    """

    name: str
    kind: Kind
    operand: Tensor | None
    transposed: bool
    op: str
    bias: str | None = None


@dataclasses.dataclass(frozen=True)
class _Product:
    """A candidate matrix product: `weight` is seen by the op as [N, K] (`rows_first`) or as [K, N]; x is [*, K]; `bias`
    is added to it."""

    weight: Any
    x: Any
    rows_first: bool
    bias: Any = None


@dataclasses.dataclass(frozen=True)
class _Lookup:
    weight: Any
    ids: Any


_Reading = list[_Product | _Lookup]


def _linear(input: Any, weight: Any, bias: Any = None) -> _Reading:
    return [_Product(weight, input, rows_first=True, bias=bias)]


def _matmul(input: Any, other: Any, /) -> _Reading:
    # A vector on the right is contracted whole: it is x [K] already.
    x_of_other = other.mT if isinstance(other, Tensor) and other.dim() >= 2 else other
    return [_Product(other, input, rows_first=False), _Product(input, x_of_other, rows_first=True)]


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> _Reading:
    return [_Product(mat2, mat1, rows_first=False, bias=input)] if beta == 1 and alpha == 1 else []


def _functional_embedding(
    input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **options: Any
) -> _Reading:
    # max_norm rewrites the table in place: not a plain lookup.
    return [_Lookup(weight, input)] if max_norm is None else []


def _embedding(weight: Any, indices: Any, *rest: Any, **options: Any) -> _Reading:
    return [_Lookup(weight, indices)]


_aten = torch.ops.aten
_READERS: dict[Any, Callable[..., _Reading]] = {
    F.linear: _linear,
    _aten.linear.default: _linear,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    _aten.addmm.default: _addmm,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    _aten.mm.default: _matmul,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    _aten.matmul.default: _matmul,
    F.embedding: _functional_embedding,
    torch.embedding: _embedding,
    _aten.embedding.default: _embedding,
}


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides with those of size-1 dimensions, which mean nothing, set to 0."""
    return tuple(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches."""
    first = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return first, first
    reach = sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return first, first + reach * tensor.element_size()


class UseRecorder(TorchFunctionMode):
    """Reports every use of the given parameters while it is entered. Works on real, meta and fake tensors, modules
    and fx graphs.

    Recognised is what the compile pass can rewrite (`graph/patterns.py`): F.linear, mm, matmul and @ with the
    parameter on either side, addmm (beta and alpha 1) with it on the right, and embedding lookups, of a parameter or
    its full transpose. Views and queries (`weight.t()`, `weight.dtype`) are not uses. All else is `other`: a slice of
    a parameter, a converted copy, an elementwise product, einsum, or a parameter inside a fused function.

    Args:
        parameters: tensors by name; of names that share one memory (tied weights) the first is reported.
        on_use: called before the operation runs, outside the mode.
    """

    def __init__(self, parameters: Mapping[str, Tensor], on_use: Callable[[Use], None]) -> None:
        super().__init__()
        self._on_use = on_use
        self._by_storage: dict[int, list[tuple[int, int, str, Tensor]]] = {}
        for name, tensor in parameters.items():
            entries = self._by_storage.setdefault(tensor.untyped_storage()._cdata, [])
            start, end = _span(tensor)
            if not any(start < known_end and known_start < end for known_start, known_end, _, _ in entries):
                entries.append((start, end, name, tensor))

    def _owner(self, value: Any) -> tuple[str, Tensor] | None:
        """The parameter whose memory `value` reaches into."""
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        entries = self._by_storage.get(value.untyped_storage()._cdata)
        if entries is None:
            return None
        start, end = _span(value)
        return next(((name, tensor) for lo, hi, name, tensor in entries if start < hi and lo < end), None)

    def _whole(self, value: Any, wanted: str) -> Literal["as stored", "transposed"] | None:
        """Whether `value` is the parameter `wanted` itself, its full transpose, or neither."""
        owner = self._owner(value)
        if owner is None or owner[0] != wanted:
            return None
        stored = owner[1]
        if value.dtype != stored.dtype or value.storage_offset() != stored.storage_offset():
            return None
        if value.shape == stored.shape and _strides(value) == _strides(stored):
            return "as stored"
        if stored.dim() == 2 and value.shape == stored.shape[::-1] and _strides(value) == _strides(stored)[::-1]:
            return "transposed"
        return None

    def _vector(self, value: Any) -> str | None:
        """The parameter that `value` is, where it is a vector."""
        owner = self._owner(value)
        return owner[0] if owner is not None and owner[1].dim() == 1 and value.shape == owner[1].shape else None

    def _read(self, name: str, readings: Iterable[_Product | _Lookup], op: str) -> Use | None:
        for reading in readings:
            view = self._whole(reading.weight, name)
            if view is None or reading.weight.dim() != 2:
                continue
            if isinstance(reading, _Lookup):
                if view == "as stored":
                    return Use(name, "embedding", reading.ids, False, op)
            elif self._owner(reading.x) is None:
                transposed = reading.rows_first != (view == "as stored")
                return Use(name, "linear", reading.x, transposed, op, self._vector(reading.bias))
        return None

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], uses: Sequence[Use]) -> Any:
        """Run an operation that reaches some parameter; `uses` are its products and lookups. Subclasses may put other
        values in the place of parameters."""
        return func(*args, **kwargs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        owners = [self._owner(leaf) for leaf in tree_leaves((args, kwargs))]
        names = list(dict.fromkeys(owner[0] for owner in owners if owner is not None))
        if not names:
            return func(*args, **kwargs)
        op = getattr(func, "__name__", str(func))
        reader = _READERS.get(func)
        readings: _Reading = []
        if reader is not None:
            try:
                readings = reader(*args, **kwargs)
            except TypeError:  # a call form this reading does not know, e.g. operands by keyword: reported as `other`
                readings = []
        others: list[str] = []
        uses: list[Use] = []
        for name in names:
            occurrences = sum(owner is not None and owner[0] == name for owner in owners)
            use = self._read(name, readings, op) if occurrences == 1 else None
            if use is None:
                others.append(name)
            else:
                uses.append(use)
                self._on_use(use)
        result = self.call(func, args, kwargs, uses)
        produced = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for name in others:
            made = [leaf for leaf in produced if (owner := self._owner(leaf)) is None or owner[0] != name]
            if made:  # otherwise a query or a view
                self._on_use(Use(name, "other", None, False, op))
        return result
