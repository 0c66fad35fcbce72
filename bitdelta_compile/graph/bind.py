"""Which parameter is behind each input of a graph.

Dynamo names an input by where it found it, seen from the frame it compiled:
`L['self']._modules['fc']._parameters['weight']`. When the frame is the whole model that is the qualified name; after a
graph break inside a submodule it is only the tail of one. A tail that fits a single known name is taken; otherwise the
module tree that owns the parameter is searched.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..lowering import torch_internals

_STEP = re.compile(r"_(?:modules|parameters)\['([^']*)'\]")
_ATTRIBUTE = re.compile(r"\.([A-Za-z_]\w*)(?![\w(])")


def parameter_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any], known: Iterable[str]) -> dict[fx.Node, str]:
    """Placeholders that are parameters, with the qualified name of each as `known` spells it.

    Args:
        gm: a graph from Dynamo.
        example_inputs: its inputs; parameters are the real ones.
        known: qualified names of the base or of the delta.

    Returns:
        Placeholder -> name, in graph order. A parameter that `known` does not have is left out: it is the model's own.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    parameters = {
        node: value for node, value in zip(placeholders, example_inputs, strict=True) if isinstance(value, nn.Parameter)
    }
    tails = _by_tail(known)
    names: dict[fx.Node, str] = {}
    unsure: dict[fx.Node, Tensor] = {}
    for node, parameter in parameters.items():
        candidates = tails.get(_tail(torch_internals.placeholder_source(node) or ""), [])
        if len(candidates) == 1:
            names[node] = candidates[0]
        else:
            unsure[node] = parameter
    if unsure:
        owned = owner_names(unsure.values())
        for node, parameter in unsure.items():
            found = {match for name in owned.get(id(parameter), ()) for match in _longest_match(name, tails)}
            if len(found) == 1:
                names[node] = found.pop()
    return {node: names[node] for node in parameters if node in names}


def owner_names(parameters: Iterable[Tensor]) -> dict[int, list[str]]:
    """Qualified names of parameters in the outermost modules alive that hold them, by id of the parameter."""
    wanted = {id(parameter) for parameter in parameters}
    modules = [obj for obj in gc.get_objects() if issubclass(type(obj), nn.Module)]
    children = {id(child) for module in modules for child in module.__dict__.get("_modules", {}).values()}
    found: dict[int, list[str]] = {}
    for root in modules:
        if id(root) in children or "_parameters" not in root.__dict__:
            continue
        for name, parameter in root.named_parameters(remove_duplicate=False):
            if id(parameter) in wanted:
                found.setdefault(id(parameter), []).append(name)
    return found


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


def _by_tail(known: Iterable[str]) -> dict[tuple[str, ...], list[str]]:
    """Every tail of every known name -> the names it may mean."""
    tails: dict[tuple[str, ...], list[str]] = {}
    for name in known:
        parts = tuple(name.split("."))
        for start in range(len(parts)):
            tails.setdefault(parts[start:], []).append(name)
    return tails


def _longest_match(name: str, tails: Mapping[tuple[str, ...], list[str]]) -> list[str]:
    """Known names that end as `name` does, for the longest ending that any does: wrappers add prefixes."""
    parts = tuple(name.split("."))
    for start in range(len(parts)):
        exact = [known for known in tails.get(parts[start:], []) if len(known.split(".")) == len(parts) - start]
        if exact:
            return exact
    return tails.get(parts, [])
