"""What AOTInductor puts into a package for a CUDA device, on a machine that has none: C++, and kernels for sm_90.

AOTInductor takes compiled kernels from a run of the generated Python. Here they are compiled without one, as
`without_gpu.assemble` does, and handed over in the same place; the C++ is AOTInductor's own.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest import mock

import without_gpu
from torch._inductor import codecache, config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.virtualized import V


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as the C++ launches it.

    Attributes:
        file, name: where it is loaded from.
        warps, shared: of the launch.
        arguments: how many the C++ hands over.
        compiled: what Triton made.
    """

    file: Path
    name: str
    warps: int
    shared: int
    arguments: int
    compiled: Any


@dataclasses.dataclass(frozen=True)
class Package:
    """C++ that AOTInductor would compile, its kernels, and the files that go into the package beside it."""

    code: str
    launches: dict[str, Launch]
    files: list[Path]


def package(folder: Path, *problem: Any, **about: Any) -> Package:
    """What would go into a package made in `folder`; the rest as for `without_gpu.compile_until_generated`."""
    made: dict[str, Any] = {}

    def compile_kernels(self: Any) -> None:
        scope = without_gpu.module_of(self.kernel_autotune_defs.getvalue())
        for name, kernel in scope.items():
            if isinstance(kernel, without_gpu.Kernel):
                made[name] = _hand_over(name, kernel)

    def code_only(graph: Any, code: str, *args: Any, **kwargs: Any) -> None:
        raise without_gpu.Generated(code, graph.wrapper_code.additional_files)

    settings = {
        "cpp_wrapper": True,
        "triton.autotune_at_compile_time": True,
        "triton.unique_kernel_names": True,
        "aot_inductor.package": True,
        "aot_inductor.output_path": str(folder),
        "aot_inductor.embed_kernel_binary": False,
    }
    with (
        config.patch(settings),
        mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", compile_kernels),
        mock.patch.object(codecache.AotCodeCompiler, "compile", code_only),
        V.set_aot_compilation(True),
    ):
        found = without_gpu.compile_until_generated(*problem, **about)
    launches = {name: _launch(name, found.code, compiled) for name, compiled in made.items()}
    return Package(found.code, launches, [Path(file) for file in found.files if isinstance(file, str)])


def _hand_over(name: str, kernel: Any) -> Any:
    """Compile a kernel and keep it where AOTInductor looks for it."""
    meta = kernel.told["triton_meta"]
    chosen = {each: 64 for each in kernel.constants if each.endswith("BLOCK") and each not in meta["constants"]}
    compiled = without_gpu.assemble(kernel, 90, chosen)
    handed = [each for each in kernel.parameters if each not in kernel.constants]
    parameters: dict[str, Any] = {
        "mangled_name": compiled.metadata.name,
        "num_warps": compiled.metadata.num_warps,
        "shared_mem": compiled.metadata.shared,
        "stream": "stream",
        "config": {**chosen, "num_warps": compiled.metadata.num_warps, "num_stages": 1},
        "inductor_meta": dict(kernel.told["inductor_meta"]),
        "triton_meta": meta,
        "def_args": handed + list(kernel.told["inductor_meta"].get("extra_launcher_args", ())),
        "call_args": handed,
        "global_scratch": 0,
        "profile_scratch": 0,
    }
    codecache.CudaKernelParamCache.set(name, parameters, compiled.asm["cubin"], "cubin", compiled.asm["ptx"], "ptx")
    return compiled


def _launch(name: str, code: str, compiled: Any) -> Launch:
    (found,) = re.findall(
        rf'kernels_\.{name} = loadKernel\("([^"]+)", "(\w+)", (\d+), .*?kernel_args_\[\] = \{{(.*?)\}};\s*'
        rf"launchKernel\(kernels_\.{name}, grid_0, grid_1, grid_2, (\d+), (\d+), kernel_args_",
        code,
        re.DOTALL,
    )
    file, entry, loaded, arguments, warps, shared = found
    assert loaded == shared
    return Launch(Path(file), entry, int(warps), int(shared), arguments.count("&"), compiled)
