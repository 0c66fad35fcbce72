"""What a pass works on: the copy of a graph, its parameters, and the calls it adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..encodings import Encoding, Sign
from ..lowering import torch_internals
from .patterns import op_name

STEMS_FROM = "bitdelta_stems_from"  # node.meta: the node of the original graph that an added node serves


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of the graph: its qualified name, its encoding, and the base's tensor (None if it has none)."""

    name: str
    encoding: Encoding
    base: Tensor | None


@dataclasses.dataclass(frozen=True)
class Use:
    """What happened to one use of a parameter, for `explain`."""

    name: str
    op: str
    node: str
    action: str


@dataclasses.dataclass
class Context:
    """The copy being rewritten and what the passes know about it.

    Attributes:
        graph: of the copy.
        parameters: placeholder of the copy -> parameter.
        values: placeholder name -> tensor that takes the place of the one the caller passes.
        added: tensors of the placeholders that the passes added, in order.
        uses: what was done, in graph order.
    """

    graph: fx.Graph
    parameters: dict[fx.Node, Parameter]
    values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    added: list[Tensor] = dataclasses.field(default_factory=list)
    uses: list[Use] = dataclasses.field(default_factory=list)
    _inputs: dict[tuple[str, str], fx.Node] = dataclasses.field(default_factory=dict)

    def input(self, parameter: Parameter, field: str, tensor: Tensor) -> fx.Node:
        """The placeholder of one tensor of a parameter's delta; uses of the same parameter share it."""
        key = parameter.name, field
        if key not in self._inputs:
            last = self.graph.find_nodes(op="placeholder")[-1]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"{parameter.name.replace('.', '_')}_{field}")
            node.target = node.name  # made unique and an identifier: qualified names may start with a digit
            node.meta["example_value"] = tensor
            torch_internals.mark_added_input(node)
            self._inputs[key] = node
            self.added.append(tensor)
        return self._inputs[key]

    def delta_inputs(self, parameter: Parameter, sign: Sign) -> tuple[fx.Node | None, ...]:
        """Placeholders of a sign encoding, stacked over one slot, in the order the ops take them."""
        fields = ("signs", "row_scale", "col_scale", "left", "right")
        tensors = {field: getattr(sign, field) for field in fields}
        return tuple(
            None if tensor is None else self.input(parameter, field, tensor.unsqueeze(0))
            for field, tensor in tensors.items()
        )

    def input_names(self) -> dict[str, str]:
        """Placeholder name -> qualified name of the parameter, or of the tensor of its delta."""
        named = {node.name: parameter.name for node, parameter in self.parameters.items()}
        return named | {node.name: f"{name}.{field}" for (name, field), node in self._inputs.items()}

    def record(self, parameter: Parameter, node: fx.Node, action: str) -> None:
        """Note what was done to a use of a parameter."""
        self.uses.append(Use(parameter.name, op_name(node), node.name, action))


class Insertion:
    """Adds calls behind a node, in order, each behind the last."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self.graph = graph
        self.first = node
        self.last = node
        self.added: list[fx.Node] = []

    def _keep(self, node: fx.Node) -> fx.Node:
        for key in ("stack_trace", "nn_module_stack"):
            if key in self.first.meta:
                node.meta[key] = self.first.meta[key]
        node.meta[STEMS_FROM] = self.first.name
        self.last = node
        self.added.append(node)
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a function call behind the last one."""
        with self.graph.inserting_after(self.last):
            return self._keep(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any) -> fx.Node:
        """Add a method call behind the last one."""
        with self.graph.inserting_after(self.last):
            return self._keep(self.graph.call_method(name, args))

    def cast(self, value: fx.Node, has: fx.Node, wants: fx.Node) -> fx.Node:
        """`value`, which has the dtype of `has`, in that of `wants`: autocast changes a product's dtype."""
        dtype = _dtype(wants)
        return value if dtype in (None, _dtype(has)) else self.method("to", value, dtype)

    def before(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a function call in front of the node."""
        with self.graph.inserting_before(self.first):
            return self.graph.call_function(target, args, kwargs)

    def take_over(self, node: fx.Node, result: fx.Node, *, same_shape: bool = True) -> None:
        """Hand the users of `node` to `result`; the calls added here keep reading `node`."""
        if result is not node:
            for key in ("example_value", "val") if same_shape else ():  # what later passes know of shape and dtype
                if key in node.meta:
                    result.meta.setdefault(key, node.meta[key])
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in self.added)


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dtype if isinstance(value, Tensor) else None
