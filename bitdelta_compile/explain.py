"""What the backend did to a compiled model: each parameter's encoding, bytes and uses; and the graphs themselves."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from .delta import Delta
from .encodings import Encoding
from .errors import BitDeltaError
from .graph.context import STEMS_FROM, Context, Use
from .graph.patterns import op_name
from .stack import Stack


@dataclasses.dataclass(frozen=True)
class Line:
    """One parameter.

    Attributes:
        name: qualified name in the base.
        kind: of encoding; "own" for a parameter the base does not have, "stack" for the slots of many tenants.
        weights: elements of the tuned parameter.
        tuned_bytes: of the tuned parameter, dense.
        delta_bytes: of its encoding.
        actions: what became of its uses, without repeats.
    """

    name: str
    kind: str
    weights: int
    tuned_bytes: int
    delta_bytes: int
    actions: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node of a rewritten graph as text, and the node of the original graph that it stems from."""

    text: str
    stems_from: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Graph:
    """One compiled graph, kept for as long as a parameter of it lives; of tensors only what there is to say."""

    nodes: tuple[_Node, ...]
    uses: tuple[Use, ...]
    lines: tuple[Line, ...]


_graphs: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> list[_Graph]
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> its name in the base or delta


def remember(context: Context, example_inputs: Sequence[Any]) -> None:
    """Keep what was done to a graph, under the parameters that the caller's model passes."""
    names = context.input_names()
    nodes = tuple(
        _Node(_assignment(node, names), node.meta.get(STEMS_FROM, node.name))
        for node in context.graph.nodes
        if node.op not in ("placeholder", "output")
    )
    encodings = {parameter.name: parameter.encoding for parameter in context.parameters.values()}
    lines = tuple(_line(name, encoding) for name, encoding in encodings.items())
    record = _Graph(nodes, tuple(context.uses), lines)
    bound = {node.name: parameter.name for node, parameter in context.parameters.items()}
    for node, value in zip(context.graph.find_nodes(op="placeholder"), example_inputs, strict=False):
        if isinstance(value, nn.Parameter):
            _graphs.setdefault(value, []).append(record)
            if node.name in bound:
                _known[value] = bound[node.name]


class Explanation:
    """What became of each parameter. `str()` is a table; `graph()` is the rewritten graph, or one layer of it."""

    def __init__(self, lines: Sequence[Line], graphs: Sequence[_Graph] = ()) -> None:
        self.lines = tuple(lines)
        self._graphs = tuple(graphs)

    @property
    def tuned_bytes(self) -> int:
        """Bytes of the tuned parameters, dense."""
        return sum(line.tuned_bytes for line in self.lines)

    @property
    def delta_bytes(self) -> int:
        """Bytes of their encodings."""
        return sum(line.delta_bytes for line in self.lines)

    def graph(self, layer: str | None = None) -> str:
        """The rewritten graphs as text, one node a line.

        Args:
            layer: only what belongs to the parameters whose names begin so, such as "encoder.layer.0.attention".
        """
        return "\n\n".join(text for graph in self._graphs if (text := _text(graph, layer)))

    def __str__(self) -> str:
        rows = [("parameter", "encoding", "weights", "tuned bytes", "delta bytes", "in the graph")]
        for line in self.lines:
            figures = (f"{line.weights:,}", f"{line.tuned_bytes:,}", f"{line.delta_bytes:,}")
            rows.append((line.name, line.kind, *figures, "; ".join(line.actions)))
        weights = sum(line.weights for line in self.lines)
        rows.append(("all", "", f"{weights:,}", f"{self.tuned_bytes:,}", f"{self.delta_bytes:,}", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        numeric = (2, 3, 4)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in numeric else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


def explain(subject: nn.Module | Delta) -> Explanation:
    """What was rewritten, encoded how, in how many bytes.

    Args:
        subject: a model compiled with backend "bitdelta", or one with tenants attached, that has run; or a delta.

    Raises:
        BitDeltaError: no graph of the model has been compiled yet.
    """
    if isinstance(subject, Delta):
        return Explanation([_line(name, encoding) for name, encoding in subject.encodings.items()])
    model = getattr(subject, "_orig_mod", subject)
    graphs: list[_Graph] = []
    for parameter in model.parameters():
        graphs.extend(graph for graph in _graphs.get(parameter, ()) if graph not in graphs)
    if not graphs:
        raise BitDeltaError('nothing to explain yet: compile the model with backend="bitdelta" and call it once')
    known = {line.name: line for graph in graphs for line in graph.lines}
    uses: dict[str, dict[str, None]] = {name: {} for name in known}
    for use in (use for graph in graphs for use in graph.uses):
        uses.get(use.name, {})[use.action] = None
    lines = [dataclasses.replace(line, actions=tuple(uses[name])) for name, line in known.items()]
    lines += [
        Line(name, "own", parameter.numel(), parameter.nbytes, parameter.nbytes, ("the model's own tensor",))
        for name, parameter in model.named_parameters()
        if parameter not in _known
    ]
    return Explanation(lines, graphs)


def _line(name: str, encoding: Encoding | Stack) -> Line:
    weights = math.prod(encoding.shape)
    return Line(name, encoding.kind, weights, weights * encoding.dtype.itemsize, encoding.nbytes)


def _text(graph: _Graph, layer: str | None) -> str:
    """Nodes of a graph, one a line; with `layer`, the uses of its parameters and what was added to them."""
    if layer is None:
        return "\n".join(node.text for node in graph.nodes)
    prefix = layer.rstrip(".")
    wanted = {use.node for use in graph.uses if use.name == prefix or use.name.startswith(prefix + ".")}
    return "\n".join(node.text for node in graph.nodes if node.stems_from in wanted)


def _assignment(node: fx.Node, names: Mapping[str, str]) -> str:
    """`name = op(arguments)`, with parameters by their qualified names."""
    arguments = [_operand(arg, names) for arg in node.args]
    if node.target is operator.add and len(arguments) == 2:
        return f"{node.name} = {arguments[0]} + {arguments[1]}"
    while arguments and arguments[-1] == "None":
        arguments.pop()
    arguments += [f"{key}={_operand(arg, names)}" for key, arg in node.kwargs.items()]
    return f"{node.name} = {op_name(node)}({', '.join(arguments)})"


def _operand(arg: Any, names: Mapping[str, str]) -> str:
    if isinstance(arg, fx.Node):
        return names.get(arg.name, arg.name)
    if isinstance(arg, list | tuple):
        return f"({', '.join(_operand(each, names) for each in arg)})"
    return repr(arg)
