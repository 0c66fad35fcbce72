"""Where the rows of the batch are in every value of a graph.

The row index says which tenant each row of the batch belongs to, so a pass that gives rows different weights has to know
which part of an operand is which row. The batch size is a symbol in the graph's shapes; where it stands in the shape of
a value is where its rows are, as long as no operation has shuffled them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .patterns import base_name


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
_REORDERS = {"flip": (), "roll": (), "sort": (-1,), "argsort": (-1,), "topk": (-1,), "index_select": (), "gather": ()}


def places(graph: fx.Graph, batch: Batch) -> dict[fx.Node, Place]:
    """The place of the rows in every value of a graph; with a batch of one row there is nothing to track."""
    found: dict[fx.Node, Place] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        found[node] = None if batch.size == 1 else _place(node, found, batch)
    return found


def _place(node: fx.Node, found: Mapping[fx.Node, Place], batch: Batch) -> Place:
    operands = [(operand, found[operand]) for operand in node.all_input_nodes if _is_tensor_like(operand)]
    known = [(operand, place) for operand, place in operands if isinstance(place, RowsAt)]
    lost = [place for _, place in operands if isinstance(place, Lost)]
    here = Lost(base_name(node), node.name)
    value = value_of(node)
    if not isinstance(value, Tensor):  # several results: the place of each is found where it is picked
        return known[0][1] if known else (lost[0] if lost else None)
    carriers = [dim for dim, size in enumerate(value.shape) if _expression(size).free_symbols & batch.symbols]
    if not carriers:
        return here if known or lost else None
    if len(carriers) > 1:
        return here
    dim = carriers[0]
    multiple = _multiple(value.shape[dim], batch)
    if multiple is None:
        return here
    if not known:
        return lost[0] if lost else RowsAt(dim, multiple != 1)
    if base_name(node) in _RESHAPES:
        operand, place = known[0]
        same = _before(value_of(operand).shape, place.dim) == _before(value.shape, dim)
        return RowsAt(dim, multiple != 1) if same else here
    if any(_reorders(node, operand, place) for operand, place in known):
        return here
    if multiple == 1:
        return RowsAt(dim)
    spread = base_name(node) == "repeat_interleave"
    kept = any(
        _multiple(value_of(operand).shape[place.dim], batch) == multiple
        for operand, place in known
        if _has_dim(operand, place)
    )
    return RowsAt(dim, merged=True) if spread or kept else here


def value_of(node: fx.Node) -> Any:
    """The example value of a node: fake, or of the graph's own inputs real."""
    return node.meta.get("example_value", node.meta.get("val"))


def _is_tensor_like(node: fx.Node) -> bool:
    return not isinstance(value_of(node), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _has_dim(operand: fx.Node, place: RowsAt) -> bool:
    value = value_of(operand)
    return isinstance(value, Tensor) and place.dim < value.dim()


def _reorders(node: fx.Node, operand: fx.Node, place: RowsAt) -> bool:
    """Whether the call may put the rows of its operand into another order."""
    name = base_name(node)
    if name in _REORDERS and node.args and node.args[0] is operand:
        return place.dim in _dims(node, value_of(operand).dim(), _REORDERS[name])
    if name in ("getitem", "index") and node.args and node.args[0] is operand and _has_dim(operand, place):
        return any(
            dim == place.dim and not _counts(index) for dim, index in _indexed(node.args[1], value_of(operand).dim())
        )
    return False


def _counts(index: fx.Node) -> bool:
    """Whether an index is 0, 1, 2, ...: an arange, or one seen in another shape."""
    while base_name(index) in (*_RESHAPES, "getitem", "to", "to_copy", "expand") and index.all_input_nodes:
        index = index.all_input_nodes[0]
    return base_name(index) == "arange"


def _dims(node: fx.Node, rank: int, default: tuple[int, ...]) -> list[int]:
    """Dimensions that the call names; all of them where it names none and has no default."""
    position = 2 if base_name(node) in ("roll", "topk") else 1
    given: Any = node.args[position] if len(node.args) > position else None
    for key in ("dim", "dims"):
        given = node.kwargs.get(key, given)
    if isinstance(given, int):
        given = [given]
    dims = given if isinstance(given, list | tuple) and given else default or range(rank)
    return [dim % rank for dim in dims if isinstance(dim, int)]


def _indexed(index: Any, rank: int) -> Iterator[tuple[int, fx.Node]]:
    """Tensors in an index, each with the dimension that it indexes."""
    parts: Sequence[Any] = index if isinstance(index, list | tuple) else [index]
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += rank - taken
        elif part is not None:
            if isinstance(part, fx.Node) and isinstance(value_of(part), Tensor):
                yield dim, part
            dim += 1


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
