"""`bitdelta::delta_linear` as an Inductor C++ template, the one place that subclasses Inductor's template API.

`DeltaLinearTemplate` fills kernels/delta_linear.cpp.jinja, whose loops call the device functions of kernels/cpu_tile.h;
both end up inside the generated C++, so an AOTInductor package needs nothing of ours.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch._inductor import ir
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V, ops

from bitdelta_compile import kernels

KERNELS = Path(kernels.__file__).parent
_GUARD = "BITDELTA_CPU_TILE"


@functools.cache
def kernel_source(name: str) -> str:
    """Text of a file of kernels/."""
    return (KERNELS / name).read_text(encoding="utf-8")


class DeltaLinearTemplate(CppTemplate):
    """One delta_linear over x [M, K] with M dynamic; see the template for its inputs."""

    def __init__(self, inputs: dict[str, Any], layout: ir.Layout, *, features: int) -> None:
        given = [node for node in inputs.values() if node is not None]
        super().__init__("delta_linear", given, layout, num_threads=parallel_num_threads())
        self.inputs = inputs
        self.features = features

    def device_functions(self) -> str:
        """cpu_tile.h for the instruction set that Inductor compiles for; several kernels may share a source file."""
        isa = str(pick_vec_isa())
        chosen = "AVX512" if isa.startswith(("avx512", "amx")) else "AVX2" if isa.startswith("avx2") else "PORTABLE"
        files = ("cpu_tile.h", "cpu_lowrank.h")
        header = "\n".join(kernel_source(name).replace("#pragma once\n", "") for name in files)
        return f"#ifndef {_GUARD}\n#define {_GUARD}\n#define BITDELTA_{chosen} 1\n{header}\n#endif\n"

    def render(  # type: ignore[override]
        self,
        kernel: Any,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **kwargs: Any,
    ) -> str:
        buffer: Any = self.output_node if template_buffer_node is None else template_buffer_node
        # source: the name by which fused consumers know the tile of accumulators; result: the last of them.
        source, result, result_2d = buffer, buffer, buffer
        epilogues: list[Any] = []
        reindexers: list[Any] = []
        aliases: set[str] = set()
        if epilogue_nodes:
            if flag_template_buffer_has_other_users:
                source = ir.Buffer(name=f"{buffer.get_name()}_acc", layout=buffer.layout)
                epilogues.append(ir.ComputedBuffer(name=buffer.get_name(), layout=buffer.layout, data=_copy(source)))
                reindexers.append(None)
            aliases.add(source.get_name())
            epilogues.extend(epilogue_nodes)
            result = epilogues[-1]
            result_2d, reindexers = gen_2d_view_of_epilogue_buf(
                result, buffer, epilogue_nodes, reindexers, default_reindexers=[None] * len(epilogue_nodes)
            )
        signs = self.inputs["Signs"].get_size()
        left = self.inputs["Left"]
        options = {
            "kernel": kernel,
            "template": self,
            "inputs": {name: node for name, node in self.inputs.items() if node is not None},
            "X": self.inputs["X"],
            "Tenant": self.inputs["Tenant"],
            "Y": result,
            "Y_2d": result_2d,
            "Out": source,
            "aliases": {alias: result.get_name() for alias in aliases},
            "epilogue_nodes": epilogues,
            "reindexers": reindexers,
            "has_col_scale": self.inputs["ColScale"] is not None,
            "K": self.features,
            "T": int(signs[0]),
            "P": int(signs[1]),
            "N": int(signs[2]),
            "rank": 0 if left is None else int(left.get_size()[2]),
            "num_threads": self.num_threads,
        }
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(source)):
            return str(self._template_from_string(kernel_source("delta_linear.cpp.jinja")).render(**options))


def _copy(source: Any) -> ir.Pointwise:
    """A pointwise node that reads `source` and gives it in its own dtype."""
    load = source.make_loader()
    return ir.Pointwise(
        device=source.get_device_or_error(),
        dtype=source.get_dtype(),
        inner_fn=lambda index: ops.to_dtype(load(index), source.get_dtype()),
        ranges=source.get_size(),
    )
