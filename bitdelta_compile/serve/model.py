"""`bdc.attach(base, {...})`: one base, many tenants, every row of a call its own.

    model(**inputs, tenants=["sre", None, "legal"])

A call leases the slots of its tenants, makes the row index from them and runs the base's compiled graph with it. The row
index travels beside the graph's inputs in a variable of the calling thread: threads with different tenants never meet,
their forwards run side by side, and only the bank's names are guarded by a lock. Graphs are captured whole
(`fullgraph=True`): what Dynamo cannot capture is an error, because code left to eager would run on the base's weights.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..delta import Delta
from ..errors import UnsupportedError
from ..explain import remember
from ..graph.batch import Batch
from ..graph.context import Context, NoRowForm, Parameter
from ..graph.rewrite import rewrite
from ..lowering import torch_internals
from ..lowering.inductor import compile_graph
from .bank import Bank, Base, Lease
from .reserve import Reserve

log = logging.getLogger(__name__)

DEFAULT_SLOTS = 16


class _Call(threading.local):
    """The row index of the call that this thread is in: int32 [rows], and how many rows its inputs have."""

    index: Tensor | None = None


class TenantGraphs:
    """The backend of one attached model: rewrites each graph that Dynamo brings for the bank, and compiles it.

    Attributes:
        graphs: how many have been compiled.
    """

    def __init__(self, bank: Bank, lower: str, options: Mapping[str, Any]) -> None:
        self.bank, self.lower, self.options = bank, lower, dict(options)
        self.call = _Call()
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        index = self.call.index
        assert index is not None, "an attached model's graph is compiled by a call of the model"
        rewritten, context = self._rewrite(gm, example_inputs, index.shape[0])
        remember(context, example_inputs)
        tenant = context.graph.find_nodes(op="placeholder")[len(example_inputs)]
        fixed = torch_internals.static_example
        if self.lower == "eager":
            compiled: Callable[..., Any] = rewritten
        else:
            examples = [*example_inputs, tenant.meta["example_value"], *map(fixed, context.added)]
            compiled = compile_graph(rewritten, examples, self.options)
        self.graphs += 1
        call, added = self.call, tuple(context.added)

        def run(*args: Any) -> Any:
            return compiled(*args, call.index, *added)

        return run

    def _rewrite(self, gm: fx.GraphModule, inputs: Sequence[Any], rows: int) -> tuple[fx.GraphModule, Context]:
        """The graph for many tenants. Parameters that it cannot give each row its own keep the base's, if all have it."""
        bank = self.bank
        placeholders = gm.graph.find_nodes(op="placeholder")
        known = bank.base.by_id
        batch = Batch.leading(
            [
                node.meta.get("example_value")
                for node, value in zip(placeholders, inputs, strict=True)
                if not isinstance(value, nn.Parameter)
            ],
            rows,
        )
        if batch is None:
            raise UnsupportedError(
                f"the model fixes its batch size to {rows} while it is traced, so rows cannot be told apart: "
                "let it read the batch size from its inputs, or call it with one row at a time"
            )
        while True:
            parameters = {
                node: Parameter(name, bank.stacks[name], value, bank.changed(name))
                for node, value in zip(placeholders, inputs, strict=True)
                if (name := known.get(id(value))) in bank.stacks and name not in bank.refused
            }
            try:
                return rewrite(gm, parameters, batch)
            except NoRowForm as error:
                if error.parameter.tenants:
                    raise
                bank.refused[error.parameter.name] = str(error)
                log.info("%s", error)


