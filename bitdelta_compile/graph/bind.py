"""Which parameter is behind each input of a graph.

Dynamo names an input by where it found it, seen from the frame it compiled:
`L['self']._modules['fc']._parameters['weight']`. When the frame is the whole model that is the qualified name; after a
graph break inside a submodule it is only the tail of one, and under a wrapper, which may have a head with the same
names, it is longer. So the module tree that owns the parameter is searched; Dynamo's name decides where that fails.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import UnsupportedError
from ..lowering import torch_internals

Tails = dict[tuple[str, ...], list[str]]

_STEP = re.compile(r"_(?:modules|parameters)\['([^']*)'\]")
_ATTRIBUTE = re.compile(r"\.([A-Za-z_]\w*)(?![\w(])")


def parameter_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any], known: Iterable[str], *, by_owner: bool = False
) -> dict[fx.Node, str]:
    """Placeholders that are parameters, with the qualified name of each as `known` spells it.

    Args:
        gm: a graph from Dynamo.
        example_inputs: its inputs; parameters are the real ones.
        known: qualified names of the base or of the delta.
        by_owner: the inputs are another module's than the graph was captured from: its sources say nothing.

    Returns:
        Placeholder -> name, in graph order. A parameter that `known` does not have is left out: it is the model's own.

    Raises:
        UnsupportedError: a parameter that may be one of several known ones.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters = {
        node: value for node, value in zip(placeholders, example_inputs, strict=True) if isinstance(value, nn.Parameter)
    }
    tails = _by_tail(known)
    owned = owner_names(parameters.values(), tails)
    names: dict[fx.Node, str] = {}
    for node, parameter in parameters.items():
        tail = () if by_owner else _tail(torch_internals.placeholder_source(node) or "")
        found = owned.get(id(parameter), tails.get(tail, []))
        if len(found) > 1:
            found = [name for name in found if name == ".".join(tail)] or found
        if len(found) > 1:
            raise UnsupportedError(
                f"a parameter of this graph ({torch_internals.placeholder_source(node)}) may be any of "
                f"{', '.join(sorted(found))}: compile the module that owns them all"
            )
        if found:
            names[node] = found[0]
    return names


def shares_names(example_inputs: Sequence[Any], known: Iterable[str]) -> bool:
    """Whether a model that owns one of these parameters has others that `known` names; True without any parameters."""
    parameters = [value for value in example_inputs if isinstance(value, nn.Parameter)]
    if not parameters:
        return True
    tails = _by_tail(known)
    return any(_align(names, tails) for names in _owners(parameters))


def owner_names(parameters: Iterable[Tensor], tails: Tails) -> dict[int, list[str]]:
    """Known names of parameters, found by way of the outermost modules alive that own them.

    Returns:
        id of a parameter that some module owns -> its known name (of tied ones, the first); none when it is the
        module's own, several when modules that have equally many known parameters disagree.
    """
    found: dict[int, list[str]] = {}
    most: dict[int, int] = {}
    for names in _owners(parameters):
        aligned = _align(names, tails)
        here: dict[int, str] = {}
        for name, parameter in names.items():
            found.setdefault(id(parameter), [])
            if name in aligned:
                here.setdefault(id(parameter), aligned[name])
        for key, known in here.items():
            if len(aligned) > most.get(key, 0):
                most[key], found[key] = len(aligned), [known]
            elif len(aligned) == most[key] and known not in found[key]:
                found[key].append(known)
    return found


def tied_names(parameters: Iterable[Tensor], known: Iterable[str]) -> list[list[str]]:
    """Known names that mean one and the same tensor, for each of these parameters that has several."""
    parameters = list(parameters)
    wanted, tails = {id(parameter) for parameter in parameters}, _by_tail(known)
    found: list[list[str]] = []
    for names in _owners(parameters) if parameters else []:
        shared: dict[int, list[str]] = {}
        for name, meant in _align(names, tails).items():
            shared.setdefault(id(names[name]), []).append(meant)
        found += [meant for key, meant in shared.items() if key in wanted and len(set(meant)) > 1]
    return found


def _owners(parameters: Iterable[Tensor]) -> list[dict[str, Tensor]]:
    """The named parameters of the outermost modules alive that own at least one of `parameters`."""
    wanted = {id(parameter) for parameter in parameters}
    everything = (obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module))
    # What torch.compile returns holds the model under a name that is no part of the model's own.
    modules = [obj for obj in everything if "_orig_mod" not in obj.__dict__.get("_modules", {})]
    children = {id(child) for module in modules for child in module.__dict__.get("_modules", {}).values()}
    roots = [module for module in modules if id(module) not in children and "_parameters" in module.__dict__]
    named = (dict(root.named_parameters(remove_duplicate=False)) for root in roots)
    return [names for names in named if any(id(parameter) in wanted for parameter in names.values())]


def _align(names: Iterable[str], tails: Tails) -> dict[str, str]:
    """A module's names -> known names. The two differ by a prefix that one side has throughout: `bert.`, `model.`.

    The prefix that pairs the most names is taken, and any other of the module's side that pairs at least half as many:
    a wrapper may hold the model twice. Fewer are coincidence, such as a head with a `0.weight` of its own.
    """
    readings: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        parts = tuple(name.split("."))
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            if rest in tails.get(parts[start:], ()):
                readings.setdefault((".".join(parts[:start]), ""), {})[name] = rest
        for known in tails.get(parts, ()):
            if known != name:
                readings.setdefault(("", known[: -len(name)]), {})[name] = known
    most = max(map(len, readings.values()), default=0)
    known_side = [len(reading) for (_, prefix), reading in readings.items() if prefix]
    aligned: dict[str, str] = {}
    for (_, prefix), reading in sorted(readings.items(), key=lambda item: len(item[1])):
        unclear = bool(prefix) and (len(reading) < max(known_side) or known_side.count(len(reading)) > 1)
        if 2 * len(reading) >= most and not unclear:
            aligned |= reading
    return aligned


def exported_parameter_inputs(program: torch.export.ExportedProgram) -> dict[fx.Node, str]:
    """Placeholders of an exported program that are parameters, with their qualified names from its signature."""
    signature: Mapping[str, str] = program.graph_signature.inputs_to_parameters
    placeholders = program.graph.find_nodes(op="placeholder")
    return {node: signature[node.name] for node in placeholders if node.name in signature}


def _tail(source: str) -> tuple[str, ...]:
    """Path components of a Dynamo source, root local left out: ("encoder", "layer", "0", "weight")."""
    steps = _STEP.findall(source)
    if not steps:
        steps = _ATTRIBUTE.findall(source)
    return tuple(part for step in steps for part in step.split("."))


def _by_tail(known: Iterable[str]) -> Tails:
    """Every tail of every known name -> the names it may mean."""
    tails: Tails = {}
    for name in known:
        parts = tuple(name.split("."))
        for start in range(len(parts)):
            tails.setdefault(parts[start:], []).append(name)
    return tails
