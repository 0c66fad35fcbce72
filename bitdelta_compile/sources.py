"""Where the backend takes a graph's encodings from: a delta over a base model, or a tuned model beside its base.

A source lives as long as the object it was made for, so all graphs of a model (graph breaks, dynamic shapes,
recompilations) share one packed copy.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import quantized, released
from .checkpoint import match_names
from .compress.encode import encode, unrelated
from .compress.settings import Settings
from .compress.streams import Run
from .delta import Delta
from .deltafile import require_finite
from .encodings import Dense, Encoding, Rows
from .errors import BaseMismatchError, UnsupportedError
from .graph.bind import parameter_inputs, tied_names
from .graph.context import Parameter
from .graph.patterns import View, embedding_ids
from .lowering import torch_internals

log = logging.getLogger(__name__)

CALIBRATION_TOKENS = 2048
CALIBRATION_RUNS = 64  # at most: a first call of one token must not cost thousands of forwards


class DeltaSource:
    """The graph is the base's; the delta says what its parameters become."""

    def __init__(self, delta: Delta) -> None:
        # Not the delta itself: sources are kept under it, weakly.
        self._encodings, self._tied, self._fingerprint = delta.encodings, delta.tied, delta.fingerprint
        self._base_names = match_names(delta.encodings, delta.fingerprint.names)
        self._bound: WeakIdKeyDictionary = WeakIdKeyDictionary()  # base Parameter -> (its state, its encoding there)
        self._unmet = {name for name, encoding in delta.encodings.items() if encoding.kind != "same"}

    def parameters(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, by_owner: bool = False
    ) -> dict[fx.Node, Parameter]:
        """The graph's parameters that the delta knows, each checked against the base's fingerprint."""
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        names = parameter_inputs(gm, example_inputs, self.names(), by_owner=by_owner)
        self._check_ties([inputs[node] for node in names])
        found: dict[fx.Node, Parameter] = {}
        for node, alias in names.items():
            name, tensor = self._tied.get(alias, alias), inputs[node]
            # Written to, it may be another base; `.to()` moves a parameter and keeps its identity.
            if self._bound.get(tensor, (None,))[0] != state_of(tensor):
                self._check(name, alias, tensor)
                with torch.inference_mode(False):
                    self._bound[tensor] = (state_of(tensor), _placed(self._encodings[name], tensor))
            found[node] = Parameter(name, self._bound[tensor][1], tensor)
            self._unmet.discard(name)
        return found

    def names(self) -> list[str]:
        """Names the delta knows, aliases included."""
        return [*self._encodings, *self._tied]

    def _check_ties(self, tensors: Sequence[Tensor]) -> None:
        """One tensor of the base cannot become two."""
        for aliases in tied_names((tensor for tensor in tensors if tensor not in self._bound), self.names()):
            apart = sorted({self._tied.get(alias, alias) for alias in aliases})
            if len(apart) > 1:
                raise UnsupportedError(
                    f"{' and '.join(apart)} are one tensor in this model but two in the fine-tune: untie them before "
                    f"compiling, giving {apart[-1]} a copy of its own"
                )

    def _check(self, name: str, alias: str, tensor: Tensor) -> None:
        """Refuse a tensor that is not the base's, and an encoding that this graph cannot take."""
        encoding = self._encodings[name]
        if isinstance(encoding, Dense) and encoding.shape != tuple(tensor.shape):
            raise UnsupportedError(
                f"{name} has shape {list(tensor.shape)} in this model and {list(encoding.shape)} in the fine-tune: "
                "give the base a parameter of that shape before compiling, for instance with num_labels=... or "
                "resize_token_embeddings(...)"
            )
        require_finite(name, encoding)
        if name not in self._base_names or torch_internals.is_fake(tensor):
            return
        base_name = self._base_names[name]
        shape = self._fingerprint.shape(base_name)
        grown = isinstance(encoding, Rows) and encoding.shape != shape
        whole = quantized.values(tensor)
        comparable = whole[tuple(slice(0, size) for size in shape)] if grown else whole
        difference = self._fingerprint.difference(base_name, comparable)
        if difference is not None and alias != name:
            raise UnsupportedError(
                f"{alias} and {name} are one tensor in the fine-tune but two in this model: tie the base's weights "
                "before compiling, for instance with base.tie_weights()"
            )
        if difference is not None:
            raise BaseMismatchError(
                f"this model is not the base the delta was made for: {difference}; {quantized.remedy(tensor)}"
            )

    def report_unmet(self) -> None:
        """Say once which parameters no graph has had, when all should have come: eager layers run on base weights."""
        if self._unmet:
            log.warning(
                "%d parameters of the delta have met no compiled graph (%s is the first): if the model uses them, "
                "Dynamo left those layers to eager, where they run on the base's weights; fullgraph=True shows why",
                len(self._unmet), min(self._unmet),
            )  # fmt: skip
            self._unmet.clear()


