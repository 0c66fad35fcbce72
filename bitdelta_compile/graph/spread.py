"""Small parameters that every row selects, and what follows where a value had no rows before.

`select_small` gives the uses of a norm weight, a bias, a small table the tensors of the rows' tenants: [R, *shape].
Such a value is lifted: it has a dimension for the rows that the graph around it does not expect. `spread_rows` follows
lifted values through the graph, with one rule per kind of operation, until they meet a value that has the rows already.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedError
from .batch import Lost, RowsAt, value_of
from .context import Context, Insertion, NoRowForm, Parameter
from .patterns import base_name, embedding_ids, is_in_place, uses_of

_bitdelta = torch.ops.bitdelta

ELEMENTWISE = frozenset([
    "add", "sub", "rsub", "mul", "div", "truediv", "pow", "where", "maximum", "minimum", "clamp", "neg", "abs",
    "exp", "log", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "relu", "gelu", "silu", "softplus", "square",
    "to", "to_copy", "float", "half", "bfloat16", "double", "long", "int", "bool", "type", "type_as", "detach",
    "clone", "contiguous", "dropout", "alias", "masked_fill", "logical_not", "eq", "ne", "lt", "le", "gt", "ge",
    "cos", "sin", "erf",
])  # fmt: skip
KEEP_OUTPUTS = ELEMENTWISE | {"getitem", "slice", "index"}  # what may stand between a head and the logits returned

Rule = Callable[[Context, Insertion, fx.Node], fx.Node]


def select_small(context: Context) -> None:
    """Uses of a parameter that every slot stores outright -> uses of the tensors that the rows select."""
    for placeholder, parameter in context.parameters.items():
        stack = context.stack(parameter)
        if stack is None or stack.small is None or not placeholder.users:
            continue
        small = context.input(parameter, "small", stack.small)
        if context.per_row:
            _select_lookups(context, placeholder, parameter, small)
        if placeholder.users:
            first = next(node for node in context.graph.nodes if node in placeholder.users)
            with context.graph.inserting_before(first):
                chosen = context.graph.call_function(_bitdelta.select.default, (small, context.tenant))
                if context.per_row:
                    context.lifted[chosen] = parameter
                else:
                    chosen = context.graph.call_function(operator.getitem, (chosen, 0))
            chosen.meta.update(
                {key: placeholder.meta[key] for key in ("example_value", "val") if key in placeholder.meta}
            )
            placeholder.replace_all_uses_with(chosen)
        context.record(parameter, placeholder, "each row's own tensor")


def _select_lookups(context: Context, placeholder: fx.Node, parameter: Parameter, small: fx.Node) -> None:
    """Lookups in a small table read the row's table where it lies."""
    for node, view in uses_of(placeholder):
        ids = embedding_ids(node, view)
        place = context.places.get(ids) if ids is not None else None
        if ids is None or isinstance(place, Lost) or (isinstance(place, RowsAt) and place.dim):
            continue
        refuse_max_norm(node, parameter)
        insert = Insertion(context, node)
        if place is None:
            ids = insert.call(_bitdelta.over_rows.default, ids, context.tenant)
        found = insert.call(_bitdelta.select_embedding.default, ids, small, context.tenant)
        insert.take_over(node, found)
        context.graph.erase_node(node)
        if place is None:
            context.lifted.update(dict.fromkeys(insert.added, parameter))


def refuse_max_norm(node: fx.Node, parameter: Parameter) -> None:
    """Refuse lookups that write to the table."""
    named = dict(zip(("input", "weight", "padding_idx", "max_norm"), node.args, strict=False)) | dict(node.kwargs)
    if node.target is torch.nn.functional.embedding and named.get("max_norm") is not None:
        raise UnsupportedError(
            f"{parameter.name} is looked up with max_norm, which rewrites the table in place: "
            "remove max_norm before compiling"
        )


