"""Names of parameters behind graph inputs: whole models, parts of them, wrappers, strangers, exported programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bitdelta_compile.errors import UnsupportedError
from bitdelta_compile.graph.bind import exported_parameter_inputs, parameter_inputs, shares_names


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.breaks = breaks
        self.near = nn.Sequential(nn.Linear(4, 4))
        self.far = nn.Sequential(nn.Linear(4, 4, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.near(x)
        if self.breaks:
            torch._dynamo.graph_break()
        out: Tensor = self.far(x)
        return out


class Model(nn.Module):
    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.first = Block(breaks=breaks)
        self.second = Block(breaks=breaks)
        self.extra = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x)) + self.extra
        return out


class Wrapper(nn.Module):
    """A head of its own, whose names end as names of the model do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.head = nn.ModuleDict({"extra": nn.Linear(4, 4), "first": Block()})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head["first"](self.head["extra"](self.inner(x)))
        return out


def names(model: nn.Module, prefix: str = "") -> list[str]:
    return [prefix + name for name, _ in model.named_parameters()]


def bound(run: Callable[[Tensor], Tensor], known: Iterable[str]) -> list[tuple[str, Tensor]]:
    """Every (name, parameter) that the binder finds over all graphs of one call."""
    known = list(known)
    found: list[tuple[str, Tensor]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        nodes = gm.graph.find_nodes(op="placeholder")

        def call(*args: Any) -> Any:
            by_owner = parameter_inputs(gm, args, known, by_owner=True)
            found.extend((name, args[nodes.index(node)]) for node, name in by_owner.items())
            return gm(*args)

        by_source = parameter_inputs(gm, example_inputs, known)
        found.extend((name, example_inputs[nodes.index(node)]) for node, name in by_source.items())
        return call

    with torch.no_grad():
        torch.compile(run, backend=backend)(torch.ones(2, 4))
    return found


def check(found: list[tuple[str, Tensor]], model: nn.Module, known: Iterable[str], prefix: str = "") -> None:
    """Each known name was found, and always for the parameter it names in `model`."""
    own = {prefix + name: parameter for name, parameter in model.named_parameters()}
    assert {name for name, _ in found} == set(known)
    assert all(own[name] is parameter for name, parameter in found)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_whole_model(breaks: bool) -> None:
    model = Model(breaks=breaks)
    check(bound(model, names(model)), model, names(model))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_wrapper_with_a_head_of_its_own(breaks: bool) -> None:
    model = Model(breaks=breaks)
    wrapper = Wrapper(model)
    check(bound(wrapper, names(model)), model, names(model))


@pytest.mark.parametrize("breaks", [False, True])
def test_a_function_that_closes_over_the_model(breaks: bool) -> None:
    model = Model(breaks=breaks)
    check(bound(lambda x: model(x) * 2, names(model)), model, names(model))


def test_a_part_of_the_model_compiled_alone() -> None:
    model = Model()
    found = bound(model.second, names(model))
    check(found, model, [name for name in names(model) if name.startswith("second.")])


def test_known_names_with_a_prefix() -> None:
    model = Model(breaks=True)
    known = [*names(model, "bert."), "classifier.weight"]
    check(bound(model, known), model, names(model, "bert."), prefix="bert.")


def test_a_parameter_that_is_not_known_is_left_out() -> None:
    model = Model()
    known = [name for name in names(model) if name != "extra"]
    check(bound(model, known), model, known)


def test_tied_parameters_have_one_name() -> None:
    model = Model()
    model.second.far = model.first.far
    found = bound(model, [name for name, _ in model.named_parameters(remove_duplicate=False)])
    assert len({name for name, _ in found}) == len(names(model))


def test_a_model_held_twice_has_the_names_of_each() -> None:
    left, right = Model(), Model()
    towers = nn.ModuleDict({"left": left, "right": right})

    def both(x: Tensor) -> Tensor:
        out: Tensor = towers["left"](x) + towers["right"](x)
        return out

    found = bound(both, names(left))
    for model in (left, right):
        own = dict(model.named_parameters())
        assert all(any(own[name] is parameter for known, parameter in found if known == name) for name in own)


def test_a_container_that_also_holds_a_layer_does_not_rename_it() -> None:
    model = Model(breaks=True)
    aside = nn.ModuleDict({"second": model.first})
    check(bound(model, names(model)), model, names(model))
    assert aside["second"] is model.first


def test_modules_that_disagree_are_refused() -> None:
    block = Block()
    holders = [nn.ModuleDict({"first": block}), nn.ModuleDict({"second": block})]
    assert len(holders) == 2
    with pytest.raises(Exception, match=r"may be any of first\.near\.0\.weight, second\.near\.0\.weight") as error:
        bound(block, names(Model()))
    assert isinstance(error.value.__cause__, UnsupportedError) or "UnsupportedError" in str(error.value)


def test_relatives_and_strangers() -> None:
    model = Model()
    wrapper = Wrapper(model)
    head = list(wrapper.head.parameters())
    assert shares_names(head, names(model))
    assert not shares_names(list(nn.ModuleDict({"words": nn.Linear(2, 2)}).parameters()), names(model))
    assert shares_names([torch.ones(2)], names(model))


def test_an_exported_program() -> None:
    model = Model()
    found = exported_parameter_inputs(torch.export.export(model, (torch.ones(2, 4),)))
    assert sorted(found.values()) == sorted(names(model))
    assert all(node.op == "placeholder" for node in found)
