"""The pass: every use of a parameter that differs becomes a base node plus a packed-delta node.

    y = linear(x, W_tuned, b)   becomes   y = linear(x, W_base, b) + bitdelta::delta_linear(x, signs, row_scale, ...)

`rewrite` copies the graph and runs `PASSES` over the copy, in order. A pass takes the context, changes the copy, and
touches only the parameters whose encoding it knows. Parameters that are the same on both sides keep their nodes. For
one fine-tune, those stored outright (`dense`) keep them too and merely get another tensor as input; for many, each row
selects its own (`spread.py`).
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..encodings import Rows, Same, Sign
from ..errors import UnsupportedError
from ..kernels.layout import CANONICAL
from ..lowering import composite as _composite  # noqa: F401  registers bitdelta::
from ..lowering import ops as _ops  # noqa: F401  registers bitdelta::
from ..lowering import torch_internals
from ..quantized import values
from ..stack import Stack
from .batch import Batch, Lost, Place, RowsAt, value_of
from .context import Context, Insertion, NoRowForm, Parameter
from .patterns import LinearUse, View, base_name, bias_of, drop_bias, embedding_ids, linear_use, op_name, uses_of
from .spread import KEEP_OUTPUTS, refuse_max_norm, select_small, spread_rows

log = logging.getLogger(__name__)

_bitdelta = torch.ops.bitdelta


def rewrite(
    gm: fx.GraphModule,
    parameters: Mapping[fx.Node, Parameter],
    batch: Batch | None = None,
    *,
    exact: bool = False,
) -> tuple[fx.GraphModule, Context]:
    """Rewrite a copy of a graph of torch-level or ATen calls.

    Args:
        gm: the graph; it is not changed.
        parameters: its placeholders that are parameters.
        batch: for many tenants: the batch, whose every row may have its own; the copy takes the row index, int32
            [batch], as the first of the inputs added.
        exact: no delta of a linear is rounded to the precision of its operand (see `delta_linear`).

    Returns:
        The rewritten copy and the context, which holds the tensors to call it with (see `Context`).

    Raises:
        UnsupportedError: naming parameter and op, when a use cannot be rewritten.
        NoRowForm: the same, when one fine-tune could have it but not every row its own.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, copies))
    for original, node in copies.items():
        torch_internals.copy_source(original, node)
    rewritten = fx.GraphModule(gm, graph)
    rewritten.meta = dict(gm.meta)
    context = Context(
        rewritten.graph, {copies[node]: parameter for node, parameter in parameters.items()}, batch, exact
    )
    for a_pass in PASSES:
        a_pass(context)
    rewritten.graph.lint()
    rewritten.recompile()
    return rewritten, context


def rewrite_for_rows(
    gm: fx.GraphModule, parameters: Mapping[fx.Node, Parameter], batch: Batch, *, exact: bool = False
) -> tuple[fx.GraphModule, Context, dict[str, str]]:
    """`rewrite` for many tenants, where a parameter that no tenant changes may stay the base's.

    Returns:
        As `rewrite`, and the parameters that no row can have of its own: name -> why.

    Raises:
        NoRowForm: such a parameter that some tenant changes.
    """
    refused: dict[str, str] = {}
    while True:
        kept = {node: parameter for node, parameter in parameters.items() if parameter.name not in refused}
        try:
            return *rewrite(gm, kept, batch, exact=exact), refused
        except NoRowForm as error:
            if error.parameter.tenants:
                raise
            refused[error.parameter.name] = str(error)
            log.info("%s; no tenant changes it", error)


def substitute_base(context: Context) -> None:
    """Give every parameter its base tensor; for one fine-tune, what is stored outright gets the tuned tensor."""
    for node, parameter in context.parameters.items():
        encoding = parameter.encoding
        if isinstance(encoding, Same | Sign | Rows | Stack):
            if parameter.base is None:
                raise UnsupportedError(
                    f"{parameter.name} has a delta but the base has no such parameter: give the delta's own base"
                )
            context.values[node.name] = parameter.base
        else:
            context.values[node.name] = encoding.apply(torch.empty(0))
        if isinstance(encoding, Same):
            context.record(parameter, node, "base tensor, unchanged")
        elif not isinstance(encoding, Sign | Rows | Stack):
            context.record(parameter, node, "tuned tensor in place of the base's")


def free_biases(context: Context) -> None:
    """linear and addmm with a bias that rows select -> the product, and an addition that can be done per row."""
    selected = {
        node
        for node, parameter in context.parameters.items()
        if isinstance(parameter.encoding, Stack) and parameter.encoding.small is not None
    }
    for node in list(context.graph.nodes) if context.per_row else ():
        bias = bias_of(node)
        if bias in selected:
            drop_bias(node)
            insert = Insertion(context, node)
            insert.take_over(node, insert.call(operator.add, node, insert.cast(bias, bias, node)))


