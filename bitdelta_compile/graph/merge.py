"""Undoing the rewrite of an exported program, and whether two base graphs are the same.

Everything the pass puts into a graph leads back to the base node that it stands behind: `add(base, delta)` to its
first operand, the ops on stored rows to their first argument, a dense tensor to the parameter whose place it took.
Biases come out as additions of their own, which is how the pass leaves those of some products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..errors import UnsupportedError
from .patterns import base_name, bias_of, drop_bias, op_name

_ATEN = torch.ops.aten
# What the pass may put between a packed-delta node and its addition: another orientation, another dtype.
_ON_THE_WAY = (_ATEN.transpose.int, _ATEN.to.dtype, _ATEN._to_copy.default)
# Assertions on dtypes and sizes, which another export adds again.
_CHECKS = (_ATEN._assert_tensor_metadata.default, _ATEN._assert_scalar.default)
# Ops of one fine-tune whose first argument is what stood there before.
_BASE_FIRST = ("known_ids", "rows_linear", "rows_embedding")


@dataclasses.dataclass(frozen=True)
class BaseGraph:
    """The graph of a base, as torch.export captured it.

    Attributes:
        module: its placeholders are parameters, buffers, constants and the inputs of a call.
        held: placeholder name -> dotted name of the tensor that is always passed there; inputs of a call are left out.
        ranges: of the symbols in its shapes.
    """

    module: fx.GraphModule
    held: Mapping[str, str]
    ranges: Mapping[Any, Any]

    def inputs(self) -> list[fx.Node]:
        """Placeholders of the inputs of a call, in order."""
        return [node for node in self.module.graph.find_nodes(op="placeholder") if node.name not in self.held]


def held_tensors(program: ExportedProgram) -> dict[str, str]:
    """Placeholder name -> dotted name of the parameter, buffer or constant that is always passed there."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def undo(program: ExportedProgram, prefix: str, tied: Mapping[str, str]) -> BaseGraph:
    """The graph that a program was before `rewrite`; the program is not changed.

    Args:
        program: a rewritten graph, exported.
        prefix: of the dotted names of what the rewrite added.
        tied: names of parameters that are another's: alias -> canonical name. Uses of either are given to the latter,
            since the delta of one may stand for both.

    Raises:
        UnsupportedError: a node that the pass would not have put there.
    """
    held = held_tensors(program)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, copies))
    for original, node in copies.items():
        node.meta = dict(original.meta)
    placeholders = {held[node.name]: node for node in graph.find_nodes(op="placeholder") if node.name in held}
    for name, node in placeholders.items():
        stands_for = name.removeprefix(prefix).removesuffix(".dense")
        if name.startswith(prefix) and name.endswith(".dense"):
            node.replace_all_uses_with(placeholders[tied.get(stands_for, stands_for)])
        elif name in tied:
            node.replace_all_uses_with(placeholders[tied[name]])
    for node in list(graph.nodes):
        if node.target is torch.ops.bitdelta.base_linear.default:
            node.target = _ATEN.linear.default
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "bitdelta":
            _undo_call(node)
        elif (bias := bias_of(node)) is not None:
            _free_bias(graph, node, bias)
    graph.eliminate_dead_code()
    for name, node in placeholders.items():
        if name.startswith(prefix):
            if node.users:
                raise UnsupportedError(
                    f"{name} is read by {op_name(next(iter(node.users)))}, which bdc.export does not do: "
                    "merge programs as it returns them"
                )
            graph.erase_node(node)
    kept = {node.name: held[node.name] for node in placeholders.values() if not held[node.name].startswith(prefix)}
    return BaseGraph(fx.GraphModule(program.graph_module, graph), kept, program.range_constraints)


def _undo_call(node: fx.Node) -> None:
    """Give the users of a rewritten use its base node."""
    if base_name(node) in _BASE_FIRST:
        (base, *_) = node.all_input_nodes
        node.replace_all_uses_with(base)
        return
    pending = [node]
    while pending:
        value = pending.pop()
        for user in list(value.users):
            if user.target in _ON_THE_WAY:
                pending.append(user)
            elif user.target is _ATEN.add.Tensor and user.args[1] is value and isinstance(user.args[0], fx.Node):
                user.replace_all_uses_with(user.args[0])
            else:
                raise UnsupportedError(
                    f"{op_name(node)} ({node.name}) is read by {op_name(user)} ({user.name}) where bdc.export adds it "
                    "to its base node: merge programs as it returns them, before other passes"
                )


