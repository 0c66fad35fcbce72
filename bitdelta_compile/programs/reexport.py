"""A rewritten graph as a program again, for one fine-tune or for many.

    rewrite -> module with the base's call signature -> torch.export

The export turns every call that the passes insert into ATen or an op of ours, and gives the added tensors names in the
signature: `bitdelta.<parameter>.<field>` beside the base's own parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from ..graph.batch import Batch, value_of
from ..graph.context import Context, Parameter
from ..graph.merge import BaseGraph
from ..graph.patterns import stored_transposed
from ..graph.rewrite import rewrite_for_rows
from ..quantized import is_quantized
from ..serve.bank import Bank
from ..stack import Stack
from .program import METADATA, PREFIX, TENANT, About, described


def for_rows(
    program: ExportedProgram, graph: BaseGraph, bank: Bank, about: About, *, exact: bool = False
) -> ExportedProgram:
    """A program for all tenants of a bank, with the row index as an input.

    Args:
        program: has the base's parameters and call signature, and example inputs.
        graph: of its base.
        bank: its tensors become the program's.
        about: what the result says of itself, but for tenants and encodings.
        exact: as of `rewrite`.

    Raises:
        UnsupportedError: a batch of fixed size; a parameter that differs between tenants and cannot be chosen per row.
    """
    args, kwargs = _examples(program)
    if TENANT in kwargs:
        raise UnsupportedError(f"the model has an input named {TENANT!r} of its own: rename it")
    batch, rows = _batch(graph, args, kwargs)
    rewritten, context = _rewrite(graph, bank, batch, about.tied, exact)
    assert context.tenant is not None
    module, signature = rewritten_module(program, rewritten, context, graph.held)
    stacks = {p.name: p.encoding for p in context.parameters.values() if isinstance(p.encoding, Stack)}
    names: list[str | None] = [None] * bank.slots
    for name in bank.tenants:
        names[bank.slot(name)] = name
    encodings = {name: described(stack) for name, stack in stacks.items()}
    about = dataclasses.replace(about, encodings=encodings, tenants=tuple(names))
    add_buffer(module, METADATA, about.tensor())
    inputs = [*graph.inputs(), context.tenant]
    # The first export settled which sizes are dynamic. What the added calls ask of them beyond that, such as whether
    # strides are those of a contiguous tensor, becomes a check at run time where it cannot be proven for every size.
    return torch.export.export(
        module,
        args,
        {**kwargs, TENANT: torch.zeros(rows, dtype=torch.int32)},
        dynamic_shapes=_dynamic_shapes(inputs, graph.ranges, signature),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def rewritten_module(
    program: ExportedProgram, rewritten: fx.GraphModule, context: Context, held: Mapping[str, str]
) -> tuple[fx.GraphModule, _PyTreeInfo]:
    """A rewritten graph as a module with the call signature of the program that it comes from.

    Args:
        program: what was rewritten.
        rewritten, context: what `rewrite` made of its graph; the graph is taken over.
        held: placeholder name of that graph -> dotted name of the tensor that is always passed there.

    Returns:
        A module that holds the program's parameters, buffers and constants under their own names, and the tensors that
        the passes added as buffers `bitdelta.<parameter>.<field>`; and its call signature. Its last input is the row
        index, if the passes added one.
    """
    module: fx.GraphModule = program.module(check_guards=False)
    module._modules.pop(PREFIX.rstrip("."), None)
    held, names = dict(held), context.input_names()
    placeholders = rewritten.graph.find_nodes(op="placeholder")
    added = placeholders[len(placeholders) - len(context.added) :]
    for node, tensor in zip(added, context.added, strict=True):
        held[node.name] = PREFIX + names[node.name]
        add_buffer(module, held[node.name], tensor)
    for node, parameter in context.parameters.items():
        value = context.values[node.name]
        if value is not parameter.base:
            held[node.name] = f"{PREFIX}{parameter.name}.dense"
            add_buffer(module, held[node.name], value)
    for node in placeholders:
        if is_quantized(program.state_dict.get(held.get(node.name, ""))):
            _keep_linears(node)
        if node.name in held:
            with rewritten.graph.inserting_before(node):
                attribute = rewritten.graph.create_node("get_attr", held[node.name])
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            rewritten.graph.erase_node(node)
    codegen: Any = module.graph._codegen
    info: _PyTreeInfo = codegen.pytree_info
    signature = info if context.tenant is None else _with_row_index(info)
    rewritten.graph.set_codegen(_PyTreeCodeGen(signature))
    module.graph = rewritten.graph
    return module, signature


def _keep_linears(weight: fx.Node) -> None:
    """Let the linears with a quantized weight be nodes that leave it to the weight's class what to do."""
    for user in weight.users:
        if user.target is torch.ops.aten.linear.default and user.args[1] is weight:
            user.target = torch.ops.bitdelta.base_linear.default