def split_linear(context: Context) -> None:
    """linear, addmm, mm, matmul with a parameter -> the same on the base, plus `bitdelta::delta_linear`."""
    for node, parameter, stack, view in _packed_uses(context):
        use = linear_use(node, view)
        if use is None or use.transposed != stack.transposed:
            continue
        grown = stack.out_features not in (0, stack.base_rows)
        outright = grown or stack.rows_index is not None or stack.dense is not None
        late_bias = use.bias if outright else None
        if late_bias is not None:
            drop_bias(node)
        insert = Insertion(context, node)
        rows = _RowsFirst(context, insert, parameter, _place_of_x(context, use))
        x = rows.first(insert.call(torch.transpose, use.x, -1, -2) if use.left else use.x)
        total = node
        if stack.signs is not None:
            packed = context.inputs(parameter, stack, "signs", "row_scale", "col_scale", "left", "right")
            options = _layout_of(stack) | ({"exact": True} if context.exact else {})
            delta = insert.call(_bitdelta.delta_linear.default, x, *packed, context.tenant, **options)
            if use.left:
                delta = insert.call(torch.transpose, delta, -1, -2)
            total = insert.call(operator.add, total, insert.cast(delta, use.x, node))
        if outright:
            if use.left:
                raise UnsupportedError(
                    f"{parameter.name} stores changed rows and is the left operand of {op_name(use.node)} "
                    f"({use.node.name}), which has no form for them: let the model use F.linear there"
                )
            total = rows.first(total) if total is node else total
            total = _outright(context, insert, parameter, stack, x, total)
        if late_bias is not None:
            total = insert.call(operator.add, total, _padded(context, insert, late_bias, stack, node))
        rows.take_over(total, same_shape=not grown)
        for key in ("example_value", "val") if grown else ():
            if isinstance(value := node.meta.get(key), torch.Tensor):
                total.meta[key] = value.new_empty((*value.shape[:-1], stack.out_features))
        if grown and context.tenant is not None:
            _mask_logits(context, parameter, stack, total)
        context.record(parameter, node, _describe(stack, "linear"))


def split_embedding(context: Context) -> None:
    """embedding with a parameter as its table -> the same on the base, plus `bitdelta::delta_embedding`."""
    for node, parameter, stack, view in _packed_uses(context):
        ids = embedding_ids(node, view)
        if ids is None or stack.transposed:
            continue
        refuse_max_norm(node, parameter)
        insert = Insertion(context, node)
        rows = _RowsFirst(context, insert, parameter, context.places.get(ids))
        total, here, lookup = node, ids, ids
        if rows.lifts:
            here = lookup = insert.before(_bitdelta.over_rows.default, ids, context.tenant)
            node.replace_input_with(ids, here)
            context.lifted[node] = parameter
        if stack.vocabulary is not None:
            (vocabulary,) = context.inputs(parameter, stack, "vocabulary")
            lookup = insert.before(_bitdelta.known_ids.default, here, stack.base_rows, vocabulary, context.tenant)
            node.replace_input_with(here, lookup)
        if stack.signs is not None:
            packed = context.inputs(parameter, stack, "signs", "row_scale", "col_scale", "left", "right")
            sizes = {"embedding_dim": stack.in_features, "dtype": stack.dtype} | _layout_of(stack)
            delta = insert.call(_bitdelta.delta_embedding.default, lookup, *packed, context.tenant, **sizes)
            total = insert.call(operator.add, total, delta)
        if stack.rows_index is not None:
            stored = context.inputs(parameter, stack, "rows_index", "rows_values")
            total = insert.call(_bitdelta.rows_embedding.default, total, here, *stored, context.tenant)
        if stack.dense is not None:
            dense = context.inputs(parameter, stack, "dense", "place")
            total = insert.call(_bitdelta.dense_embedding.default, total, here, *dense, context.tenant)
        rows.take_over(total)
        context.record(parameter, node, _describe(stack, "embedding"))


def unpack_other_uses(context: Context) -> None:
    """Any use that no pass above has split gets the dense tuned tensor: correct, but it costs the tensor's memory.

    With many tenants it would cost that for each: such a use is refused.
    """
    for placeholder, parameter in context.parameters.items():
        stack = context.stack(parameter)
        if stack is None or not stack.packed:
            continue
        done = {use.node for use in context.uses if use.name == parameter.name}
        left = [(node, view) for node, view in uses_of(placeholder) if node.name not in done]
        if not left:
            continue
        encoding, base = parameter.encoding, parameter.base
        assert base is not None
        if isinstance(encoding, Stack):
            raise NoRowForm(parameter, left[0][0], "there is no packed form for it")
        dense = encoding.apply(values(base)).to(base.dtype)
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


PASSES: tuple[Callable[[Context], None], ...] = (
    substitute_base,
    free_biases,
    split_linear,
    split_embedding,
    unpack_other_uses,
    select_small,
    spread_rows,
)


def _packed_uses(context: Context) -> list[tuple[fx.Node, Parameter, Stack, View]]:
    """Uses of packed parameters that no pass has split yet. A call that takes two of them is left out: it needs both
    dense."""
    done = {use.node for use in context.uses}
    found = [
        (node, parameter, stack, view)
        for placeholder, parameter in context.parameters.items()
        if (stack := context.stack(parameter)) is not None and stack.packed
        for node, view in uses_of(placeholder)
        if node.name not in done
    ]
    operands = Counter(node for node, *_ in found)
    return [use for use in found if operands[use[0]] == 1]


