"""Where the rows of the batch are in every value of a graph.

The row index says which tenant each row of the batch belongs to, so a pass that gives rows different weights has to
know which part of an operand is which row. The batch size is a symbol in the graph, and where it stands in the
shape of a value is where its rows are, as long as no operation has shuffled them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .patterns import base_name, is_in_place


@dataclasses.dataclass(frozen=True)
class Batch:
    """The batch of a graph.

    Attributes:
        size: rows; symbolic, or 1: a batch of any other fixed size cannot be told from other sizes.
        symbols: every symbol that stands for it; inputs that meet nowhere have one each.
    """

    size: int | torch.SymInt
    symbols: frozenset[sympy.Symbol] = frozenset()

    @classmethod
    def leading(cls, values: Iterable[Any], rows: int) -> Batch | None:
        """The batch of inputs that lead with `rows` rows; None where that size is fixed in the graph and not 1."""
        if rows == 1:
            return cls(1)
        sizes = [
            value.shape[0]
            for value in values
            if isinstance(value, Tensor) and value.dim() and _hint(value.shape[0]) == rows
        ]
        symbolic = [size for size in sizes if isinstance(size, torch.SymInt) and _expression(size).free_symbols]
        if not symbolic:
            return None
        symbols = [symbol for size in symbolic for symbol in _expression(size).free_symbols]
        return cls(symbolic[0], frozenset(symbols))


@dataclasses.dataclass(frozen=True)
class RowsAt:
    """A value holds the rows along one dimension: all of it, or the outermost factor of it when `merged`."""

    dim: int
    merged: bool = False


@dataclasses.dataclass(frozen=True)
class Lost:
    """A value depends on the rows, but they cannot be told apart in it since `op` (node `node`)."""

    op: str
    node: str


Place = RowsAt | Lost | None  # None: the value is the same for every row

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unsafe_view", "view_as", "reshape_as")
# Calls that read only the shape or dtype of their other operands.
_READ_ONE = (*_RESHAPES, "to", "type_as", "expand_as")
# Calls that may reorder dimensions: where the arguments name them, and the default.
_REORDERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "flip": (1, ()),
    "flipud": (1, (0,)),
    "fliplr": (1, (1,)),
    "roll": (2, ()),
    "rot90": (2, (0, 1)),
    "sort": (1, (-1,)),
    "argsort": (1, (-1,)),
    "msort": (1, (0,)),
    "topk": (2, (-1,)),
    "index_select": (1, ()),
    "gather": (1, ()),
    "take": (1, ()),
    "take_along_dim": (2, ()),
}
# Calls that put parts of an operand where an index says: the dimension is the argument after the first.
_SCATTERS = ("scatter", "scatter_add", "scatter_reduce", "index_copy", "index_add", "index_reduce")
# What is written to these is written to their operand.
_VIEWS = (*_RESHAPES, "getitem", "select", "slice", "narrow", "transpose", "permute", "t", "expand", "detach")


def places(graph: fx.Graph, batch: Batch) -> dict[fx.Node, Place]:
    """The place of the rows in every value of a graph; with a batch of one row there is nothing to track."""
    found: dict[fx.Node, Place] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        found[node] = None if batch.size == 1 else _place(node, found, batch)
        lost, written = _lost_in(node, found, batch), _first(node)
        while lost is not None and isinstance(written, fx.Node):
            found[written] = lost
            written = _first(written) if base_name(written) in _VIEWS else None
    return found


def _lost_in(node: fx.Node, found: Mapping[fx.Node, Place], batch: Batch) -> Lost | None:
    """Why rows can no longer be told apart in what the call writes to; None where they can, or it writes to nothing."""
    if base_name(node) == "setitem":
        written, index, value = _first(node), node.args[1], node.args[2]
        there, given = found.get(written), found.get(value) if isinstance(value, fx.Node) else None
        masked = any(map(_mask_width, _parts(index)))
        if isinstance(given, Lost) and isinstance(value, fx.Node) and not masked and _carriers(value_of(value), batch):
            return given
        shuffled = isinstance(there, RowsAt) and _scatters(index, written, there, batch)
        return Lost("setitem", node.name) if shuffled else None
    place = found[node]
    return place if is_in_place(node) and isinstance(place, Lost) else None


def _place(node: fx.Node, found: Mapping[fx.Node, Place], batch: Batch) -> Place:
    value, source = value_of(node), node
    if not _has_rows(value):
        return None
    while base_name(source) == "getitem" and isinstance(value_of(_first(source)), list | tuple):
        source = _first(source)  # one of several results: where the rows are in it depends on the call that gives them
    here = Lost(base_name(source), source.name)
    operands = [(operand, found[operand]) for operand in _read(source) if _has_rows(value_of(operand))]
    known = [(operand, place) for operand, place in operands if isinstance(place, RowsAt)]
    lost = [(operand, place) for operand, place in operands if isinstance(place, Lost)]
    carriers = _carriers(value, batch)
    if not carriers and not known and not lost:
        return None
    multiple = _multiple(value.shape[carriers[0]], batch) if len(carriers) == 1 else None
    if multiple is None:
        return here
    shuffled = next((place for operand, place in lost if not known or _carriers(value_of(operand), batch)), None)
    if shuffled is not None:
        return shuffled
    place = RowsAt(carriers[0], merged=multiple != 1)
    if not known:
        return place
    if base_name(source) in _RESHAPES:
        operand, before = known[0]
        same = _before(value_of(operand).shape, before.dim) == _before(value.shape, place.dim)
        return place if same else here
    if any(_reorders(source, operand, before, batch) for operand, before in known):
        return here
    keeps = any(_multiple_at(operand, before.dim, batch) == multiple for operand, before in known)
    return place if keeps or any(_repeats(source, before) for _, before in known) else here


def value_of(node: fx.Node) -> Any:
    """The example value of a node: fake, or of the graph's own inputs real."""
    return node.meta.get("example_value", node.meta.get("val"))


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _read(node: fx.Node) -> list[fx.Node]:
    """Operands whose values the result depends on."""
    name = base_name(node)
    if name.startswith("new_"):
        return []
    first = _first(node)
    return [first] if name in _READ_ONE and isinstance(first, fx.Node) else node.all_input_nodes


