"""What Inductor generates for a CUDA device, made, run and compiled on a machine that has none.

`generated` compiles a function for fake tensors on a pretended H200 and returns the Python that Inductor would load.
`run` executes that code on CPU tensors: its Triton kernels in Triton's interpreter (start Python with
TRITON_INTERPRET=1), or compiled for a real target and their PTX interpreted (start Python without). `assemble` compiles
a Triton kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._inductor import config
from torch._inductor.runtime import triton_heuristics
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 141 << 30,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_block_optin": 232448,
    "warp_size": 32,
    "L2_cache_size": 50 << 20,
    "gcnArchName": "",
}
HEURISTICS = ("template", "pointwise", "reduction", "persistent_reduction", "user_autotune")


class _Driver:
    """What Inductor asks of Triton's driver before anything is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def pretended_gpu(**properties: Any) -> Iterator[None]:
    """CUDA looks available, with one device; nothing can be allocated on it."""
    found = SimpleNamespace(**{**H200, **properties})
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda *args: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: found,
        "_get_device_properties": lambda device=None: found,
        "get_device_capability": lambda device=None: (found.major, found.minor),
        "get_device_name": lambda device=None: found.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_tf32_supported": lambda: True,
        "get_rng_state": lambda *args: torch.empty(0, dtype=torch.uint8),
        "set_rng_state": lambda *args: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        for name, value in (("_cuda_getDevice", lambda: 0), ("_cuda_getCurrentRawStream", lambda device: 0)):
            stack.enter_context(mock.patch.object(torch._C, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", create=True))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver())
        try:
            yield
        finally:
            triton.runtime.driver._active = before


@contextlib.contextmanager
def _patterns_of_a_cpu() -> Iterator[None]:
    """Inductor's patterns, which it traces with tensors that must exist, are those for a CPU."""
    from torch._inductor.fx_passes import joint_graph, post_grad

    with contextlib.ExitStack() as stack:
        for passes in (joint_graph, post_grad):
            passes.lazy_init(torch.device("cpu"))
            stack.enter_context(mock.patch.object(passes, "lazy_init"))
        yield


class Generated(BaseException):
    """Carries the code out of Inductor: an ordinary exception would be reported as a failure of a pass.

    Attributes:
        files: what goes into a package beside it.
    """

    def __init__(self, code: str, files: Sequence[str] = ()) -> None:
        self.code, self.files = code, list(files)


def generated(*problem: Any, **about: Any) -> str:
    """The code that Inductor generates; arguments as for `compile_until_generated`."""
    from torch._inductor.graph import GraphLowering

    def code_only(self: Any) -> None:
        code = self.codegen()[0]
        raise Generated(getattr(code, "value", code))

    with mock.patch.object(GraphLowering, "compile_to_module", code_only):
        return compile_until_generated(*problem, **about).code


def compile_until_generated(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    compile_graph: Callable[..., Any],
    dynamic: Mapping[int, int] | None = None,
    *,
    one_size: bool = False,
    most: int | None = None,
    **options: Any,
) -> Generated:
    """Compile `function` for CUDA tensors like `inputs` until something raises `Generated`.

    Args:
        compile_graph: `lowering.inductor.compile_graph`, or a stand-in.
        dynamic: input -> its dimension of any size.
        one_size: those dimensions of equal size are of equal size in every call.
        most: what none of them exceeds.
        options: for Inductor.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    settings = {"compile_threads": 1, "fx_graph_cache": False, "shape_padding": False, "autotune_in_subproc": False}
    with _patterns_of_a_cpu(), pretended_gpu(), config.patch(settings):
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
        examples = [
            on_gpu(mode, tensor, (dynamic or {}).get(place), one_size, most) for place, tensor in enumerate(inputs)
        ]
        with torch._guards.tracing(torch._guards.TracingContext(mode)), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compile_graph(torch.fx.symbolic_trace(function), examples, options)
            except Generated as found:
                return found
    raise AssertionError("Inductor generated nothing")


def on_gpu(
    mode: FakeTensorMode,
    tensor: torch.Tensor,
    dynamic: int | None = None,
    one_size: bool = False,
    most: int | None = None,
    device: str = "cuda",
) -> torch.Tensor:
    """A fake tensor on a pretended GPU like `tensor`, its dimension `dynamic` of any size; see `generated`."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext, StrictMinMaxConstraint
    from torch.utils._sympy.value_ranges import ValueRanges

    sizes, constraints = [DimDynamic.STATIC] * tensor.dim(), [None] * tensor.dim()
    if dynamic is not None:
        sizes[dynamic] = DimDynamic.DUCK if one_size else DimDynamic.DYNAMIC
        if most is not None:
            bound: Any = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(1, most))
            constraints[dynamic] = bound
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=constraints)
    with mode:
        return torch.empty_like(mode.from_tensor(tensor, symbolic_context=context), device=device)