class _RowsFirst:
    """The rows of an operand, which the ops want in front.

    For one fine-tune or a batch of one row there is nothing to do. An operand that is the same for every row is given
    once per row, and what is computed from it is `lifted`.
    """

    def __init__(self, context: Context, insert: Insertion, parameter: Parameter, place: Place) -> None:
        self.context, self.insert, self.parameter = context, insert, parameter
        self.lifts = context.per_row and place is None
        if not context.per_row or place is None:
            return
        if isinstance(place, Lost):
            raise NoRowForm(parameter, insert.first, f"rows cannot be told apart since {place.op} ({place.node})")
        if place.dim:
            raise NoRowForm(
                parameter, insert.first, f"its operand has the batch in dimension {place.dim}, not in front"
            )

    def first(self, value: fx.Node) -> fx.Node:
        """`value` with its rows in front."""
        return self.insert.call(_bitdelta.over_rows.default, value, self.context.tenant) if self.lifts else value

    def take_over(self, result: fx.Node, *, same_shape: bool = True) -> None:
        """Hand the users of the original call to `result`."""
        self.insert.take_over(self.insert.first, result, same_shape=same_shape)
        if self.lifts:
            self.context.lifted.update(dict.fromkeys([*self.insert.added, result], self.parameter))


def _layout_of(stack: Stack) -> dict[str, Any]:
    """The argument that says so where signs are not in the canonical layout."""
    layout = stack.sign_layout
    return {} if layout == CANONICAL else {"layout": layout}


def _place_of_x(context: Context, use: LinearUse) -> Place:
    place = context.places.get(use.x)
    if not isinstance(place, RowsAt) or not use.left:
        return place
    last = value_of(use.x).dim() - 1
    return RowsAt({last: last - 1, last - 1: last}.get(place.dim, place.dim), place.merged)


def _outright(
    context: Context,
    insert: Insertion,
    parameter: Parameter,
    stack: Stack,
    x: fx.Node,
    total: fx.Node,
) -> fx.Node:
    """Outputs of matrices, or of rows of them, that are stored outright."""
    if stack.dense is not None:
        dense = context.inputs(parameter, stack, "dense", "place")
        total = insert.call(_bitdelta.dense_linear.default, total, x, *dense, context.tenant)
    if stack.rows_index is None:
        if stack.out_features not in (0, stack.base_rows):
            total = insert.call(torch.nn.functional.pad, total, (0, stack.out_features - stack.base_rows))
        return total
    stored = context.inputs(parameter, stack, "rows_index", "rows_values")
    sizes = {"out_features": stack.out_features}
    return insert.call(_bitdelta.rows_linear.default, total, x, *stored, context.tenant, **sizes)


def _padded(context: Context, insert: Insertion, bias: fx.Node, stack: Stack, product: fx.Node) -> fx.Node:
    """The bias, added late; one that has not grown with its matrix has zeros for the new outputs."""
    value = context.values.get(bias.name, value_of(bias))
    outputs = stack.out_features or stack.base_rows
    missing = outputs - int(value.shape[-1]) if isinstance(value, torch.Tensor) else 0
    padded = insert.call(torch.nn.functional.pad, bias, (0, missing)) if missing else bias
    return insert.cast(padded, bias, product)


def _mask_logits(context: Context, parameter: Parameter, stack: Stack, head: fx.Node) -> None:
    """Mask what the graph returns of a head's outputs: rows have no logits past their own tenant's vocabulary.

    At the graph's output, because what lies between (a softcap) may undo it.
    """
    (vocabulary,) = context.inputs(parameter, stack, "vocabulary")
    pending, seen = [head], {head}
    while pending:
        node = pending.pop()
        for user in list(node.users):
            if user.op == "output":
                insert = Insertion(context, node)
                masked = insert.call(_bitdelta.mask_vocabulary.default, node, vocabulary, context.tenant)
                context.places[masked] = RowsAt(0)
                user.replace_input_with(node, masked)
            elif base_name(user) not in KEEP_OUTPUTS:
                if isinstance(value_of(user), torch.Tensor) and user is not head:
                    why = "it would see logits of tokens that a row's tenant does not have"
                    raise NoRowForm(parameter, user, why)
            elif user not in seen:
                seen.add(user)
                pending.append(user)


def _describe(stack: Stack, kind: str) -> str:
    parts = [f"base {kind}"]
    if stack.signs is not None:
        planes = "1 sign plane" if stack.planes == 1 else f"{stack.planes} sign planes"
        parts.append(f"packed-delta {kind} ({planes}{', column scales' if stack.col_scale is not None else ''})")
        if stack.rank:
            parts.append(f"rank {stack.rank}")
    if stack.stored_rows:
        parts.append(f"{stack.stored_rows} stored rows")
    if stack.dense is not None:
        parts.append(f"{stack.dense.shape[0]} dense tensors")
    return " + ".join(parts)
