"""The pass: every use of a parameter that differs becomes a base node plus a packed-delta node.

    y = linear(x, W_tuned, b)   becomes   y = linear(x, W_base, b) + bitdelta::delta_linear(x, signs, row_scale, ...)

`rewrite` copies the graph and runs `PASSES` over the copy, in order. A pass takes the context, changes the copy, and
touches only the parameters whose encoding it knows. Parameters that are the same on both sides keep their nodes; those
stored outright (`dense`) keep them too and merely get another tensor as input.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import fx

from ..encodings import Encoding, Rows, Same, Sign
from ..errors import UnsupportedError
from ..lowering import ops as _ops  # noqa: F401  registers bitdelta::
from ..lowering import torch_internals
from .context import Context, Insertion, Parameter
from .patterns import LinearUse, View, drop_bias, embedding_ids, linear_use, op_name, uses_of

log = logging.getLogger(__name__)


def rewrite(gm: fx.GraphModule, parameters: Mapping[fx.Node, Parameter]) -> tuple[fx.GraphModule, Context]:
    """Rewrite a copy of a graph of torch-level or ATen calls.

    Args:
        gm: the graph; it is not changed.
        parameters: its placeholders that are parameters.

    Returns:
        The rewritten copy and the context, which holds the tensors to call it with (see `Context`).

    Raises:
        UnsupportedError: naming parameter and op, when a use cannot be rewritten.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    for original, node in copies.items():
        torch_internals.copy_source(original, node)
    rewritten = fx.GraphModule(gm, graph)
    rewritten.meta = dict(gm.meta)
    context = Context(rewritten.graph, {copies[node]: parameter for node, parameter in parameters.items()})
    for a_pass in PASSES:
        a_pass(context)
    rewritten.graph.lint()
    rewritten.recompile()
    return rewritten, context


def substitute_base(context: Context) -> None:
    """Give every parameter its base tensor; what is stored outright gets the tuned tensor instead."""
    for node, parameter in context.parameters.items():
        encoding = parameter.encoding
        if isinstance(encoding, Same | Sign | Rows):
            if parameter.base is None:
                raise UnsupportedError(
                    f"{parameter.name} has a delta but the base has no such parameter: give the delta's own base"
                )
            context.values[node.name] = parameter.base
        else:
            context.values[node.name] = encoding.apply(torch.empty(0))
        if isinstance(encoding, Same):
            context.record(parameter, node, "base tensor, unchanged")
        elif not isinstance(encoding, Sign | Rows):
            context.record(parameter, node, "tuned tensor in place of the base's")


def split_linear(context: Context) -> None:
    """linear, addmm, mm, matmul with a parameter -> the same on the base, plus `bitdelta::delta_linear`."""
    for node, parameter, view in _encoded_uses(context):
        use = linear_use(node, view)
        sign, rows = _parts(parameter.encoding)
        if use is None or use.transposed != _is_transposed(parameter.encoding):
            continue
        grown = rows is not None and parameter.base is not None and rows.out_features != _out_features(parameter)
        late_bias = use.bias if grown else None
        if late_bias is not None:
            drop_bias(use, view)
        insert = Insertion(context.graph, use.node)
        total: fx.Node = use.node
        x = insert.call(torch.transpose, use.x, -1, -2) if use.left else use.x
        if sign is not None:
            signs, row_scale, col_scale, left, right = context.delta_inputs(parameter, sign)
            delta = insert.call(
                torch.ops.bitdelta.delta_linear.default, x, signs, row_scale, col_scale, left, right, None
            )
            if use.left:
                delta = insert.call(torch.transpose, delta, -1, -2)
            total = insert.call(operator.add, total, insert.cast(delta, use.x, use.node))
        if rows is not None:
            if use.left:
                raise UnsupportedError(
                    f"{parameter.name} stores changed rows and is the left operand of {op_name(use.node)} "
                    f"({use.node.name}), which has no form for them: let the model use F.linear there"
                )
            total = _replace_outputs(context, insert, parameter, rows, x, use, total, grown)
        if late_bias is not None:
            total = insert.call(operator.add, total, insert.cast(late_bias, late_bias, use.node))
        insert.take_over(use.node, total, same_shape=not grown)
        context.record(parameter, use.node, _describe(sign, rows, "linear"))


def split_embedding(context: Context) -> None:
    """embedding with a parameter as its table -> the same on the base, plus `bitdelta::delta_embedding`."""
    for node, parameter, view in _encoded_uses(context):
        ids = embedding_ids(node, view)
        if ids is None or _is_transposed(parameter.encoding):
            continue
        _refuse_max_norm(node, parameter)
        sign, rows = _parts(parameter.encoding)
        insert = Insertion(context.graph, node)
        lookup = ids
        assert parameter.base is not None
        if rows is not None and rows.out_features > parameter.base.shape[0]:
            # New rows are looked up below; an id past those too must stay the error that it is.
            known = insert.before(torch.clamp, ids, max=parameter.base.shape[0] - 1)
            new = insert.before(operator.lt, ids, rows.out_features)
            lookup = insert.before(torch.where, new, known, ids)
            node.replace_input_with(ids, lookup)
        total: fx.Node = node
        if sign is not None:
            signs, row_scale, col_scale, left, right = context.delta_inputs(parameter, sign)
            delta = insert.call(
                torch.ops.bitdelta.delta_embedding.default,
                lookup, signs, row_scale, col_scale, left, right, None,
                embedding_dim=sign.in_features, dtype=parameter.base.dtype,
            )  # fmt: skip
            total = insert.call(operator.add, total, delta)
        if rows is not None and rows.index.numel():
            index = context.input(parameter, "rows_index", rows.index)
            values = context.input(parameter, "rows_values", rows.values.to(parameter.base.dtype))
            found = insert.call(torch.searchsorted, index, insert.method("to", ids, torch.int64))
            at = insert.call(torch.clamp, found, max=rows.index.numel() - 1)
            hit = insert.call(operator.eq, insert.call(operator.getitem, index, at), ids)
            stored = insert.call(torch.nn.functional.embedding, at, values)
            total = insert.call(torch.where, insert.call(torch.unsqueeze, hit, -1), stored, total)
        insert.take_over(node, total)
        context.record(parameter, node, _describe(sign, rows, "embedding"))