class TenantModel(nn.Module):
    """A base with tenants attached. Inference only; made by `attach`.

    Attributes:
        base: the model; its weights are shared by all tenants and must not be written to.
        tenants: names.
    """

    base: nn.Module

    def __init__(self, base: nn.Module, bank: Bank, lower: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.base = base
        self._bank = bank
        self._graphs = TenantGraphs(bank, lower, options)
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self.training = base.training

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

    @torch.compiler.disable(reason="an attached model compiles its own graphs")
    def forward(self, *args: Any, tenants: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        """Run the base with each row's own delta.

        Args:
            tenants: a name for each row of the inputs, None for the base. A single name or None is not spread.
            *args, **kwargs: the base's; tensors lead with the batch.

        Returns:
            What the base returns. Logits past the vocabulary of a row's tenant are -inf.

        Raises:
            UnsupportedError: unknown names, as many names as the inputs have no rows, or a model that cannot be captured
                whole.
        """
        if tenants is None or isinstance(tenants, str):
            raise UnsupportedError(
                'say which tenant each row belongs to: model(..., tenants=["name", None, ...]), None being the base'
            )
        with self._bank.lease(tenants) as lease:
            rows = _rows((args, kwargs))
            if rows != len(lease.slots):
                raise UnsupportedError(f"{len(lease.slots)} tenants were given for inputs of {rows} rows: one for each")
            return self._run(self.base, lease, args, kwargs)

    def add(self, name: str, delta: Delta | str | Path) -> None:
        """Attach one more tenant, without compiling anything.

        Raises:
            UnsupportedError: the name is taken, no slot is free, or the delta needs more room than was reserved.
            BaseMismatchError: it was made for another base.  DeltaFileError: it is damaged.
        """
        self._bank.add(name, _delta(delta))

    def replace(self, name: str, delta: Delta | str | Path) -> None:
        """Put another delta behind a name: calls under way end with the old one, later ones have the new one.

        Needs a free slot. Raises as `add`.
        """
        self._bank.add(name, _delta(delta), replace=True)

    def remove(self, name: str) -> None:
        """Forget a tenant.

        Raises:
            UnsupportedError: unknown, or in use by a call that is under way.
        """
        self._bank.remove(name)

    def _run(self, module: nn.Module, lease: Lease, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`module`, the base or a part of it, with the rows of a lease, each as often as the inputs repeat it."""
        rows = _rows((args, kwargs))
        if not rows or rows % len(lease.slots):
            raise UnsupportedError(f"inputs of {rows} rows cannot be divided among {len(lease.slots)} tenants")
        if rows > 1:
            for tensor in _tensors((args, kwargs)):
                if tensor.dim() and tensor.shape[0] == rows:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        device = next(self.base.parameters()).device
        index = torch.tensor(lease.slots, dtype=torch.int32, device=device).repeat_interleave(rows // len(lease.slots))
        if module not in self._compiled:
            self._compiled[module] = torch.compile(module, backend=self._graphs, fullgraph=True)
        call = self._graphs.call
        before, call.index = call.index, index
        try:
            with torch.no_grad():
                return self._compiled[module](*args, **kwargs)
        finally:
            call.index = before

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


def attach(
    base: nn.Module,
    tenants: Mapping[str, Delta | str | Path],
    *,
    slots: int | None = None,
    reserve: Reserve | Mapping[str, Reserve] | None = None,
    lower: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> TenantModel:
    """Serve many fine-tunes from one base.

    Args:
        base: the loaded model; it is not changed, and must not be while tenants are attached.
        tenants: name -> delta or its file.
        slots: how many tenants the model can hold; default 16, or one more than there are.
        reserve: what a slot can hold beyond one sign plane for every matrix, a tensor of its own for every small
            parameter, and what the first tenants need: a `Reserve` for every matrix, or by parameter name.
        lower: "inductor", or "eager" to run the rewritten graphs as they are.
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
    deltas = {name: _delta(delta) for name, delta in tenants.items()}
    room = slots if slots is not None else max(DEFAULT_SLOTS, len(deltas) + 1)
    return TenantModel(base, Bank(Base(base), deltas, room, reserve), lower, options or {})


def _delta(delta: Delta | str | Path) -> Delta:
    return delta if isinstance(delta, Delta) else Delta.load(delta)


def _rows(values: Any) -> int:
    """The batch of some inputs: the leading size of the first tensor that has one."""
    return next((tensor.shape[0] for tensor in _tensors(values) if tensor.dim()), 0)


def _tensors(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Tensors in nested arguments, those in the attributes of plain objects (caches) among them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each, depth - 1) if depth else ()
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each, depth - 1) if depth else ()
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and depth:
        yield from _tensors(vars(value), depth - 1)
