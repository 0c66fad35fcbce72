"""`bdc.export`: a base and its deltas as an ExportedProgram whose graph shows base nodes and packed-delta nodes.

torch.export of the base -> rewrite -> module with the base's signature -> torch.export of that

A quantized weight takes part as the floating-point matrix that it stands for. The program holds it as it is, and its
linear as `bitdelta::base_linear`, which is the library's own wherever the program is run or compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..delta import Delta
from ..errors import UnsupportedError
from ..graph.merge import held_tensors, undo
from ..graph.rewrite import rewrite
from ..quantized import plain_parameters
from ..serve.bank import Bank, Base
from ..serve.reserve import Reserve
from ..sources import DeltaSource
from .program import METADATA, PREFIX, About, base_of, described, with_tensors
from .reexport import add_buffer, for_rows, rewritten_module


def export(
    base: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    delta: Delta | str | Path | Mapping[str, Delta | str | Path],
    dynamic_shapes: Any = None,
    slots: int | None = None,
    reserve: Reserve | Mapping[str, Reserve] | None = None,
    exact: bool = False,
) -> ExportedProgram:
    """Export a base together with one delta, or with those of many tenants.

    Args:
        base: the base model, in eval mode.
        args, kwargs: example inputs, as for `torch.export.export`.
        delta: the fine-tune, or its file. By tenant name: the program serves all of them and has one input more, as
            one of `merge`, which does the same to programs that were exported one by one.
        dynamic_shapes: as for `torch.export.export`; batches of one row are let in by `Dim("batch", min=1)` and
            example inputs of at least two rows.
        slots, reserve: for tenants by name, as in `merge`.
        exact: no delta of a linear is rounded to the precision of a bf16 operand (see `delta_linear`).

    Returns:
        A program with the base's call signature and outputs, that shares the base's parameters.

    Raises:
        BaseMismatchError: `base` is not the one that the delta was made against.
        UnsupportedError: a use of a parameter that cannot be rewritten, or tenants for a batch of fixed size.
    """
    if isinstance(getattr(base, PREFIX.rstrip("."), None), nn.Module):
        raise UnsupportedError(f"the base has a submodule named {PREFIX.rstrip('.')!r}, where its delta would go")
    kwargs = dict(kwargs or {})
    with plain_parameters(base) as quantized:
        program = torch.export.export(base, args, kwargs, dynamic_shapes=dynamic_shapes)
    held = program.state_dict
    program = with_tensors(program, {name: tensor for name, tensor in quantized.items() if name in held})
    about = About(*base_of(program))
    if isinstance(delta, Mapping):
        deltas = {name: _loaded(each) for name, each in delta.items()}
        bank = Bank(Base(base), deltas, slots or len(deltas), reserve)
        return for_rows(program, undo(program, PREFIX, about.tied), bank, about, exact=exact)
    parameters = DeltaSource(_loaded(delta)).parameters(program.graph_module, _inputs(program), by_owner=True)
    rewritten, context = rewrite(program.graph_module, parameters, exact=exact)
    module, _ = rewritten_module(program, rewritten, context, held_tensors(program))
    encodings = {p.name: described(p.encoding) for p in parameters.values()}
    add_buffer(module, METADATA, dataclasses.replace(about, encodings=encodings).tensor())
    return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)


def _loaded(delta: Delta | str | Path) -> Delta:
    return Delta.load(delta) if isinstance(delta, str | Path) else delta


def _inputs(program: ExportedProgram) -> list[Tensor | None]:
    """The value of each placeholder that is a parameter, None for all others."""
    names = program.graph_signature.inputs_to_parameters
    return [
        program.state_dict[names[node.name]] if node.name in names else None
        for node in program.graph.find_nodes(op="placeholder")
    ]