def unpack_other_uses(context: Context) -> None:
    """Any use that no pass above has split gets the dense tuned tensor: correct, but it costs the tensor's memory."""
    for placeholder, parameter in context.parameters.items():
        if not isinstance(parameter.encoding, Sign | Rows):
            continue
        done = {use.node for use in context.uses if use.name == parameter.name}
        left = [(node, view) for node, view in uses_of(placeholder) if node.name not in done]
        if not left:
            continue
        assert parameter.base is not None
        dense = parameter.encoding.apply(parameter.base).to(parameter.base.dtype)
        log.warning(
            "%s is used by %s, which has no packed form: its dense tensor of %d bytes is kept for that",
            parameter.name, ", ".join(f"{op_name(node)} ({node.name})" for node, _ in left), dense.nbytes,
        )  # fmt: skip
        source = context.input(parameter, "dense", dense)
        for node, view in left:
            seen = source
            if view.transposed:
                with context.graph.inserting_before(node):
                    seen = context.graph.call_function(torch.transpose, (source, 0, 1))
            node.replace_input_with(view.node, seen)
            context.record(parameter, node, "dense tuned tensor")


PASSES: tuple[Callable[[Context], None], ...] = (substitute_base, split_linear, split_embedding, unpack_other_uses)


def _encoded_uses(context: Context) -> list[tuple[fx.Node, Parameter, View]]:
    """Uses of packed parameters that no pass has split yet. A call that takes two of them is left out: it needs both
    dense."""
    done = {use.node for use in context.uses}
    found = [
        (node, parameter, view)
        for placeholder, parameter in context.parameters.items()
        if isinstance(parameter.encoding, Sign | Rows)
        for node, view in uses_of(placeholder)
        if node.name not in done
    ]
    operands = Counter(node for node, _, _ in found)
    return [(node, parameter, view) for node, parameter, view in found if operands[node] == 1]


def _replace_outputs(
    context: Context,
    insert: Insertion,
    parameter: Parameter,
    rows: Rows,
    x: fx.Node,
    use: LinearUse,
    total: fx.Node,
    grown: bool,
) -> fx.Node:
    """Outputs whose rows are stored outright are computed from them; a grown matrix has new outputs at its end."""
    assert parameter.base is not None
    index = context.input(parameter, "rows_index", rows.index)
    values = context.input(parameter, "rows_values", rows.values.to(parameter.base.dtype))
    stored = insert.call(torch.nn.functional.linear, x, values)
    if use.bias is not None and not grown:
        bias = insert.call(operator.getitem, use.bias, (Ellipsis, index))
        stored = insert.call(operator.add, stored, insert.cast(bias, use.bias, use.node))
    if grown:
        total = insert.call(torch.nn.functional.pad, total, (0, rows.out_features - _out_features(parameter)))
    return insert.call(torch.index_copy, total, -1, index, stored)


def _parts(encoding: Encoding) -> tuple[Sign | None, Rows | None]:
    if isinstance(encoding, Rows):
        return encoding.over, encoding
    assert isinstance(encoding, Sign)
    return encoding, None


def _is_transposed(encoding: Encoding) -> bool:
    assert isinstance(encoding, Sign | Rows)
    return encoding.transposed


def _out_features(parameter: Parameter) -> int:
    assert parameter.base is not None
    return parameter.base.shape[1 if _is_transposed(parameter.encoding) else 0]


def _describe(sign: Sign | None, rows: Rows | None, kind: str) -> str:
    parts = [f"base {kind}"]
    if sign is not None:
        planes = "1 sign plane" if sign.planes == 1 else f"{sign.planes} sign planes"
        parts.append(f"packed-delta {kind} ({planes}{', column scales' if sign.col_scale is not None else ''})")
        if sign.rank:
            parts.append(f"rank {sign.rank}")
    if rows is not None:
        parts.append(f"{rows.index.numel()} stored rows")
    return " + ".join(parts)


def _refuse_max_norm(node: fx.Node, parameter: Parameter) -> None:
    named = dict(zip(("input", "weight", "padding_idx", "max_norm"), node.args, strict=False)) | dict(node.kwargs)
    if node.target is torch.nn.functional.embedding and named.get("max_norm") is not None:
        raise UnsupportedError(
            f"{parameter.name} is looked up with max_norm, which rewrites the table in place: "
            "remove max_norm before compiling"
        )