def _has_rows(value: Any) -> bool:
    """Whether a value can: it is a tensor, several of them, or not known."""
    if isinstance(value, list | tuple):
        return any(_has_rows(each) for each in value)
    return value is None or isinstance(value, Tensor)


def _carriers(value: Any, batch: Batch) -> list[int]:
    """Dimensions whose size depends on the batch's."""
    if not isinstance(value, Tensor):
        return []
    return [dim for dim, size in enumerate(value.shape) if _expression(size).free_symbols & batch.symbols]


def _multiple_at(operand: fx.Node, dim: int, batch: Batch) -> sympy.Expr | None:
    value = value_of(operand)
    return _multiple(value.shape[dim], batch) if isinstance(value, Tensor) and dim < value.dim() else None


def _reorders(node: fx.Node, operand: fx.Node, place: RowsAt, batch: Batch) -> bool:
    """Whether the call may put the rows of its operand into another order."""
    name, value = base_name(node), value_of(operand)
    if not isinstance(value, Tensor):
        return False
    if name == "index_put":
        first = _first(node)
        at = node.args[1] if len(node.args) > 1 else node.kwargs.get("indices")
        return operand is first and _scatters(at, first, place, batch)
    if name in _SCATTERS:
        return place.dim in _dims(node, value.dim(), 1, ())
    if name == "embedding" and value.is_floating_point():  # a table of rows of the batch
        return place.dim == 0
    if _first(node) is not operand:
        return False
    if name in _REORDERS:
        return place.dim in _dims(node, value.dim(), *_REORDERS[name])
    if name in ("getitem", "index"):
        return _shuffles(node.args[1], operand, place, batch)
    if name == "repeat_interleave":
        repeats, dim = _repeated(node)
        counted = not isinstance(repeats, fx.Node) or not isinstance(value_of(repeats), Tensor)
        return not counted and (dim is None or dim % value.dim() == place.dim)
    return False


