"""`bdc.attach(base, {...})`: one base, many tenants, every row of a call its own.

    model(**inputs, tenants=["sre", None, "legal"])

A call leases the slots of its tenants, makes the row index from them and runs the base's compiled graph with it. The
row index travels beside the graph's inputs in a variable of the calling thread: threads with different tenants never
meet, their forwards run side by side, and only the bank's names are guarded by a lock. Graphs are captured whole
(`fullgraph=True`): what Dynamo cannot capture is an error, because code left to eager would run on the base's weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..delta import Delta
from ..errors import BitDeltaError, UnsupportedError
from ..explain import remember
from ..graph.batch import Batch, value_of
from ..graph.context import Context, Parameter
from ..graph.patterns import stored_transposed
from ..graph.rewrite import rewrite_for_rows
from ..lowering import torch_internals
from ..lowering.inductor import compile_graph
from ..sidefiles import FromBase, unpack
from .bank import Bank, Base
from .reserve import Reserve

DEFAULT_SLOTS = 16


class _Call(threading.local):
    """The row index of the call that this thread is in: int32 [rows]; None outside of one."""

    index: Tensor | None = None


class TenantGraphs:
    """The backend of one attached model: rewrites each graph that Dynamo brings for the bank, and compiles it.

    Attributes:
        graphs: how many have been compiled.
    """

    def __init__(self, bank: Bank, lower: str, dynamic: bool, exact: bool, options: Mapping[str, Any]) -> None:
        self.bank, self.lower, self.dynamic, self.exact, self.options = bank, lower, dynamic, exact, dict(options)
        self.call = _Call()
        self.graphs = 0

    def over(self, bank: Bank) -> TenantGraphs:
        """The same for another bank, with nothing compiled yet."""
        return TenantGraphs(bank, self.lower, self.dynamic, self.exact, self.options)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        index = self.call.index
        assert index is not None, "an attached model's graph is compiled by a call of the model"
        rewritten, context = self._rewrite(gm, example_inputs, index.shape[0])
        remember(context, example_inputs)
        compiled: Callable[..., Any] = rewritten
        if self.lower == "inductor":
            assert context.tenant is not None
            assert context.batch is not None
            if not self.dynamic:
                int(context.batch.size)  # a guard: rows are told apart by now, and the size may become a constant
            added = map(torch_internals.static_example, context.added)
            examples = [*example_inputs, context.tenant.meta["example_value"], *added]
            compiled = compile_graph(rewritten, examples, self.options)
        self.graphs += 1
        call, tensors = self.call, tuple(context.added)
        return lambda *args: compiled(*args, call.index, *tensors)

    def _rewrite(self, gm: fx.GraphModule, inputs: Sequence[Any], rows: int) -> tuple[fx.GraphModule, Context]:
        """The graph for many tenants; parameters that no row can have of its own stay the base's if all have that."""
        bank, placeholders = self.bank, gm.graph.find_nodes(op="placeholder")
        given = dict(zip(placeholders, inputs, strict=True))
        own = [value_of(node) for node, value in given.items() if not isinstance(value, nn.Parameter)]
        batch = Batch.leading(own, rows)
        if batch is None:
            raise UnsupportedError(
                f"the batch size is fixed to {rows} while the model is traced, so rows cannot be told apart: let the "
                "model read it from its inputs, or call it with one row at a time"
            )
        parameters = {
            node: Parameter(name, bank.settle(name, stored_transposed(node)), value, bank.changed(name))
            for node, value in given.items()
            if (name := bank.base.by_id.get(id(value), "")) in bank.stacks and name not in bank.refused
        }
        rewritten, context, refused = rewrite_for_rows(gm, parameters, batch, exact=self.exact)
        if bank.refuse(refused):
            return rewritten, context
        return self._rewrite(gm, inputs, rows)  # a tenant has come that changes what this graph takes for the base's


class _Serving:
    """What calls run on, exchanged as a whole where the model grows: the bank, its graphs and the entries to them."""

    def __init__(self, graphs: TenantGraphs) -> None:
        self.graphs, self.bank = graphs, graphs.bank
        self.compiled: dict[tuple[object, ...], Callable[..., Any]] = {}


