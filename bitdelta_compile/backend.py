"""`torch.compile(model, backend="bitdelta", options={...})`: the way in, and the order of the stages.

    Dynamo graph -> bind (which input is which parameter) -> encode or look up -> rewrite -> Inductor

Options, besides Inductor's own and `"mode"`:

    base      the base model; the compiled model is a fine-tune of it and is compressed now
    delta     a Delta or the path of one; the compiled model is its base
    release   True: let go of the tuned weights once they are packed; their parameters become the base's
    lower     "inductor" (default) or "eager": run the rewritten graph as it is
    exact     True: no delta of a linear is rounded to the precision of a bf16 operand (see `delta_linear`)
    method, planes, rank    how `base` compresses, as in `compress`
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .compress.settings import Settings
from .delta import Delta
from .errors import BaseMismatchError, BitDeltaError, UnsupportedError
from .explain import remember
from .graph.bind import shares_names
from .graph.context import Context, Parameter
from .graph.rewrite import rewrite
from .lowering import torch_internals
from .lowering.inductor import compile_graph
from .sources import BaseSource, DeltaSource, source_for, state_of

log = logging.getLogger(__name__)

_binding = threading.RLock()  # threads that meet a new module at once compress it once

_FIT = ("method", "planes", "rank")
_OURS = ("base", "delta", "release", "lower", "exact", *_FIT)


@dataclasses.dataclass(frozen=True)
class Options:
    """`options` of torch.compile, checked."""

    owner: Delta | nn.Module
    settings: Settings | None
    release: bool
    lower: str
    exact: bool
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
    if not parameters and not shares_names(example_inputs, source.names()):
        raise BaseMismatchError(
            "no parameter of this model is known to the "
            f"{'base' if isinstance(source, BaseSource) else 'delta'}: their names have nothing in common; "
            "check that both are the same architecture"
        )
    # Dynamo hands over its source and its tracing state for this call only: compile now, bind again later.
    rewritten, context = rewrite(gm, parameters, exact=parsed.exact)
    tensors = _Tensors.of(gm, context, parameters, example_inputs)
    remember(context, example_inputs)
    fixed = torch_internals.static_example
    inputs = [fixed(tensors.places[i]) if i in tensors.places else value for i, value in enumerate(example_inputs)]
    if parsed.lower == "eager":
        compiled: Callable[..., Any] = rewritten
    else:
        compiled = compile_graph(rewritten, [*inputs, *map(fixed, tensors.added)], parsed.inductor)
    if parsed.release and isinstance(source, BaseSource):
        source.release(parameters, example_inputs)
        tensors = tensors.restated(example_inputs)
    eager_is_wrong = isinstance(source, DeltaSource) or parsed.release  # what the module itself holds is the base
    if eager_is_wrong and torch_internals.last_graph_allowed():
        log.error(
            "torch allows no more graphs of this code: at the next new shape Dynamo runs it eagerly, on the base's "
            "weights; pass dynamic=True to torch.compile, or raise torch._dynamo.config.recompile_limit"
        )
    return _Compiled(gm, parsed, source, compiled, tensors)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """What a compiled graph is called with for one set of parameters.

    Attributes:
        parameters: position among the inputs, the parameter that the caller passes there, and its state.
        places: position -> the tensor that takes its place.
        added: the inputs that follow the caller's.
        layout: of all that: equal layouts are served by one compiled graph.
    """

    parameters: tuple[tuple[int, weakref.ref[torch.Tensor], object], ...]
    places: Mapping[int, torch.Tensor]
    added: tuple[torch.Tensor, ...]
    layout: object

    @classmethod
    def of(
        cls, gm: fx.GraphModule, context: Context, bound: Mapping[fx.Node, Parameter], inputs: Sequence[Any]
    ) -> _Tensors:
        placeholders = gm.graph.find_nodes(op="placeholder")
        values = [context.values.get(node.name) for node in placeholders]
        return cls(
            _parameters_of(inputs),
            {i: value for i, value in enumerate(values) if value is not None and value is not inputs[i]},
            tuple(context.added),
            tuple((i, bound[node].encoding.layout) for i, node in enumerate(placeholders) if node in bound),
        )

    def fit(self, args: Sequence[Any]) -> bool:
        """Whether they belong to the parameters that the caller passes, and nobody has written to those since."""
        return all(args[at] is parameter() and state_of(args[at]) == state for at, parameter, state in self.parameters)

    def outdated(self, args: Sequence[Any]) -> bool:
        """Whether they can go when tensors for these arguments come: the parameters are the same, or are gone."""
        held = [(args[at], parameter()) for at, parameter, _ in self.parameters]
        return any(parameter is None for _, parameter in held) or all(mine is parameter for mine, parameter in held)

    def restated(self, inputs: Sequence[Any]) -> _Tensors:
        """The same for parameters whose state we have changed ourselves."""
        return dataclasses.replace(self, parameters=_parameters_of(inputs))


def _parameters_of(inputs: Sequence[Any]) -> tuple[tuple[int, weakref.ref[torch.Tensor], object], ...]:
    return tuple((i, weakref.ref(t), state_of(t)) for i, t in enumerate(inputs) if isinstance(t, nn.Parameter))


class _Compiled:
    """A compiled graph as Dynamo calls it.

    Dynamo may call one graph for several modules of one shape: the layers of a model that it compiles one by one. So
    the tensors of the deltas are found by the parameters of the call, and the others of that shape share the code.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        options: Options,
        source: DeltaSource | BaseSource,
        compiled: Callable[..., Any],
        tensors: _Tensors,
    ) -> None:
        self.gm, self.source, self.compiled, self.layout = gm, source, compiled, tensors.layout
        self.release, self.exact = options.release, options.exact
        # A delta given by its path lives as long as a graph of it: the next graph of the model finds it loaded.
        self.owner = options.owner if isinstance(options.owner, Delta) else None
        self.first = tensors
        self.variants: list[tuple[_Tensors, Callable[..., Any]]] = [(tensors, compiled)]
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        found = next((variant for variant in self.variants if variant[0].fit(args)), None)
        tensors, compiled = found or self._bind(args)
        if tensors is self.first:
            self.calls += 1
            if self.calls == 2 and isinstance(self.source, DeltaSource):  # so the model has run through once
                self.source.report_unmet()
        inputs = list(args)
        for position, tensor in tensors.places.items():
            inputs[position] = tensor
        return compiled(*inputs, *tensors.added)

    def _bind(self, args: Sequence[Any]) -> tuple[_Tensors, Callable[..., Any]]:
        """The tensors for parameters that have not come before, or have been written to."""
        with _binding:
            return next((variant for variant in self.variants if variant[0].fit(args)), None) or self._bind_new(args)

    def _bind_new(self, args: Sequence[Any]) -> tuple[_Tensors, Callable[..., Any]]:
        parameters = self.source.parameters(self.gm, args, by_owner=True)
        rewritten, context = rewrite(self.gm, parameters, exact=self.exact)
        tensors = _Tensors.of(self.gm, context, parameters, args)
        remember(context, args)
        compiled = self.compiled
        if tensors.layout != self.layout:
            names = ", ".join(parameter.name for parameter in parameters.values())
            log.warning("%s are encoded otherwise than in the graph they share: they run without Inductor", names)
            compiled = rewritten
        if self.release and isinstance(self.source, BaseSource):
            self.source.release(parameters, args)
            tensors = tensors.restated(args)
        kept = [variant for variant in self.variants if not variant[0].outdated(args)]
        self.variants = [*kept, (tensors, compiled)]
        return self.variants[-1]


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
    flags = {name: given.get(name, False) for name in ("release", "exact")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UnsupportedError(f"option {name} must be True or False, got {value!r}")
    release = flags["release"]
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
        if release:
            raise UnsupportedError(
                "option release lets go of tuned weights, but this model is the base: leave the option out"
            )
        if fit:
            raise UnsupportedError(f"option {next(iter(fit))} belongs to compression, and this delta is already made")
    return Options(owner, settings, release, lower, flags["exact"], _inductor_options(options))


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