def _with_row_index(info: _PyTreeInfo) -> _PyTreeInfo:
    """A call signature with the keyword `tenant` in addition."""
    assert info.in_spec is not None
    args, kwargs = pytree.tree_unflatten(range(info.in_spec.num_leaves), info.in_spec)
    spec = pytree.tree_flatten((args, {**kwargs, TENANT: None}))[1]
    return _PyTreeInfo([*info.orig_args, TENANT], spec, info.out_spec)


def add_buffer(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a buffer under a dotted name, with the modules on the way to it."""
    *path, last = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(last, tensor.detach())


def _examples(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs that the program was exported with."""
    return program.example_inputs if program.example_inputs is not None else ((), {})


def _batch(graph: BaseGraph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Batch, int]:
    """The batch of the programs' inputs, and how many rows it has in their examples."""
    examples = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.dim()]
    if not examples:
        raise UnsupportedError("the programs have no tensor among their inputs whose first dimension is the batch")
    rows = examples[0].shape[0]
    batch = Batch.leading([node.meta.get("val") for node in graph.inputs()], rows)
    if batch is None:
        raise UnsupportedError(
            f"the programs are for a batch of exactly {rows} rows, which cannot be told from other sizes of {rows}: "
            'export with dynamic_shapes whose first dimension is torch.export.Dim("batch")'
        )
    return batch, rows


def _rewrite(
    graph: BaseGraph, bank: Bank, batch: Batch, tied: Mapping[str, str], exact: bool
) -> tuple[fx.GraphModule, Context]:
    """The graph for many tenants. What no tenant changes and cannot be chosen per row stays the base's."""
    parameters: dict[fx.Node, Parameter] = {}
    for node in graph.module.graph.find_nodes(op="placeholder"):
        name = graph.held.get(node.name, "")
        name = tied.get(name, name)
        if name in bank.stacks and node.users:
            stack, base = bank.settle(name, stored_transposed(node)), bank.base.parameters[name]
            parameters[node] = Parameter(name, stack, base, bank.changed(name))
    rewritten, context, _ = rewrite_for_rows(graph.module, parameters, batch, exact=exact)
    return rewritten, context


def _dynamic_shapes(inputs: Sequence[fx.Node], ranges: Mapping[Any, Any], info: _PyTreeInfo) -> dict[str, Any]:
    """`dynamic_shapes` of torch.export for these inputs, as their example values say.

    Args:
        inputs: placeholders in the order of the call's leaves.
        ranges: of the symbols.
        info: names of the arguments and their nesting.
    """
    dims: dict[Any, Any] = {}

    def dim(size: Any) -> Any:
        expression = size.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        coefficients = sympy.Poly(expression, *symbols).all_coeffs() if len(symbols) == 1 else []
        if len(coefficients) != 2 or not all(each.is_Integer for each in coefficients):
            return torch.export.Dim.AUTO
        (symbol,) = symbols
        if symbol not in dims:
            bounds = ranges[symbol]
            upper = int(bounds.upper) if bounds.upper.is_Integer else None
            dims[symbol] = torch.export.Dim(f"size_{symbol}", min=int(bounds.lower), max=upper)
        slope, offset = map(int, coefficients)
        scaled = dims[symbol] if slope == 1 else slope * dims[symbol]
        return scaled if offset == 0 else scaled + offset

    def spec(node: fx.Node) -> dict[int, Any] | None:
        value = value_of(node)
        if not isinstance(value, Tensor):
            return None
        return {at: dim(size) for at, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}

    assert info.in_spec is not None
    args, kwargs = pytree.tree_unflatten([spec(node) for node in inputs], info.in_spec)
    return dict(zip(info.orig_args, [*args, *kwargs.values()], strict=True))
