"""What a pass works on: the copy of a graph, its parameters, its batch, and the calls it adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..encodings import Encoding, Rows, Sign
from ..errors import UnsupportedError
from ..lowering import torch_internals
from ..stack import Stack
from .batch import Batch, Place, places, value_of
from .patterns import op_name

STEMS_FROM = "bitdelta_stems_from"  # node.meta: the node of the original graph that an added node serves


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the graph.

    Attributes:
        name: qualified.
        encoding: of the one fine-tune that the graph is for, or the stack of all tenants'.
        base: the base's tensor, None if it has none.
        tenants: whose tensor differs from the base's, when there are many.
    """

    name: str
    encoding: Encoding | Stack
    base: Tensor | None
    tenants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Use:
    """What happened to one use of a parameter, for `explain`."""

    name: str
    op: str
    node: str
    action: str


class NoRowForm(UnsupportedError):
    """A use of a parameter that cannot have another value for each row."""

    def __init__(self, parameter: Parameter, node: fx.Node, why: str) -> None:
        self.parameter = parameter
        whose = f" (it differs in {', '.join(parameter.tenants)})" if parameter.tenants else ""
        super().__init__(
            f"{parameter.name}{whose} is used by {op_name(node)} ({node.name}), which cannot be done per row: {why}; "
            "serve that tenant from a graph of its own (torch.compile with backend 'bitdelta'), or freeze the "
            "parameter when fine-tuning"
        )


@dataclasses.dataclass
class Context:
    """The copy being rewritten and what the passes know about it.

    Attributes:
        graph: of the copy.
        parameters: placeholder of the copy -> parameter.
        batch: None where the graph serves one fine-tune.
        tenant: the row index, an input that the pass adds; None without a batch.
        exact: as of `delta_linear`.
        values: placeholder name -> tensor that takes the place of the one the caller passes.
        added: tensors of the other placeholders that the passes added, in order.
        uses: what was done, in graph order.
        places: node -> where the rows of the batch are in its value.
        lifted: node -> the parameter that made its value differ from row to row though it had no rows; the value has a
            dimension for them in front.
    """

    graph: fx.Graph
    parameters: dict[fx.Node, Parameter]
    batch: Batch | None = None
    exact: bool = False
    tenant: fx.Node | None = None
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    added: list[Tensor] = dataclasses.field(default_factory=list)
    uses: list[Use] = dataclasses.field(default_factory=list)
    places: dict[fx.Node, Place] = dataclasses.field(default_factory=dict)
    lifted: dict[fx.Node, Parameter] = dataclasses.field(default_factory=dict)
    _inputs: dict[tuple[str, str], fx.Node] = dataclasses.field(default_factory=dict)
    _stacks: dict[str, Stack | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch is not None:
            self.places = places(self.graph, self.batch)
            index = torch_internals.row_index_example(self.batch.size, self.graph)
            self.tenant = self._placeholder("tenant", index, static=False)  # every call brings its own

    @property
    def per_row(self) -> bool:
        """Whether rows may differ: a batch of one row has one tenant."""
        return self.batch is not None and self.batch.size != 1

    def stack(self, parameter: Parameter) -> Stack | None:
        """The parameter's deltas as the passes take them; None where nothing differs or the tensor is replaced."""
        if isinstance(parameter.encoding, Stack):
            return parameter.encoding
        if not isinstance(parameter.encoding, Sign | Rows):
            return None
        if parameter.name not in self._stacks:
            assert parameter.base is not None
            self._stacks[parameter.name] = Stack.of(parameter.encoding, parameter.base)
        return self._stacks[parameter.name]

    def input(self, parameter: Parameter, field: str, tensor: Tensor) -> fx.Node:
        """The placeholder of one tensor of a parameter's delta; uses of the same parameter share it."""
        key = parameter.name, field
        if key not in self._inputs:
            self._inputs[key] = self._placeholder(f"{parameter.name.replace('.', '_')}_{field}", tensor)
            self.added.append(tensor)
        return self._inputs[key]

    def _placeholder(self, name: str, value: Tensor, *, static: bool = True) -> fx.Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        node.target = node.name  # made unique and an identifier: qualified names may start with a digit
        node.meta["example_value"] = value
        torch_internals.mark_added_input(node, static=static)
        return node

    def inputs(self, parameter: Parameter, stack: Stack, *fields: str) -> list[fx.Node | None]:
        """Placeholders of some tensors of a stack, None for those that it lacks."""
        tensors = {field: getattr(stack, field) for field in fields}
        return [None if tensor is None else self.input(parameter, field, tensor) for field, tensor in tensors.items()]

    def input_names(self) -> Mapping[str, str]:
        """Placeholder name -> qualified name of the parameter, or of the tensor of its delta."""
        named = {node.name: parameter.name for node, parameter in self.parameters.items()}
        return named | {node.name: f"{name}.{field}" for (name, field), node in self._inputs.items()}

    def record(self, parameter: Parameter, node: fx.Node, action: str) -> None:
        """Note what was done to a use of a parameter."""
        self.uses.append(Use(parameter.name, op_name(node), node.name, action))


class Insertion:
    """Adds calls behind a node, in order, each behind the last."""

    def __init__(self, context: Context, node: fx.Node) -> None:
        self.context = context
        self.graph = context.graph
        self.first = node
        self.last = node
        self.added: list[fx.Node] = []

    def _keep(self, node: fx.Node) -> fx.Node:
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.first.meta:
                node.meta[key] = self.first.meta[key]
        node.meta[STEMS_FROM] = self.first.name
        self.added.append(node)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a function call behind the last one."""
        with self.graph.inserting_after(self.last):
            self.last = self._keep(self.graph.call_function(target, args, kwargs))
        return self.last

    def method(self, name: str, *args: Any) -> fx.Node:
        """Add a method call behind the last one."""
        with self.graph.inserting_after(self.last):
            self.last = self._keep(self.graph.call_method(name, args))
        return self.last

    def cast(self, value: fx.Node, has: fx.Node, wants: fx.Node) -> fx.Node:
        """`value`, which has the dtype of `has`, in that of `wants`: autocast changes a product's dtype."""
        dtype = _dtype(wants)
        return value if dtype in (None, _dtype(has)) else self.method("to", value, dtype)

    def before(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a function call in front of the node."""
        with self.graph.inserting_before(self.first):
            return self._keep(self.graph.call_function(target, args, kwargs))

    def take_over(self, node: fx.Node, result: fx.Node, *, same_shape: bool = True) -> None:
        """Hand the users of `node` to `result`; the calls added here keep reading `node`."""
        if result is not node:
            for key in ("example_value", "val") if same_shape else ():  # what later passes know of shape and dtype
                if key in node.meta:
                    result.meta.setdefault(key, node.meta[key])
            self.context.places[result] = self.context.places.get(node)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in self.added)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None