class BaseSource:
    """The graph is the tuned model's; its parameters are compressed against the base when a graph first brings them."""

    def __init__(self, base: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self._base = weakref.ref(base)
        self._encoded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tuned Parameter -> _Encoded

    def parameters(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, by_owner: bool = False
    ) -> dict[fx.Node, Parameter]:
        """The graph's parameters that the base has too, compressed."""
        theirs = self._theirs()
        inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        names = parameter_inputs(gm, example_inputs, theirs, by_owner=by_owner)
        for node, name in names.items():
            self._follow(name, inputs[node], theirs[name])
        new = {node: name for node, name in names.items() if not self._is_encoded(inputs[node])}
        if new:
            self._encode(gm, example_inputs, new, inputs, theirs)
        return {node: self._encoded[inputs[node]].bound for node in names}

    def names(self) -> list[str]:
        """Names of the base's parameters, aliases included."""
        return list(self._theirs())

    def _theirs(self) -> dict[str, Tensor]:
        base = self._base()
        if base is None:
            raise UnsupportedError("the base model given in options has been deleted: keep a reference to it")
        return dict(base.named_parameters(remove_duplicate=False))

    def _is_encoded(self, tuned: Tensor) -> bool:
        """Whether it was compressed and nobody has written to it since (another checkpoint loaded, a training step)."""
        return tuned in self._encoded and self._encoded[tuned].state == state_of(tuned)

    def _follow(self, name: str, tuned: Tensor, base: Tensor) -> None:
        """A parameter that was moved or converted, and not written to, keeps its encoding: the delta follows it."""
        known = self._encoded.get(tuned)
        state = state_of(tuned)
        if known is None or known.state[1:3] == state[1:3] or known.state[0] != state[0]:
            return
        with torch.inference_mode(False):
            here = self._in_tuned_dtype(name, base.detach().to(tuned.device), tuned)
            bound = Parameter(name, _placed(known.bound.encoding, tuned), here)
        self._encoded[tuned] = _Encoded(state, bound)

    def _encode(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        new: Mapping[fx.Node, str],
        inputs: Mapping[fx.Node, Any],
        theirs: Mapping[str, Tensor],
    ) -> None:
        tuned = {name: inputs[node] for node, name in new.items()}
        released.refuse(tuned.items())
        quantized.refuse(tuned.items())
        for name, tensor in tuned.items():
            if torch_internals.is_fake(tensor):
                raise UnsupportedError(
                    f"{name} has no data to compress (it is a fake or meta tensor): load the model first"
                )
            if tensor.device != theirs[name].device:
                raise UnsupportedError(
                    f"{name} is on {tensor.device} but the base's is on {theirs[name].device}: move both to one device"
                )
        # What is made here outlives the call, which may be under torch.inference_mode.
        with torch.inference_mode(False):
            base = {name: theirs[name].detach() for name in tuned}
            runs = graph_runs(gm, example_inputs, inputs)
            encodings, report = encode(quantized.Values(base), tuned, runs, self.settings)
            self._check_related(unrelated(encodings, report, self.settings), theirs)
            for node, name in new.items():
                here = self._in_tuned_dtype(name, base[name], tuned[name])
                bound = Parameter(name, _placed(encodings[name], tuned[name]), here)
                self._encoded[inputs[node]] = _Encoded(state_of(inputs[node]), bound)

    def _check_related(self, matrices: Sequence[str], theirs: Mapping[str, Tensor]) -> None:
        """Matrices that all have to be stored outright: a new head, or no fine-tune of this base at all."""
        if not matrices:
            return
        message = (
            f"none of the {len(matrices)} matrices of this graph is near the base's ({matrices[0]} is the first): "
            "a delta cannot pay"
        )
        of_base = sum(tensor.dim() == 2 and tensor.numel() >= self.settings.min_elements for tensor in theirs.values())
        if 2 * len(matrices) > of_base:
            raise BaseMismatchError(f"{message}; give the model that was fine-tuned as the base")
        log.warning("%s, the tuned tensors are kept", message)

    def _in_tuned_dtype(self, name: str, base: Tensor, tuned: Tensor) -> Tensor:
        if base.dtype == tuned.dtype:
            return base
        if quantized.is_quantized(base):
            raise UnsupportedError(
                f"{name} is quantized from {base.dtype} in the base and {tuned.dtype} in the tuned model: convert the "
                "base to that dtype before quantizing it"
            )
        log.warning(
            "%s is %s in the base and %s in the tuned model: a converted copy is kept, the base is not shared",
            name, base.dtype, tuned.dtype,
        )  # fmt: skip
        return base.to(tuned.dtype)

    def release(self, parameters: Mapping[fx.Node, Parameter], example_inputs: Sequence[Any]) -> None:
        """Let the tuned parameters share the base's storage: what they held is in the packed copy now.

        Whoever writes into the tuned model afterwards writes into the base.
        """
        placeholders = next(iter(parameters)).graph.find_nodes(op="placeholder") if parameters else []
        inputs = dict(zip(placeholders, example_inputs, strict=True)) if placeholders else {}
        for node, parameter in parameters.items():
            tuned = inputs[node]
            if parameter.base is None or parameter.base.shape != tuned.shape:
                log.info("%s keeps its tuned weights: the base has another shape", parameter.name)
                continue
            if quantized.is_quantized(parameter.base):
                log.warning(
                    "%s keeps its tuned weights, which cannot share a quantized tensor: to hold the base alone, "
                    "compile it with the delta of bdc.compress",
                    parameter.name,
                )
                continue
            tuned.data = parameter.base.data
            released.mark(tuned)
            self._encoded[tuned] = _Encoded(state_of(tuned), parameter)


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A tuned parameter's encoding, and the state of the parameter that it was made of."""

    state: State
    bound: Parameter


State = tuple[int, torch.dtype, torch.device, tuple[int, ...]]


def state_of(tensor: Tensor) -> State:
    """Changes with `.to()`, with other values in `.data`, and with every write to a tensor that torch counts: under
    torch.inference_mode, and through `.data`, it counts none."""
    if type(tensor) is nn.Parameter:  # asked of each parameter at each call
        places: tuple[int, ...] = (tensor.data_ptr(),)
    else:
        places = () if torch_internals.is_fake(tensor) else tuple(part.data_ptr() for part in quantized.parts(tensor))
    return 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device, places


def _placed(encoding: Encoding, parameter: Tensor) -> Encoding:
    """The encoding where the graph runs: on the parameter's device, tuned values in the parameter's dtype."""
    fields: dict[str, Any] = {
        name: tensor.to(parameter.device, parameter.dtype if name in ("value", "values") else tensor.dtype)
        for name, tensor in encoding.tensors().items()
    }
    if isinstance(encoding, Rows) and encoding.over is not None:
        fields["over"] = _placed(encoding.over, parameter)
    return dataclasses.replace(encoding, **fields)


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


def graph_runs(gm: fx.GraphModule, example_inputs: Sequence[Any], inputs: Mapping[fx.Node, Any]) -> list[Run]:
    """Calibration on a captured graph, as many runs as it takes to see `CALIBRATION_TOKENS` tokens.

    Token ids that are looked up in a table are drawn at random from its vocabulary; every other input is the one of
    this call. None when there is nothing to run it on.
    """
    if any(torch_internals.is_fake(value) for value in example_inputs):
        return []
    tables = {
        ids: table.shape[0]
        for node, table in inputs.items()
        if isinstance(table, nn.Parameter)
        for ids in _ids_looked_up(node)
        if ids in inputs and isinstance(inputs[ids], Tensor)
    }
    tokens = max((inputs[ids].numel() for ids in tables), default=0)
    count = min(-(-CALIBRATION_TOKENS // tokens) if tokens else 1, CALIBRATION_RUNS)
    generator = torch.Generator().manual_seed(0)

    def drawn(node: fx.Node, given: Any) -> Any:
        if node not in tables:
            return given
        ids = torch.randint(tables[node], tuple(given.shape), generator=generator)
        return ids.to(device=given.device, dtype=given.dtype)

    concrete = {node: torch_internals.concrete(value) for node, value in inputs.items()}
    batches = [[drawn(node, value) for node, value in concrete.items()] for _ in range(count)]
    return [Run(functools.partial(_on_copies, gm, batch)) for batch in batches]


def _on_copies(gm: fx.GraphModule, batch: Sequence[Any]) -> object:
    """Run a graph; what it writes to (buffers, the caller's caches) is not the caller's."""
    return gm(*(v.clone() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter) else v for v in batch))


def _ids_looked_up(table: fx.Node) -> list[fx.Node]:
    found = (embedding_ids(user, View(table, transposed=False)) for user in table.users)
    return [ids for ids in found if ids is not None and ids.op == "placeholder"]
