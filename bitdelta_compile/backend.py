"""`torch.compile(model, backend="bitdelta", options={...})`: the way in, and the order of the stages.

    Dynamo graph -> bind (which input is which parameter) -> encode or look up -> rewrite -> Inductor

Options, besides Inductor's own and `"mode"`:

    base      the base model; the compiled model is a fine-tune of it and is compressed now
    delta     a Delta or the path of one; the compiled model is its base
    release   True: let go of the tuned weights once they are packed; their parameters become the base's
    lower     "inductor" (default) or "eager": run the rewritten graph as it is
    method, planes, rank    how `base` compresses, as in `compress`
"""

from __future__ import annotations

import dataclasses
import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .compress.encode import Settings
from .delta import Delta
from .errors import BaseMismatchError, BitDeltaError, UnsupportedError
from .explain import remember
from .graph.rewrite import rewrite
from .lowering import torch_internals
from .lowering.inductor import compile_graph
from .sources import BaseSource, source_for

log = logging.getLogger(__name__)

_FIT = ("method", "planes", "rank")
_OURS = ("base", "delta", "release", "lower", *_FIT)


@dataclasses.dataclass(frozen=True)
class Options:
    """`options` of torch.compile, checked."""

    owner: Delta | nn.Module
    settings: Settings | None
    release: bool
    lower: str
    inductor: Mapping[str, Any]


def bitdelta(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(..., backend="bitdelta")` calls once per graph.

    Args:
        gm: Dynamo's graph; it is not changed.
        example_inputs: its inputs, parameters among them.
        options: see the module docstring.
        mode: only by way of `torch.compile(mode=...)`, which torch refuses together with options: put it into options.

    Returns:
        The compiled graph, with Dynamo's calling convention.

    Raises:
        UnsupportedError: options that make no sense together, or a use that cannot be rewritten.
        BaseMismatchError: the model has nothing in common with the base, or is not the base of the delta.
    """
    torch_internals.warn_outside_supported_range()
    if mode is not None:
        options = {**(options or {}), "mode": mode}
    parsed = parse_options(options or {})
    source = source_for(parsed.owner, parsed.settings)
    parameters = source.parameters(gm, example_inputs)
    if not parameters and any(isinstance(value, nn.Parameter) for value in example_inputs):
        raise BaseMismatchError(
            "no parameter of this model is known to the "
            f"{'base' if isinstance(source, BaseSource) else 'delta'}: their names have nothing in common; "
            "check that both are the same architecture"
        )
    rewritten, context = rewrite(gm, parameters)
    remember(context, example_inputs)
    placeholders = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    keep_base = isinstance(source, BaseSource)
    substitutes = {
        position: context.values[name]
        for position, name in enumerate(placeholders)
        if name in context.values and (keep_base or context.values[name] is not example_inputs[position])
    }
    fixed = torch_internals.static_example
    inputs = [fixed(substitutes[i]) if i in substitutes else value for i, value in enumerate(example_inputs)]
    if parsed.release:
        source.release(parameters, example_inputs)
    added = tuple(context.added)
    if parsed.lower == "eager":
        compiled: Callable[..., Any] = rewritten
    else:
        compiled = compile_graph(rewritten, [*inputs, *map(fixed, added)], parsed.inductor)
    return _with_tensors(compiled, substitutes, added)


def _with_tensors(
    compiled: Callable[..., Any], substitutes: Mapping[int, torch.Tensor], added: tuple[torch.Tensor, ...]
) -> Callable[..., Any]:
    """The compiled graph as Dynamo calls it: our tensors put in their places."""
    places = tuple(substitutes.items())

    def call(*args: Any) -> Any:
        inputs = list(args)
        for position, tensor in places:
            inputs[position] = tensor
        return compiled(*inputs, *added)

    return call


def parse_options(options: Mapping[str, Any]) -> Options:
    """Check the options of torch.compile and sort ours from Inductor's.

    Raises:
        UnsupportedError: neither or both of base and delta, an unknown name, a value of the wrong kind.
    """
    given = {name: value for name, value in options.items() if name in _OURS}
    if ("base" in given) == ("delta" in given):
        raise UnsupportedError(
            'backend "bitdelta" needs options={"base": base_model} for a fine-tuned model, '
            'or options={"delta": delta_or_path} for the base: exactly one of the two'
        )
    lower = given.get("lower", "inductor")
    if lower not in ("inductor", "eager"):
        raise UnsupportedError(f'option lower must be "inductor" or "eager", got {lower!r}')
    fit = {name: given[name] for name in _FIT if name in given}
    settings: Settings | None = None
    owner: Delta | nn.Module
    if "base" in given:
        owner = given["base"]
        if not isinstance(owner, nn.Module):
            raise UnsupportedError(f"option base must be a loaded model (an nn.Module), got {type(owner).__name__}")
        owner = getattr(owner, "_orig_mod", owner)
        try:
            settings = Settings(**fit)
        except (TypeError, ValueError) as error:
            raise UnsupportedError(f"options: {error}") from None
    else:
        owner = _load(given["delta"])
        if fit:
            raise UnsupportedError(f"option {next(iter(fit))} belongs to compression, and this delta is already made")
    return Options(owner, settings, bool(given.get("release", False)), lower, _inductor_options(options))


def _inductor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if name not in _OURS}
    mode = rest.pop("mode", None)
    try:
        patches = torch_internals.inductor_mode_options(mode) if mode not in (None, "default") else {}
    except ValueError as error:
        raise UnsupportedError(f"options: {error}") from None
    known = torch_internals.inductor_option_names() if rest else frozenset()
    for name in rest:
        if name.replace("-", "_") not in known:
            raise UnsupportedError(
                f'unknown option "{name}": ours are {", ".join(_OURS)}, mode; the rest are Inductor\'s'
            )
    return {**patches, **{name.replace("-", "_"): value for name, value in rest.items()}}


_files: weakref.WeakValueDictionary[tuple[str, int, int], Delta] = weakref.WeakValueDictionary()


def _load(delta: Any) -> Delta:
    """A delta, or the one in a file: the same object for as long as the file is the same and somebody holds it."""
    if isinstance(delta, Delta):
        return delta
    if not isinstance(delta, str | os.PathLike):
        raise UnsupportedError(f"option delta must be a Delta or a path, got {type(delta).__name__}")
    path = Path(delta)
    try:
        status = path.stat()
    except OSError as error:
        raise BitDeltaError(f"cannot open the delta {path}: {error.strerror}") from None
    key = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    found = _files.get(key)
    if found is None:
        found = Delta.load(path)
        _files[key] = found
    return found