def _shuffles(index: Any, operand: fx.Node, place: RowsAt, batch: Batch) -> bool:
    """Whether what an index takes of an operand, or puts there, may be its rows in another order."""
    rows = _multiple_at(operand, place.dim, batch)
    return any(
        dim == place.dim and not _counts(each, rows, batch) for dim, each in _indexed(index, value_of(operand).dim())
    )


def _scatters(index: Any, operand: fx.Node, place: RowsAt, batch: Batch) -> bool:
    """Whether what is put where an index says may come into other rows; what a mask picks stays in its own."""
    return not any(map(_mask_width, _parts(index))) and _shuffles(index, operand, place, batch)


def _repeated(node: fx.Node) -> tuple[Any, int | None]:
    """The repeats and the dimension of a repeat_interleave."""
    named: dict[str, Any] = dict(zip(("repeats", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return named.get("repeats"), named.get("dim")


def _repeats(node: fx.Node, place: RowsAt) -> bool:
    """Whether the call gives every row several times, all copies of a row side by side."""
    return base_name(node) == "repeat_interleave" and (_repeated(node)[1] is not None or place.dim == 0)


def _counts(index: fx.Node, rows: sympy.Expr | None, batch: Batch) -> bool:
    """Whether an index is 0, 1, 2, ... up to the last of `rows` batches: an arange, or one seen in another shape."""
    while base_name(index) != "arange":
        seen = base_name(index) in (*_RESHAPES, "to", "to_copy", "expand")
        if base_name(index) == "getitem":
            seen = all(part in (None, Ellipsis, slice(None)) for part in _parts(index.args[1]))
        if not seen or not isinstance(_first(index), fx.Node):
            return False
        index = _first(index)
    bounds = index.args if len(index.args) > 1 else (index.kwargs.get("start", 0),)
    step = index.args[2] if len(index.args) > 2 else index.kwargs.get("step", 1)
    return bool(bounds[0] == 0 and step == 1) and bool(_multiple_at(index, 0, batch) == rows)


def _dims(node: fx.Node, rank: int, position: int, default: tuple[int, ...]) -> list[int]:
    """Dimensions that the call names; all of them where it names none and has no default."""
    given: Any = node.args[position:] if base_name(node) == "flip" else node.args[position : position + 1]
    for key in ("dim", "dims"):
        given = node.kwargs.get(key, given)
    named = [dim for each in _parts(given) for dim in _parts(each) if isinstance(dim, int)]
    return [dim % rank for dim in named or default or range(rank)]


def _parts(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]


def _indexed(index: Any, rank: int) -> Iterator[tuple[int, fx.Node]]:
    """Tensors in an index, each with the dimension that it indexes."""
    parts = _parts(index)
    widths = [0 if part is None or part is Ellipsis else _mask_width(part) or 1 for part in parts]
    dim = 0
    for part, width in zip(parts, widths, strict=True):
        if isinstance(part, fx.Node) and isinstance(value_of(part), Tensor):
            yield dim, part
        dim += rank - sum(widths) if part is Ellipsis else width


def _mask_width(part: Any) -> int:
    """How many dimensions a mask indexes; 0 of anything else."""
    value = value_of(part) if isinstance(part, fx.Node) else part
    return value.dim() if isinstance(value, Tensor) and value.dtype == torch.bool else 0


def _before(shape: Sequence[Any], dim: int) -> sympy.Expr:
    return sympy.expand(math.prod((_expression(size) for size in shape[:dim]), start=sympy.Integer(1)))


def _multiple(size: Any, batch: Batch) -> sympy.Expr | None:
    """How many times the batch size a size is; None where it is no multiple."""
    expression = _expression(size)
    symbols = sorted(expression.free_symbols & batch.symbols, key=str)
    if len(symbols) != 1:
        return None
    multiple = sympy.cancel(expression / symbols[0])
    return None if multiple.free_symbols & batch.symbols or multiple.as_numer_denom()[1] != 1 else multiple


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _hint(size: Any) -> int | None:
    return size.node.hint if isinstance(size, torch.SymInt) else int(size)
