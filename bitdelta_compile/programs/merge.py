"""`bdc.merge`: programs of one fine-tune each -> one program for all, with the row index as an input.

undo the rewrite of each -> the same base graph -> stack their deltas -> rewrite for many tenants -> torch.export
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import BaseMismatchError, UnsupportedError
from ..graph.merge import BaseGraph, first_difference, undo
from ..quantized import same
from ..serve.bank import Bank, Base
from ..serve.reserve import Reserve
from .program import (
    PREFIX,
    About,
    base_parameters,
    delta_of,
    is_weightless,
    versions,
    with_base,
    with_tensors,
)
from .reexport import for_rows


def merge(
    programs: Mapping[str, ExportedProgram],
    *,
    base: nn.Module | str | Path | None = None,
    slots: int | None = None,
    reserve: Reserve | Mapping[str, Reserve] | None = None,
    exact: bool = False,
) -> ExportedProgram:
    """One program for many tenants from programs of one fine-tune each.

    Args:
        programs: by tenant name, each from `export`, of the same base with the same inputs.
        base: the base, for programs without weights: a module, checkpoint folder or hub id. Default: that of another
            program that has it, or else the first reference in them.
        slots: how many tenants there is room for. Default: as many as there are programs.
        reserve: what a slot has room for, as in `attach`.
        exact: as in `export`; how the programs were exported does not matter.

    Returns:
        A program with one input more, the keyword `tenant`, int32 [B]: the slot of every row of the batch, -1 for the
        base; slots are given in order. It shares the base's parameters.

    Raises:
        BaseMismatchError: programs of different bases.
        UnsupportedError: graphs that differ, naming the first difference; a batch of fixed size; a parameter that
            differs between tenants and cannot be chosen per row; programs that have a row index already.
    """
    if not programs:
        raise UnsupportedError("there is nothing to merge: give at least one program by tenant name")
    deltas = {name: delta_of(program) for name, program in programs.items()}
    first = _with_weights(programs, base)
    bank = Bank(Base(first.module(check_guards=False)), deltas, slots or len(programs), reserve)
    about = dataclasses.replace(About.of(first), versions=versions())
    return for_rows(first, _common_graph(programs), bank, about, exact=exact)


def _with_weights(programs: Mapping[str, ExportedProgram], base: nn.Module | str | Path | None) -> ExportedProgram:
    """The first of the programs, with weights, after a check that all have the same base.

    Raises:
        BaseMismatchError: naming the first parameter that differs.  UnsupportedError: nobody has weights.
    """
    name, first = next(iter(programs.items()))
    fingerprint = About.of(first).fingerprint
    for other, program in programs.items():
        theirs = About.of(program).fingerprint
        if (theirs.names, theirs.shapes, theirs.digest) != (fingerprint.names, fingerprint.shapes, fingerprint.digest):
            raise BaseMismatchError(f"{name} and {other} were exported from different bases: export both from one")
    complete = {other: program for other, program in programs.items() if not is_weightless(program)}
    if base is not None:
        first = with_base(first, base)
    elif complete:
        first = with_tensors(first, base_parameters(next(iter(complete.values()))))
    else:
        references = [About.of(program).base for program in programs.values()]
        reference = next((each for each in references if each is not None), None)
        if reference is None:
            raise UnsupportedError("none of the programs has weights or says where its base is: give base=")
        first = with_base(first, reference)
    own = base_parameters(first)
    for other, program in complete.items():
        for parameter, tensor in base_parameters(program).items():
            if not same(tensor, own[parameter]):
                raise BaseMismatchError(
                    f"{parameter} of {other}'s base differs from that of {name}: export both from one"
                )
    return first


def _common_graph(programs: Mapping[str, ExportedProgram]) -> BaseGraph:
    """The graph of the programs' base.

    Raises:
        UnsupportedError: they differ.
    """
    name, first = next(iter(programs.items()))
    graph = undo(first, PREFIX, About.of(first).tied)
    for other, program in list(programs.items())[1:]:
        theirs = undo(program, PREFIX, About.of(program).tied)
        difference = first_difference(graph, theirs) or _difference_around(graph, first, program)
        if difference is not None:
            raise UnsupportedError(
                f"the programs {name} and {other} do not have the same graph: {difference}; export both from one base "
                "with the same kind of inputs and dynamic_shapes"
            )
    return graph


def _difference_around(graph: BaseGraph, one: ExportedProgram, other: ExportedProgram) -> str | None:
    """What differs between two programs of the same graph: how they are called, what they return, their buffers."""
    if one.call_spec != other.call_spec:
        return f"one is called as {one.call_spec} and the other as {other.call_spec}"
    parameters = base_parameters(one)
    for name in graph.held.values():
        mine, its = ({**program.constants, **program.state_dict}.get(name) for program in (one, other))
        if name in parameters or not isinstance(mine, Tensor):
            continue
        if not isinstance(its, Tensor) or mine.dtype != its.dtype or not torch.equal(mine, its):
            return f"the buffer {name} has other values"
    return None