class TenantModel(nn.Module):
    """A base with tenants attached; made by `attach`. Inference only.

    Attributes:
        base: the model; its weights are shared by all tenants and must not be written to.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, graphs: TenantGraphs) -> None:
        super().__init__()
        self.base = base
        self.training = False
        own = torch_internals.no_outer_capture("an attached model compiles its own graphs")
        self.__dict__.update(forward=own(self.forward), generate=own(self.generate))
        self._serving = _Serving(graphs)
        self._changing = threading.Lock()  # one change of tenants or room at a time

    @property
    def _bank(self) -> Bank:
        return self._serving.bank

    @property
    def _graphs(self) -> TenantGraphs:
        return self._serving.graphs

    @property
    def tenants(self) -> tuple[str, ...]:
        """Names of the tenants, in the order they came."""
        return self._bank.tenants

    @property
    def slots(self) -> int:
        """How many tenants fit."""
        return self._bank.slots

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, taken or not."""
        return self._bank.nbytes

    @property
    def padding_bytes(self) -> int:
        """Of these, what only fills up the device's layout of the signs."""
        return self._bank.padding_bytes

    @property
    def config(self) -> Any:
        """The base's config."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return next(self.base.parameters()).dtype

    def forward(self, *args: Any, tenants: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Run the base with each row's own delta.

        Args:
            tenants: a name for each row of the inputs, None for the base.
            *args, **kwargs: the base's. Tensors lead with the batch: any whose first size is the number of rows does.

        Returns:
            What the base returns, without gradients. Logits past the vocabulary of a row's tenant are -inf.

        Raises:
            UnsupportedError: unknown names, not one for each row of the inputs, or a model that Dynamo cannot capture
                whole.
        """
        names, serving = _names(tenants), self._serving
        with serving.bank.lease(names) as slots:
            return self._run(serving, self.base, slots, args, kwargs, repeated=False)

    def generate(
        self,
        *args: Any,
        tenants: Sequence[str | None] | None = None,
        generators: Sequence[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, each row by its own tenant and with that tenant's generation config.

        Args:
            tenants: a name for each row of the inputs, None for the base.
            generators: where rows sample, one for each.
            *args, **kwargs: those of the base's `generate`.

        Raises:
            UnsupportedError: unknown names, or a way of generating, or settings, that rows cannot have of their own.
            BitDeltaError: rows, tenants and generators do not match.
        """
        from .generate import generate  # transformers is imported when a model of it is used
        from .profiles import Profile

        base: Any = self.base
        names, serving = _names(tenants), self._serving
        given = dict(zip(("inputs", "generation_config", "logits_processor", "stopping_criteria"), args, strict=False))
        with serving.bank.lease(names) as slots:
            configs = {name: _generation_config(serving.bank, name) for name in set(names)}
            profiles = [Profile(name, configs[name]) for name in names]

            def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                return self._run(serving, module, slots, args, kwargs)

            return generate(base, forward, profiles, {**given, **kwargs}, generators=generators)

    def add(self, name: str, delta: Delta | str | Path) -> None:
        """Attach one more tenant, without compiling anything.

        Raises:
            UnsupportedError: the name is taken, no slot is free, or the delta needs more room than was reserved.
            BaseMismatchError: it was made for another base.  DeltaFileError: it is damaged.
        """
        given = _delta(delta)
        with self._changing:
            self._bank.add(name, given)

    def replace(self, name: str, delta: Delta | str | Path) -> None:
        """Put another delta behind a name: calls under way end with the old one, later ones have the new one.

        Needs a free slot. Raises as `add`.
        """
        given = _delta(delta)
        with self._changing:
            self._bank.add(name, given, replace=True)

    def remove(self, name: str) -> None:
        """Forget a tenant.

        Raises:
            UnsupportedError: unknown, or in use by a call that is under way.
        """
        with self._changing:
            self._bank.remove(name)

    def grow(
        self,
        *,
        slots: int | None = None,
        reserve: Reserve | Mapping[str, Reserve] | None = None,
        fit: Sequence[Delta | str | Path] = (),
    ) -> None:
        """Make room; the graphs are compiled anew when they are next called.

        Args:
            slots: how many tenants, at least as many as now.
            reserve: as in `attach`; what is there already stays.
            fit: deltas that must fit.

        Raises:
            UnsupportedError: fewer slots than now, or calls under way.
        """
        given = [_delta(delta) for delta in fit]
        with self._changing:
            self._serving = _Serving(self._graphs.over(self._bank.grown(slots, reserve, given)))

    def _run(
        self,
        serving: _Serving,
        module: nn.Module,
        slots: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        repeated: bool = True,
    ) -> Any:
        """`module`, the base or a part of it; `repeated`: inputs may repeat every row equally often (beams)."""
        # Aliases, because what marks a tensor's batch stays on it, and the caller's may go elsewhere.
        args = tuple(map(_alias, args))
        kwargs = {name: _alias(value) for name, value in kwargs.items()}
        tensors = list(_tensors((args, kwargs)))
        rows = _rows(tensors)
        if not repeated and rows != len(slots):
            raise UnsupportedError(
                f"{len(slots)} tenants were given for inputs of {rows} rows: name one, or None, for each"
            )
        if not rows or rows % len(slots):
            raise UnsupportedError(f"inputs of {rows} rows cannot be divided among {len(slots)} tenants")
        for tensor in tensors if rows > 1 else ():
            if tensor.dim() and tensor.shape[0] == rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        index = torch.tensor(slots, dtype=torch.int32, device=self.device).repeat_interleave(rows // len(slots))
        call = serving.graphs.call
        before, call.index = call.index, index
        try:
            with torch.no_grad():
                return _entry(serving, module, tensors, rows)(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, BitDeltaError):
                raise error.inner_exception from None
            raise
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise UnsupportedError(
                f"{type(module).__name__} cannot be captured whole, and code left to eager would run on the base's "
                f"weights: {error}"
            ) from error
        finally:
            call.index = before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        raise UnsupportedError("an attached model stays where it is: move or convert the base, then attach")

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(
            "an attached model has no state of its own: save the base, and each delta with save(...)"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError("an attached model loads no weights: load them into the base, then attach")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a tenant's whole checkpoint is written by `Delta.save_pretrained`."""
        raise UnsupportedError(
            "an attached model is many models: delta.save_pretrained(base, folder) writes one tenant's checkpoint"
        )

    def __deepcopy__(self, memo: object) -> TenantModel:
        raise UnsupportedError("an attached model is not copied: attach the tenants to a copy of the base")

    def __reduce_ex__(self, protocol: object) -> Any:
        raise UnsupportedError("an attached model is not pickled: save the base, and each delta with save(...)")

    def train(self, mode: bool = True) -> TenantModel:
        """Only `train(False)`: an attached model is for inference."""
        if mode:
            raise UnsupportedError("an attached model is for inference: train the fine-tune itself and compress it")
        self.base.train(False)
        return self


def attach(
    base: nn.Module,
    tenants: Mapping[str, Delta | str | Path],
    *,
    slots: int | None = None,
    reserve: Reserve | Mapping[str, Reserve] | None = None,
    dynamic: bool = True,
    lower: str = "inductor",
    exact: bool = False,
    options: Mapping[str, Any] | None = None,
) -> TenantModel:
    """Serve many fine-tunes from one base.

    Args:
        base: the loaded model; it is not changed, and must not be while tenants are attached.
        tenants: name -> delta or its file.
        slots: how many tenants the model can hold; default 16, or one more than there are.
        reserve: what a slot can hold beyond one sign plane for every matrix, a tensor of its own for every small
            parameter, and what the first tenants need: a `Reserve` for every matrix, or by parameter name.
        dynamic: one graph for all batches of two rows and more. False: one for every batch size.
        lower: "inductor", or "eager" to run the rewritten graphs as they are.
        exact: no delta of a linear is rounded to the precision of a bf16 operand (see `delta_linear`).
        options: Inductor's.

    Raises:
        BaseMismatchError: a delta of another base.  DeltaFileError: a damaged one.
        UnsupportedError: too few slots, a name that is no string, a base that cannot be shared.
    """
    if isinstance(base, TenantModel):
        raise UnsupportedError("this model has tenants attached: add(...) takes more of them")
    base = getattr(base, "_orig_mod", base)
    if lower not in ("inductor", "eager"):
        raise UnsupportedError(f'lower must be "inductor" or "eager", got {lower!r}')
    if base.training:
        raise UnsupportedError("the base is in training mode: call base.eval() before attaching")
    deltas = {name: _delta(delta) for name, delta in tenants.items()}
    room = slots if slots is not None else max(DEFAULT_SLOTS, len(deltas) + 1)
    bank = Bank(Base(base), deltas, room, reserve)
    return TenantModel(base, TenantGraphs(bank, lower, dynamic, exact, options or {}))


def _delta(delta: Delta | str | Path) -> Delta:
    return delta if isinstance(delta, Delta) else Delta.load(delta)


def _entry(serving: _Serving, module: nn.Module, tensors: Sequence[Tensor], rows: int) -> Callable[..., Any]:
    """The compiled module for inputs of this kind.

    Each kind is a code object of its own to Dynamo, which allows so many graphs for one: prefill, decode and batches of
    one row do not use up each other's.
    """
    batch = min(rows, 2) if serving.graphs.dynamic else rows
    key = (module, batch, len(tensors), *(size == 1 for size in tensors[0].shape[1:]))
    if key not in serving.compiled:

        def entry(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        entry.__code__ = entry.__code__.replace(co_name=f"{type(module).__name__}_with_tenants")
        serving.compiled.setdefault(key, torch.compile(entry, backend=serving.graphs, fullgraph=True))
    return serving.compiled[key]


def _generation_config(bank: Bank, name: str | None) -> Any:
    """The tenant's own, None where its delta has none."""
    from transformers import GenerationConfig

    stored = None if name is None else bank.side_files[name].get("generation_config.json")
    if isinstance(stored, FromBase):
        stored = unpack({"generation_config.json": stored}, bank.base.checkpoint.side_files, "the base")
        stored = stored["generation_config.json"]
    return GenerationConfig.from_dict(stored) if isinstance(stored, dict) else None


def _names(tenants: Sequence[str | None] | None) -> Sequence[str | None]:
    if tenants is None or isinstance(tenants, str) or not len(tenants):
        raise UnsupportedError('say which tenant each row belongs to: tenants=["name", None, ...], None being the base')
    return tenants


def _rows(tensors: Sequence[Tensor]) -> int:
    """The batch of some inputs: what the first matrix, or larger, leads with; a size of 1 may be there to broadcast."""
    sizes = [tensor.shape[0] for tensor in tensors if tensor.dim() > 1]
    sizes = sizes or [tensor.shape[0] for tensor in tensors if tensor.dim()]
    return next((size for size in sizes if size != 1), 1 if sizes else 0)


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _tensors(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Tensors in nested arguments, those in the attributes of plain objects (caches) among them."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        inner = vars(value).values()
    else:
        return
    if depth:
        for each in inner:
            yield from _tensors(each, depth - 1)
