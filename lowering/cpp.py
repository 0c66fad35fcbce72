"""The CPU kernels as Inductor C++ templates, the one place that subclasses Inductor's template API.

Each template fills a kernels/*.cpp.jinja, whose loops call the device functions of kernels/cpu_*.h; both end up inside
the generated C++, so an AOTInductor package needs nothing of ours.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import sympy
import torch
from torch._inductor import ir
from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.utils import parallel_num_threads
from torch._inductor.virtualized import V, ops

from bitdelta_compile import kernels

KERNELS = Path(kernels.__file__).parent
_NOT_INLINED = re.compile(r'^#pragma once\n|^#include "cpu_\w+\.h"\n', re.MULTILINE)


@functools.cache
def kernel_source(name: str) -> str:
    """Text of a file of kernels/."""
    return (KERNELS / name).read_text(encoding="utf-8")


def instruction_set() -> Literal["AVX512", "AVX2", "PORTABLE"]:
    """What Inductor compiles for: narrower than this machine's where `cpp.simdlen` says so."""
    isa = str(pick_vec_isa())
    return "AVX512" if isa.startswith(("avx512", "amx")) else "AVX2" if isa.startswith("avx2") else "PORTABLE"


class RowsTemplate(CppTemplate):
    """A kernel from x [M, K] to [M, N], M dynamic, with the pointwise consumers that Inductor fuses.

    Args:
        inputs: name in the template -> realized node, or None where the op has none.
        layout: of the result.
    """

    source: ClassVar[str]
    headers: ClassVar[tuple[str, ...]]

    def __init__(self, inputs: dict[str, Any], layout: ir.Layout, name: str) -> None:
        given = [node for node in inputs.values() if node is not None]
        super().__init__(name, given, layout, num_threads=parallel_num_threads())
        self.inputs = inputs

    def sizes(self) -> dict[str, Any]:
        """What the template needs to know apart from the inputs."""
        raise NotImplementedError

    def device_functions(self) -> str:
        """The headers for the instruction set that Inductor compiles for; several kernels may share a source file."""
        chosen = instruction_set()
        text = f"#ifndef BITDELTA_{chosen}\n#define BITDELTA_{chosen} 1\n#endif\n"
        for name in self.headers:
            guard = f"BITDELTA_{name.replace('.', '_').upper()}"
            text += f"#ifndef {guard}\n#define {guard}\n{_NOT_INLINED.sub('', kernel_source(name))}\n#endif\n"
        return text

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
        options = {
            "kernel": kernel,
            "template": self,
            "inputs": {name: node for name, node in self.inputs.items() if node is not None},
            **self.inputs,
            "Y": result,
            "Y_2d": result_2d,
            "Out": source,
            "aliases": {alias: result.get_name() for alias in aliases},
            "epilogue_nodes": epilogues,
            "reindexers": reindexers,
            "num_threads": self.num_threads,
            **self.sizes(),
        }
        with patch.object(V.graph, "get_dtype", self._fake_get_dtype(source)):
            return str(self._template_from_string(kernel_source(self.source)).render(**options))


class DeltaLinearTemplate(RowsTemplate):
    """One bitdelta::delta_linear."""

    source = "delta_linear.cpp.jinja"
    headers = (
        "cpu_lanes.h", "cpu_delta.h", "cpu_sums.h", "cpu_rounded.h", "cpu_tile.h", "cpu_lowrank.h", "cpu_groups.h",
    )  # fmt: skip

    def __init__(self, inputs: dict[str, Any], layout: ir.Layout, *, features: int, exact: bool) -> None:
        super().__init__(inputs, layout, "delta_linear")
        self.features = features
        self.exact = exact or inputs["X"].get_dtype() != torch.bfloat16

    def sizes(self) -> dict[str, Any]:
        slots, planes, outputs, _ = self.inputs["Signs"].get_size()
        left = self.inputs["Left"]
        return {
            "sums": "ExactSums" if self.exact else "RoundedSums",
            "has_col_scale": self.inputs["ColScale"] is not None,
            "K": self.features,
            "T": int(slots),
            "P": int(planes),
            "N": int(outputs),
            "rank": 0 if left is None else int(left.get_size()[2]),
        }


class BaseLinearTemplate(RowsTemplate):
    """x @ w.T: inputs X [M, K] and W [K, N], a transposed view of contiguous rows of weights.

    Args:
        most_rows: that our kernel takes; where M is dynamic, more go to the library.
    """

    source = "base_linear.cpp.jinja"
    headers = ("cpu_lanes.h", "cpu_base.h")

    def __init__(self, inputs: list[Any], layout: ir.Layout, *, most_rows: int) -> None:
        super().__init__(dict(zip(("X", "W"), inputs, strict=True)), layout, "base_linear")
        self.most_rows = most_rows

    def sizes(self) -> dict[str, Any]:
        features, outputs = self.inputs["W"].get_size()
        x = self.inputs["X"]
        return {
            "K": int(features),
            "N": int(outputs),
            "is_bf16": x.get_dtype() == torch.bfloat16,
            "most_rows": self.most_rows,
            "dynamic": bool(sympy.sympify(x.get_size()[0]).free_symbols),
        }


def _copy(source: Any) -> ir.Pointwise:
    """A pointwise node that reads `source` and gives it in its own dtype."""
    load = source.make_loader()
    return ir.Pointwise(
        device=source.get_device_or_error(),
        dtype=source.get_dtype(),
        inner_fn=lambda index: ops.to_dtype(load(index), source.get_dtype()),
        ranges=source.get_size(),
    )
