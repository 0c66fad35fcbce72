"""Private names of torch that the backend and the pass need, each behind one function.

Inductor's own are next door: `inductor` registers lowerings, `cpp` subclasses the template, `cache` the cache stamp.
When a new torch moves something, this folder is the place to mend. Written against torch 2.11 to 2.15.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx

log = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

OLDEST = (2, 11)
NEWEST = (2, 15)
SUPPORTED = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"


@functools.cache
def warn_outside_supported_range(version: str = torch.__version__) -> bool:
    """Log one warning, and return True, when this torch is not one the package was tried on."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if OLDEST <= found <= NEWEST:
        return False
    log.warning("torch %s is outside the range %s that this version was tried on", version, SUPPORTED)
    return True


def placeholder_source(node: fx.Node) -> str | None:
    """Where Dynamo found a graph input, as "L['self']._modules['fc']._parameters['weight']"; None without Dynamo."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def copy_source(original: fx.Node, node: fx.Node) -> None:
    """Give the copy of a placeholder the source of its original: AOTAutograd asks every placeholder for one."""
    if hasattr(original, "_dynamo_source"):
        node._dynamo_source = original._dynamo_source


def mark_added_input(node: fx.Node, *, static: bool) -> None:
    """Make a placeholder that we add acceptable to AOTAutograd.

    Args:
        static: it is the same tensor in every call, which CUDA graphs need not copy.
    """
    node._dynamo_source = None
    if static:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def static_example(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that we add, as an example input: fake and of fixed shape.

    AOTAutograd gives symbolic sizes to real tensors that it does not know from Dynamo, and the graph would then be
    specialised, and recompiled, on their relations to the batch size.
    """
    from torch._guards import TracingContext

    tracing = TracingContext.try_get()
    if tracing is None or tracing.fake_mode is None:
        return tensor
    return tracing.fake_mode.from_tensor(tensor, static_shapes=True)


def concrete(value: Any) -> Any:
    """A symbolic size as the plain number it has in this call, without a guard on it; anything else unchanged."""
    if isinstance(value, torch.SymInt):
        hint = value.node.hint
        if hint is None:
            raise ValueError(f"size {value} is not known in this call")
        return int(hint)
    return value


class Compiled(NamedTuple):
    """What torch has compiled in this process since its last `torch._dynamo.reset()`; `-` gives what came between.

    Attributes:
        graphs: that Dynamo has brought.
        compilations: by Inductor, found in one of its caches or not.
        records: of CUDA graphs by Inductor; 0 without a CUDA device.
    """

    graphs: int
    compilations: int
    records: int

    def __sub__(self, before: Compiled) -> Compiled:
        return Compiled(*(now - then for now, then in zip(self, before, strict=True)))


def compiled_so_far() -> Compiled:
    """The counts of this process."""
    from torch._dynamo.utils import compilation_time_metrics, counters

    made, records = (
        len(compilation_time_metrics.get(name, ())) for name in ("compile_fx_inner", "CUDAGraphNode.record")
    )
    found = counters["aot_autograd"]["autograd_cache_hit"]  # Inductor's own cache is looked into further down
    return Compiled(counters["stats"]["unique_graphs"], made + found, records)


def upper_bound(size: Any, shape_env: Any) -> int | None:
    """What a size, a sympy expression over the sizes of a graph's inputs, never exceeds; None where it has no bound."""
    upper = shape_env.bound_sympy(size).upper
    return int(upper) if upper.is_Integer else None


def last_graph_allowed() -> bool:
    """Whether the compilation under way is the last of its code that Dynamo's recompile limit allows."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    compiled = getattr(current, "frame_compile_id", None)
    return compiled is not None and int(compiled) + 1 >= config.recompile_limit


def no_outer_capture(reason: str) -> Callable[[Function], Function]:
    """Keep Dynamo from tracing a function that compiles graphs of its own: it is called as it is."""

    def decorate(function: Function) -> Function:
        disabled: Function = torch.compiler.disable(function, reason=reason)
        return disabled

    return decorate


def is_fake(value: Any) -> bool:
    """Whether a tensor has no data: fake or on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor) or (isinstance(value, torch.Tensor) and value.is_meta)


def inductor_option_names() -> frozenset[str]:
    """Names that Inductor accepts in `options`."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The Inductor options that a `mode` of torch.compile stands for."""
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"unknown mode {mode!r}: torch has {', '.join(sorted(known))}")
    return dict(known[mode])


def row_index_example(size: int | torch.SymInt, graph: fx.Graph) -> torch.Tensor:
    """A row index int32 [size] as an example input: fake where the sizes of the graph's inputs are symbolic."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(size, int):
        return static_example(torch.zeros(size, dtype=torch.int32))
    values = (node.meta.get("example_value", node.meta.get("val")) for node in graph.find_nodes(op="placeholder"))
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with fake_mode:
        return torch.zeros(size, dtype=torch.int32)