def spread_rows(context: Context) -> None:
    """Every operation on a lifted value -> the same for each row."""
    for node in list(context.graph.nodes) if context.lifted else ():
        operands = _lifted(context, node)
        if not operands or node in context.lifted:
            if node.target is _bitdelta.over_rows.default and operands:  # its operand has come by its rows already
                node.replace_all_uses_with(operands[0])
                context.graph.erase_node(node)
            continue
        parameter, name = context.lifted[operands[0]], base_name(node)
        if name in ("to", "type_as") and node.args[0] not in operands:  # only its dtype matters
            continue
        lost = [place for each in (*node.all_input_nodes, node) if isinstance(place := context.places.get(each), Lost)]
        if lost:
            raise NoRowForm(parameter, node, f"rows cannot be told apart since {lost[0].op} ({lost[0].node})")
        if node.op == "output":
            _return_rows(context, node, operands)
            continue
        rule = _elementwise if name in ELEMENTWISE else RULES.get(name)
        if rule is None:
            raise NoRowForm(parameter, node, "there is no rule for this operation")
        insert = Insertion(context, node)
        tensor = isinstance(value_of(node), torch.Tensor)
        result = rule(context, insert, node)
        insert.take_over(node, result)
        if tensor and not isinstance(context.places.get(node), RowsAt):
            context.lifted.update(dict.fromkeys([*insert.added, result], parameter))
        if result is not node and not node.users:
            context.graph.erase_node(node)


def _return_rows(context: Context, output: fx.Node, operands: Sequence[fx.Node]) -> None:
    """A lifted value that the graph returns leads with the rows if it led with a dimension of one."""
    for operand in operands:
        value = value_of(operand)
        if value is None or not value.dim() or value.shape[0] != 1:
            raise NoRowForm(context.lifted[operand], output, "the result that it returns has no dimension for the rows")
        insert = Insertion(context, operand)
        output.replace_input_with(operand, insert.call(torch.flatten, operand, 0, 1))


def _lifted(context: Context, node: fx.Node) -> list[fx.Node]:
    return [operand for operand in node.all_input_nodes if operand in context.lifted]


