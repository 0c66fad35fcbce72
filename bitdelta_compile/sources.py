"""Where the backend takes a graph's encodings from: a delta over a base model, or a tuned model beside its base.

A source lives as long as the object it was made for, so all graphs of a model (graph breaks, dynamic shapes,
recompilations) share one packed copy.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from .checkpoint import match_names
from .compress.encode import Settings, encode
from .delta import Delta
from .encodings import Encoding, Rows
from .errors import BaseMismatchError, UnsupportedError
from .graph.bind import parameter_inputs
from .graph.patterns import View, embedding_ids
from .graph.rewrite import Parameter
from .lowering import torch_internals

log = logging.getLogger(__name__)

CALIBRATION_TOKENS = 2048


class DeltaSource:
    """The graph is the base's; the delta says what its parameters become."""

    def __init__(self, delta: Delta) -> None:
        self.delta = delta
        self._base_names = match_names(delta.encodings, delta.fingerprint.names)
        self._checked: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def parameters(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, Parameter]:
        """The graph's parameters that the delta knows, each checked against the base's fingerprint."""
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        names = parameter_inputs(gm, example_inputs, [*self.delta.encodings, *self.delta.tied])
        found: dict[fx.Node, Parameter] = {}
        for node, alias in names.items():
            name = self.delta.tied.get(alias, alias)
            encoding = self.delta.encodings[name]
            self._check(name, inputs[node], encoding)
            found[node] = Parameter(name, encoding, inputs[node])
        return found

    def _check(self, name: str, tensor: Tensor, encoding: Encoding) -> None:
        if tensor in self._checked or name not in self._base_names or torch_internals.is_fake(tensor):
            return
        base_name = self._base_names[name]
        shape = self.delta.fingerprint.shape(base_name)
        grown = isinstance(encoding, Rows) and encoding.shape != shape
        if grown and tuple(tensor.shape) == shape:
            raise UnsupportedError(
                f"{name} grew from {list(shape)} to {list(encoding.shape)} in the fine-tune: resize the base before "
                f"compiling, for instance with base.resize_token_embeddings({encoding.shape[0]})"
            )
        comparable = tensor[tuple(slice(0, size) for size in shape)] if grown else tensor
        difference = self.delta.fingerprint.difference(base_name, comparable)
        if difference is not None:
            raise BaseMismatchError(
                f"this model is not the base the delta was made for: {difference}; compile the base it was made against"
            )
        self._checked[tensor] = True

    def release(self, parameters: Mapping[fx.Node, Parameter], example_inputs: Sequence[Any]) -> None:
        raise UnsupportedError(
            "release=True lets go of tuned weights, but this model is the base: leave the option out"
        )


class BaseSource:
    """The graph is the tuned model's; its parameters are compressed against the base when a graph first brings them."""

    def __init__(self, base: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self._base = weakref.ref(base)
        self._encoded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tuned Parameter -> Parameter

    def parameters(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, Parameter]:
        """The graph's parameters that the base has too, compressed."""
        base = self._base()
        if base is None:
            raise UnsupportedError("the base model given in options has been deleted: keep a reference to it")
        theirs = dict(base.named_parameters(remove_duplicate=False))
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        names = parameter_inputs(gm, example_inputs, theirs)
        new = {node: name for node, name in names.items() if inputs[node] not in self._encoded}
        if new:
            self._encode(gm, example_inputs, new, inputs, theirs)
        return {node: self._encoded[inputs[node]] for node in names}

    def _encode(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        new: Mapping[fx.Node, str],
        inputs: Mapping[fx.Node, Any],
        theirs: Mapping[str, Tensor],
    ) -> None:
        tuned = {name: inputs[node] for node, name in new.items()}
        for name, tensor in tuned.items():
            if torch_internals.is_fake(tensor):
                raise UnsupportedError(
                    f"{name} has no data to compress (it is a fake or meta tensor): load the model first"
                )
            if tensor.device != theirs[name].device:
                raise UnsupportedError(
                    f"{name} is on {tensor.device} but the base's is on {theirs[name].device}: move both to one device"
                )
        base = {name: theirs[name].detach() for name in tuned}
        encodings, _ = encode(base, tuned, graph_forward(gm, example_inputs, inputs), self.settings)
        for node, name in new.items():
            self._encoded[inputs[node]] = Parameter(
                name, encodings[name], self._in_tuned_dtype(name, base[name], tuned[name])
            )

    def _in_tuned_dtype(self, name: str, base: Tensor, tuned: Tensor) -> Tensor:
        if base.dtype == tuned.dtype:
            return base
        log.warning(
            "%s is %s in the base and %s in the tuned model: a converted copy is kept, the base is not shared",
            name, base.dtype, tuned.dtype,
        )  # fmt: skip
        return base.to(tuned.dtype)

    def release(self, parameters: Mapping[fx.Node, Parameter], example_inputs: Sequence[Any]) -> None:
        """Let the tuned parameters share the base's storage: what they held is in the packed copy now."""
        placeholders = next(iter(parameters)).graph.find_nodes(op="placeholder") if parameters else []
        inputs = dict(zip(placeholders, example_inputs, strict=True)) if placeholders else {}
        for node, parameter in parameters.items():
            tuned = inputs[node]
            if parameter.base is None or parameter.base.shape != tuned.shape:
                log.info("%s keeps its tuned weights: the base has another shape", parameter.name)
                continue
            tuned.data = parameter.base.data


Source = DeltaSource | BaseSource

_sources: weakref.WeakKeyDictionary[Any, dict[Settings | None, Source]] = weakref.WeakKeyDictionary()


def source_for(owner: Delta | nn.Module, settings: Settings | None) -> Source:
    """The one source of an owner (a delta, or a base with its settings), made when first asked for."""
    sources = _sources.setdefault(owner, {})
    if settings not in sources:
        sources[settings] = (
            DeltaSource(owner) if isinstance(owner, Delta) else BaseSource(owner, settings or Settings())
        )
    return sources[settings]


def graph_forward(
    gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: Mapping[fx.Node, Any]
) -> Callable[[], None] | None:
    """A calibration run of a captured graph, as often as it takes to see `CALIBRATION_TOKENS` tokens.

    Token ids that are looked up in a table are drawn at random from its vocabulary; every other input is the one of
    this call. None when there is nothing to run it on.
    """
    if any(torch_internals.is_fake(value) for value in example_inputs):
        return None
    tables = {
        ids: table.shape[0]
        for node, table in inputs.items()
        if isinstance(table, nn.Parameter)
        for ids in _ids_looked_up(node)
        if ids in inputs and isinstance(inputs[ids], Tensor)
    }
    tokens = max((inputs[ids].numel() for ids in tables), default=0)
    runs = -(-CALIBRATION_TOKENS // tokens) if tokens else 1
    generator = torch.Generator().manual_seed(0)

    def forward() -> None:
        for _ in range(min(runs, CALIBRATION_TOKENS)):
            args = []
            for node, value in inputs.items():
                given = torch_internals.concrete(value)
                if node in tables:
                    drawn = torch.randint(tables[node], tuple(given.shape), generator=generator)
                    given = drawn.to(device=given.device, dtype=given.dtype)
                args.append(given)
            gm(*args)

    return forward


def _ids_looked_up(table: fx.Node) -> list[fx.Node]:
    found = (embedding_ids(user, View(table, transposed=False)) for user in table.users)
    return [ids for ids in found if ids is not None and ids.op == "placeholder"]