def _free_bias(graph: fx.Graph, node: fx.Node, bias: fx.Node) -> None:
    """linear and addmm with a bias -> the product and an addition, which the pass makes of some of them."""
    drop_bias(node)
    with graph.inserting_after(node):
        total = graph.call_function(_ATEN.add.Tensor, (node, bias))
    total.meta = dict(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def first_difference(one: BaseGraph, other: BaseGraph) -> str | None:
    """In what way two graphs are not the same computation, up to the names of nodes and symbols; None if they are."""
    symbols: dict[Any, Any] = {}
    nodes: dict[fx.Node, fx.Node] = {}
    ours, theirs = ([node for node in each.module.graph.nodes if _computes(node, each)] for each in (one, other))
    for mine, its in zip(_inputs_first(ours), _inputs_first(theirs), strict=False):
        difference = _node_difference(mine, its, one, other, nodes, symbols)
        if difference is not None:
            return difference
        nodes[mine] = its
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        return f"{_show(longer[min(len(ours), len(theirs))])} has no counterpart"
    for symbol, its_symbol in symbols.items():
        mine_range, its_range = one.ranges.get(symbol), other.ranges.get(its_symbol)
        if mine_range != its_range:
            return f"the dynamic size {symbol} ranges over {mine_range} in one and {its_range} in the other"
    return None


def _computes(node: fx.Node, graph: BaseGraph) -> bool:
    """Parameters and buffers that nothing reads may be on one side only."""
    return node.op != "placeholder" or bool(node.users) or node.name not in graph.held


def _inputs_first(nodes: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Symbols are introduced by the inputs of a call."""
    yield from (node for node in nodes if node.op == "placeholder")
    yield from (node for node in nodes if node.op != "placeholder")


def _node_difference(
    mine: fx.Node,
    its: fx.Node,
    one: BaseGraph,
    other: BaseGraph,
    nodes: Mapping[fx.Node, fx.Node],
    symbols: dict[Any, Any],
) -> str | None:
    if mine.op == "placeholder" or its.op == "placeholder":
        names = [graph.held.get(node.name) for graph, node in ((one, mine), (other, its))]
        if mine.op != its.op or names[0] != names[1]:
            return f"{names[0] or mine.name} on one side is {names[1] or its.name} on the other"
    elif (mine.op, mine.target) != (its.op, its.target):
        return f"{_show(mine)} on one side is {_show(its)} on the other"
    elif mine.op == "get_attr" and _code(mine, one) != _code(its, other):
        return f"{_show(mine)} is another function on the other side"
    elif not _same((mine.args, mine.kwargs), (its.args, its.kwargs), nodes, symbols):
        return f"{_show(mine)} has other arguments than {_show(its)}"
    if not _same_value(mine.meta.get("val"), its.meta.get("val"), symbols):
        return f"{_show(mine)} is {_describe(mine)} on one side and {_describe(its)} on the other"
    return None


def _code(node: fx.Node, graph: BaseGraph) -> str:
    """The code of a function that a higher-order operation takes: the body of `torch.no_grad()`, say."""
    function = getattr(graph.module, str(node.target))
    return function.code if isinstance(function, fx.GraphModule) else repr(function)


def _same(mine: Any, its: Any, nodes: Mapping[fx.Node, fx.Node], symbols: dict[Any, Any]) -> bool:
    if isinstance(mine, fx.Node):
        return nodes.get(mine) is its
    if isinstance(mine, list | tuple):
        pairs = zip(mine, its, strict=True) if isinstance(its, list | tuple) and len(mine) == len(its) else None
        return pairs is not None and all(_same(a, b, nodes, symbols) for a, b in pairs)
    if isinstance(mine, Mapping):
        return (
            isinstance(its, Mapping)
            and mine.keys() == its.keys()
            and all(_same(value, its[key], nodes, symbols) for key, value in mine.items())
        )
    if isinstance(mine, torch.SymInt) or isinstance(its, torch.SymInt):
        return _same_size(mine, its, symbols)
    return type(mine) is type(its) and bool(mine == its or (mine != mine and its != its))


def _same_value(mine: Any, its: Any, symbols: dict[Any, Any]) -> bool:
    """Whether two nodes have values of equal shape, dtype and device."""
    if isinstance(mine, Tensor) and isinstance(its, Tensor):
        return (mine.dtype, mine.device, mine.dim()) == (its.dtype, its.device, its.dim()) and all(
            _same_size(a, b, symbols) for a, b in zip(mine.shape, its.shape, strict=True)
        )
    if isinstance(mine, list | tuple) and isinstance(its, list | tuple) and len(mine) == len(its):
        return all(_same_value(a, b, symbols) for a, b in zip(mine, its, strict=True))
    if isinstance(mine, torch.SymInt | int) and isinstance(its, torch.SymInt | int):
        return _same_size(mine, its, symbols)
    return type(mine) is type(its)


def _same_size(mine: Any, its: Any, symbols: dict[Any, Any]) -> bool:
    """Whether two sizes are equal under the renaming of symbols found so far; a new pair of symbols extends it."""
    mine, its = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (mine, its))
    if not hasattr(mine, "free_symbols"):
        return bool(mine == its)
    new = getattr(mine, "is_Symbol", False) and getattr(its, "is_Symbol", False) and mine not in symbols
    if new and its not in symbols.values():
        symbols[mine] = its
    return bool(mine.xreplace(symbols) == its)


def _show(node: fx.Node) -> str:
    return f"{op_name(node)} ({node.name})"


def _describe(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else str(value)