def _elementwise(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    if base_name(node) in ("to", "type_as"):  # the other operand is there for its dtype
        return node
    value, operands, in_place = value_of(node), _lifted(context, node), is_in_place(node)
    rank = value.dim()
    like = next((each for each in node.all_input_nodes if isinstance(context.places.get(each), RowsAt)), None)
    if in_place and node.args[0] not in (*operands, like):
        raise NoRowForm(context.lifted[operands[0]], node, "it writes to a value that is the same for every row")
    for operand in operands:
        if like is not None:
            place = context.places[like]
            assert isinstance(place, RowsAt)
            own = value_of(operand)
            at = place.dim - value_of(like).dim() + own.dim()
            if at >= 0 and own.shape[at] != 1:
                raise NoRowForm(context.lifted[operand], node, f"it varies along the batch, dimension {place.dim}")
            shaped = insert.before(_bitdelta.along_rows.default, operand, like, place.dim, rank)
        elif value_of(operand).dim() < rank:
            shaped = insert.before(operator.getitem, operand, _spaced(rank - value_of(operand).dim()))
        else:
            continue
        node.replace_input_with(operand, shaped)
    # A tensor of no dimensions leaves the dtype of the others as it is; with a dimension for the rows it does not.
    if not in_place and any(
        value_of(operand).dim() == 0 and value_of(operand).dtype != value.dtype for operand in operands
    ):
        return insert.call(torch.Tensor.to, node, value.dtype)
    return node


def _spaced(count: int) -> tuple[Any, ...]:
    """The index that puts `count` dimensions behind the rows."""
    return (slice(None), *[None] * count)


def _sizes(context: Context, node: fx.Node) -> tuple[Any, ...]:
    """Sizes or dimensions that a call is given, one by one or as a list."""
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    for key in ("size", "shape", "dims"):
        given = given or node.kwargs.get(key, ())  # type: ignore[assignment]
    sizes = tuple(given)
    if not all(isinstance(value_of(each) if isinstance(each, fx.Node) else each, int | torch.SymInt) for each in sizes):
        raise NoRowForm(context.lifted[_lifted(context, node)[0]], node, "its sizes are no integers")
    return sizes


def _permute(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    rank, dims = value_of(node).dim(), _sizes(context, node)
    return insert.call(torch.permute, node.args[0], (0, *[dim % rank + 1 for dim in dims]))


def _shift(*names: str, defaults: tuple[int, ...] = (), grows: bool = False) -> Rule:
    """A call that names dimensions first, by these names."""

    def rule(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
        rank = value_of(node.args[0]).dim() + grows  # type: ignore[arg-type]
        named = dict(zip(names, defaults, strict=False)) | dict(zip(names, node.args[1:], strict=False))
        dims = [node.kwargs.get(name, named.get(name)) for name in names]
        if not all(isinstance(dim, int) for dim in dims):
            raise NoRowForm(context.lifted[_lifted(context, node)[0]], node, "its dimensions are no integers")
        node.args = (node.args[0], *[dim % rank + 1 for dim in dims], *node.args[1 + len(names) :])
        node.kwargs = {name: value for name, value in node.kwargs.items() if name not in names}
        return node

    return rule


def _reshape(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    sizes = _sizes(context, node)
    rows = insert.before(torch.ops.aten.sym_size.int, context.tenant, 0)
    return insert.call(torch.reshape, node.args[0], (rows, *sizes))


def _expand(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    source, sizes, place, value = node.args[0], _sizes(context, node), context.places.get(node), value_of(node)
    own = value_of(source)  # type: ignore[arg-type]
    more = value.dim() - own.dim()
    if isinstance(place, RowsAt):
        if place != RowsAt(0) or (not more and own.shape[0] != 1):
            raise NoRowForm(context.lifted[source], node, "it has no place for the rows")  # type: ignore[index]
        shaped = insert.call(operator.getitem, source, _spaced(more - 1) if more else (slice(None), 0))
        return insert.call(torch.Tensor.expand, shaped, *sizes)
    rows = insert.before(torch.ops.aten.sym_size.int, context.tenant, 0)
    return insert.call(torch.Tensor.expand, insert.call(operator.getitem, source, _spaced(more)), rows, *sizes)


def _size(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    if len(node.args) > 1 or node.kwargs:
        return _shift("dim")(context, insert, node)
    return insert.call(operator.getitem, node, slice(1, None))


def _getitem(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    source, index = node.args
    parts = index if isinstance(index, tuple) else (index,)
    if source not in context.lifted or any(isinstance(part, fx.Node | list) for part in parts):
        raise NoRowForm(context.lifted[_lifted(context, node)[0]], node, "it is indexed by tensors")
    node.args = (source, (slice(None), *parts))
    return node


def _norm(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    """layer_norm and rms_norm: weight and bias are applied afterwards, per row."""
    layer = base_name(node) == "layer_norm"
    names = ("input", "normalized_shape", "weight", *(("bias",) if layer else ()), "eps")
    named: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, bias = named["input"], named.get("weight"), named.get("bias")
    if x in context.lifted and not any(each in context.lifted for each in (weight, bias)):
        return node
    wide = insert.call(torch.Tensor.to, x, torch.promote_types(value_of(x).dtype, torch.float32))
    shape, eps = named["normalized_shape"], named.get("eps", 1e-5 if layer else None)
    function: Any = torch.nn.functional.layer_norm if layer else torch.nn.functional.rms_norm
    if eps is None:
        eps = torch.finfo(value_of(x).dtype).eps
    y = insert.call(function, wide, shape, **{"eps": eps})
    shaped = [_along(context, insert, each, x, node) for each in (weight, bias)]
    return insert.call(_bitdelta.affine.default, y, x, *shaped)


def _along(context: Context, insert: Insertion, value: Any, x: fx.Node, node: fx.Node) -> Any:
    if value not in context.lifted:
        return value
    rank, place = value_of(node).dim(), context.places.get(x)
    if isinstance(place, RowsAt):
        return insert.call(_bitdelta.along_rows.default, value, x, place.dim, rank)
    return insert.call(operator.getitem, value, _spaced(rank - value_of(value).dim()))


def _matmul(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    """linear, matmul, mm with a lifted matrix on the right, a lifted value on the left, or a lifted bias."""
    linear = base_name(node) == "linear"
    named: dict[str, Any] = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
    x, bias = named["input"], named.get("bias")
    weight = next(named[name] for name in ("weight", "other", "mat2") if name in named)
    parameter, place = context.lifted[_lifted(context, node)[0]], context.places.get(x)
    if weight in context.lifted:
        if value_of(weight).dim() != 2 or (isinstance(place, RowsAt) and (place.dim or value_of(x).dim() < 2)):
            raise NoRowForm(parameter, node, "its operand does not lead with the batch")
        if x not in context.lifted and place is None:
            x = insert.call(_bitdelta.over_rows.default, x, context.tenant)
        matrix = insert.call(torch.transpose, weight, -1, -2) if linear else weight
        product = insert.call(_bitdelta.matmul_rows.default, x, matrix)
    else:
        if x in context.lifted and (value_of(weight).dim() != 2 or context.places.get(weight) is not None):
            raise NoRowForm(parameter, node, "it multiplies batches of matrices")
        product = insert.call(torch.nn.functional.linear if linear else torch.matmul, x, weight)
    if bias is None:
        return product
    return insert.call(operator.add, product, _along(context, insert, bias, named["input"], node))


def _transpose_matrix(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    rank = value_of(node).dim()
    if rank > 2 and base_name(node) != "mT" and node.args[-1] != "mT":
        raise NoRowForm(context.lifted[_lifted(context, node)[0]], node, f"it reverses {rank} dimensions")
    return insert.call(torch.transpose, node.args[0], -1, -2) if rank > 1 else insert.call(torch.clone, node.args[0])


def _getattr(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    if node.args[1] in ("T", "mT"):
        return _transpose_matrix(context, insert, node)
    if node.args[1] == "shape":
        return insert.call(operator.getitem, node, slice(1, None))
    if node.args[1] in ("dtype", "device"):
        return node
    raise NoRowForm(context.lifted[_lifted(context, node)[0]], node, f"there is no rule for .{node.args[1]}")


def _attention(context: Context, insert: Insertion, node: fx.Node) -> fx.Node:
    """A bias of the attention scores that was [1, heads, queries, keys]; queries, keys and values have the rows."""
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    for operand in _lifted(context, node):
        value = value_of(operand)
        if operand is not mask or value.dim() != 4 or value.shape[0] != 1 or context.places.get(node) != RowsAt(0):
            raise NoRowForm(context.lifted[operand], node, "it is no bias of the scores of a batch")
        node.replace_input_with(operand, insert.before(torch.flatten, operand, 0, 1))
    return node


RULES: dict[str, Rule] = {
    "scaled_dot_product_attention": _attention,
    "permute": _permute,
    "transpose": _shift("dim0", "dim1"),
    "swapaxes": _shift("axis0", "axis1"),
    "unsqueeze": _shift("dim", grows=True),
    "flatten": _shift("start_dim", "end_dim", defaults=(0, -1)),
    "select": _shift("dim"),
    "slice": _shift("dim", defaults=(0,)),
    "size": _size,
    "sym_size": _size,
    "view": _reshape,
    "reshape": _reshape,
    "unsafe_view": _reshape,
    "expand": _expand,
    "broadcast_to": _expand,
    "getitem": _getitem,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "linear": _matmul,
    "matmul": _matmul,
    "mm": _matmul,
    "t": _transpose_matrix,
    "numpy_T": _transpose_matrix,
    "mT": _transpose_matrix,
    "getattr": _getattr,
}