@dataclasses.dataclass
class Kernel:
    """One Triton kernel of the generated code: the function, what its decorator was told, and what it is run as."""

    function: Any
    kind: str
    told: dict[str, Any]
    capability: int | None
    record: list[Callable[[], None]] | None = None

    @property
    def parameters(self) -> list[str]:
        """Names of all it takes, constants included."""
        return list(inspect.signature(self.function.fn).parameters)

    @property
    def constants(self) -> set[str]:
        """Names of what it takes at compile time."""
        parameters = inspect.signature(self.function.fn).parameters
        return {name for name, parameter in parameters.items() if "constexpr" in str(parameter.annotation)}

    def run(self, *args: Any, stream: int) -> None:
        """Launch; what follows the kernel's own arguments is the grid."""
        constants = self.constants
        names = [name for name in self.parameters if name not in constants]
        given, grid = dict(zip(names, args, strict=False)), args[len(names) :]
        chosen = {name: value for name, value in self.told["triton_meta"]["constants"].items() if name in constants}
        if not grid:  # a loop over elements: any block sizes will do, but a reduction must fit into one
            chosen |= {name: 64 for name in constants if name.endswith("BLOCK")}
            chosen |= {name: 1 << (int(given["r0_numel"]) - 1).bit_length() for name in constants if name == "R0_BLOCK"}
            grid = tuple(
                -(-int(given[f"{axis}numel"]) // chosen.get(f"{axis.upper()}BLOCK", 1))
                for axis in "xyz"
                if f"{axis}numel" in given
            )
        if self.capability is None:
            self.function[tuple(map(int, grid))](**given, **chosen)
            return
        given |= chosen
        machine = importlib.import_module("measured.ptx.launch")
        compiled = assemble(self, self.capability, chosen)
        launch = functools.partial(machine.execute, compiled, [given.get(name) for name in self.parameters], grid)
        if self.record is not None:
            self.record.append(launch)
        launch()


@dataclasses.dataclass
class _Compiler:
    """Stands in for Inductor's AsyncCompile."""

    capability: int | None = None
    record: list[Callable[[], None]] | None = None

    def triton(self, name: str, source: str, **kwargs: Any) -> Kernel:
        found: list[Kernel] = []

        def heuristic(kind: str) -> Callable[..., Any]:
            def told(**kwargs: Any) -> Callable[[Any], Any]:
                def keep(function: Any) -> Any:
                    found.append(Kernel(function, kind, kwargs, self.capability, self.record))
                    return function

                return keep

            return told

        from torch._inductor.codecache import PyCodeCache
        from torch._inductor.runtime import triton_helpers

        with contextlib.ExitStack() as stack:
            for kind in HEURISTICS:
                stack.enter_context(mock.patch.object(triton_heuristics, kind, heuristic(kind)))
            stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
            PyCodeCache.load_by_key_path(*_written(source))
        return found[-1]

    def wait(self, scope: dict[str, Any]) -> None:
        pass


def _written(source: str) -> tuple[str, str]:
    """A fresh file for the source: Triton reads functions from files, and a replaced decorator must run anew."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.write(source, extra=f"without a GPU {id(object())} {torch.rand(1).item()}")


def module_of(
    code: str, capability: int | None = None, record: list[Callable[[], None]] | None = None
) -> dict[str, Any]:
    """The generated module, with CPU tensors for CUDA's and our kernels for compiled ones."""
    code = code.replace("_empty_strided_cuda", "_empty_strided_cpu").replace("AsyncCompile()", "_compiler")
    code = re.sub(r"with torch\.cuda\._DeviceGuard\(\d+\)", "with _no_guard()", code)
    scope: dict[str, Any] = {
        "__name__": "generated",
        "__file__": "generated",
        "_compiler": _Compiler(capability, record),
        "_no_guard": contextlib.nullcontext,
    }
    exec(compile(code, "generated", "exec"), scope)
    return scope


def run(
    code: str, inputs: Sequence[Any], capability: int | None = None, record: list[Callable[[], None]] | None = None
) -> list[torch.Tensor]:
    """Results of the generated code on CPU tensors; sizes that the code takes come first, as it wants them.

    Args:
        capability: what the kernels are compiled for, None for Triton's interpreter.
        record: gets every launch, to be made again with the same tensors and numbers, as a CUDA graph does.
    """
    with pretended_gpu():
        return list(module_of(code, capability, record)["call"](list(inputs)))


def kernels(code: str) -> dict[str, Kernel]:
    """The Triton kernels of the generated code, by name."""
    with pretended_gpu():
        return {name: value for name, value in module_of(code).items() if isinstance(value, Kernel)}


def assemble(kernel: Kernel, capability: int = 90, chosen: Mapping[str, Any] | None = None) -> Any:
    """The kernel compiled for sm_`capability`.

    Args:
        chosen: constants of loops over elements, whose block sizes are chosen at run time.
    """
    meta = kernel.told["triton_meta"]
    options = {name: kernel.told[name] for name in ("num_warps", "num_stages") if name in kernel.told}
    for entry in kernel.told.get("configs", ()):
        options |= {name: entry[name] for name in ("num_warps", "num_stages") if name in entry}
    constants = {**meta["constants"], **(chosen or {})}
    signature = {name: "constexpr" if name in constants else kind for name, kind in meta["signature"].items()}
    (attributes,) = meta["configs"]
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=dict(attributes))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
