"""Graphs as Dynamo captures them, with a symbolic batch; modules with fine-tunes in the slots of their parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bitdelta_compile.encodings import Dense, Encoding
from bitdelta_compile.errors import BitDeltaError
from bitdelta_compile.graph.batch import Batch
from bitdelta_compile.graph.context import Context, Parameter
from bitdelta_compile.graph.rewrite import rewrite
from bitdelta_compile.serve.reserve import plan
from bitdelta_compile.serve.slots import allocate, write
from bitdelta_compile.stack import Stack

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def run(function: Callable[..., Any], backend: Backend, inputs: Sequence[Tensor], rows: int) -> Any:
    torch._dynamo.reset()
    for tensor in inputs:
        if tensor.dim() and tensor.shape[0] == rows:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch.no_grad():
        return torch.compile(function, backend=backend, fullgraph=True)(*inputs)


def batch_of(gm: fx.GraphModule, inputs: Sequence[Any], rows: int) -> Batch | None:
    nodes = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    values = [node.meta.get("example_value") for node, value in nodes if not isinstance(value, nn.Parameter)]
    return Batch.leading(values, rows)


class Captured:
    """A function's graph.

    Attributes:
        gm: the graph; its inputs that have `rows` rows have a symbolic batch.
        batch: of it.
        result: what the function returned.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, rows: int, mark: bool = True) -> None:
        def backend(gm: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
            self.gm, self.batch = gm, batch_of(gm, values, rows)
            return gm.forward

        self.result = run(function, backend, inputs, rows if mark else -1)

    @property
    def results(self) -> Any:
        return self.gm.graph.output_node().args[0]


class Many:
    """A module, a fine-tune of it in every slot, and its graph rewritten for all of them.

    Args:
        module: the base.
        inputs: tensors that lead with the batch, others are the same for every row.
        encodings: per slot, by parameter name; the default is a tensor of its own for every parameter.
    """

    def __init__(
        self, module: nn.Module, *inputs: Tensor, rows: int = 4, encodings: Sequence[dict[str, Encoding]] | None = None
    ) -> None:
        self.module, self.inputs, self.rows = module.eval().requires_grad_(False), inputs, rows
        base = dict(module.named_parameters())
        self.encodings = encodings if encodings is not None else [_tuned(base, slot) for slot in range(3)]
        reserve = plan(base, {str(slot): found for slot, found in enumerate(self.encodings)}, None)
        transposed = {
            name for found in self.encodings for name, each in found.items() if getattr(each, "transposed", 0)
        }
        self.stacks: dict[str, Stack] = {}
        for name, room in reserve.items():
            stack = allocate(base[name], room, len(self.encodings), name in transposed)
            if stack is not None:
                self.stacks[name] = stack
                taken = 0
                for slot, found in enumerate(self.encodings):
                    write(stack, slot, found.get(name), base[name], taken)
                    taken += stack.dense is not None and isinstance(found.get(name), Dense)
        self.error: BitDeltaError | None = None
        self.gm: fx.GraphModule
        self.context: Context

    def __call__(self, tenant: Sequence[int]) -> Any:
        """The module's result with a row index, through the rewritten graph."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        index = torch.tensor(tenant, dtype=torch.int32)

        def backend(gm: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
            nodes = zip(gm.graph.find_nodes(op="placeholder"), values, strict=True)
            parameters = {
                node: Parameter(name, self.stacks[name], value, ("a", "b"))
                for node, value in nodes
                if (name := names.get(id(value))) in self.stacks
            }
            try:
                self.gm, self.context = rewrite(gm, parameters, batch_of(gm, values, self.rows))
            except BitDeltaError as error:
                self.error = error
                return gm.forward
            return lambda *args: self.gm(*args, index, *self.context.added)

        found = run(self.module, backend, self.inputs, self.rows)
        if self.error is not None:
            raise self.error
        return found

    def alone(self, row: int, slot: int) -> Any:
        """What the base with a slot's dense weights gives for one row alone."""
        module = copy.deepcopy(self.module)
        for name, encoding in self.encodings[slot].items() if slot >= 0 else ():
            parameter = module.get_parameter(name)
            parameter.data = encoding.apply(parameter.detach()).to(parameter.dtype)
        return module(*(each[row : row + 1] if _leads(each, self.rows) else each for each in self.inputs))

    def check(self, tenant: Sequence[int] = (1, -1, 0, 1), *, atol: float = 1e-5) -> fx.GraphModule:
        """Each row against its tenant alone; the tenants differ, and a slot that is not in use may hold anything."""
        found = self(tenant)
        for row, slot in enumerate(tenant):
            expected = self.alone(row, slot)
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=atol)
            if slot >= 0 and expected.is_floating_point():
                assert (expected - self.alone(row, -1)).abs().max() > 100 * atol
        for stack in self.stacks.values():
            _poison(stack, set(range(len(self.encodings))) - set(tenant))
        again = self(tenant)
        assert torch.equal(again, found)
        return self.gm


def _leads(tensor: Tensor, rows: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == rows


def _tuned(base: dict[str, nn.Parameter], seed: int) -> dict[str, Encoding]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Dense(
            tuple(value.shape), value.dtype, value + torch.randn(value.shape, generator=generator).to(value.dtype)
        )
        for name, value in base.items()
    }


def _poison(stack: Stack, slots: set[int]) -> None:
    """NaN in everything that slots hold."""
    for name, tensor in stack.tensors().items():
        for slot in slots if tensor.is_floating_point() and name != "dense" else ():
            tensor[slot] = torch.nan
    if stack.dense is not None and stack.place is not None:
        for slot in slots:
            if stack.place[slot] >= 0:
                stack.dense[int(stack.place[slot])] = torch.nan


@pytest.fixture
def capture() -> type[Captured]:
    return Captured


@pytest.fixture
def many() -> type[Many]:
    return Many
