"""The base linears of a rewritten graph at few rows on a CPU: our template instead of the library, or tuned against it.

At decode sizes a linear's time is that of reading its weights, and the library's kernels for weights that are not known
at compile time (the base stays an input, for tenants to share) fall short of the memory's speed. Where the number of
rows is dynamic, the template itself hands more than `MOST_ROWS` to the library. Only graphs that hold
`bitdelta::delta_linear` are concerned: every other compilation of the process is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch

MOST_ROWS = 32


def register() -> None:
    """Put our choice in front of Inductor's lowerings of `mm` and `addmm`."""
    from torch._inductor.lowering import lowerings, register_lowering

    aten = torch.ops.aten
    mm, addmm = lowerings[aten.mm.default], lowerings[aten.addmm.default]

    def few_rows_mm(left: Any, right: Any, **options: Any) -> Any:
        found = None if options else few_rows_linear(left, right)
        return mm(left, right, **options) if found is None else found

    def few_rows_addmm(added: Any, left: Any, right: Any, **options: Any) -> Any:
        plain = options.keys() <= {"alpha", "beta"} and all(value == 1 for value in options.values())
        found = few_rows_linear(left, right) if plain else None
        return addmm(added, left, right, **options) if found is None else lowerings[aten.add.Tensor](added, found)

    register_lowering(aten.mm.default, type_promotion_kind=None)(few_rows_mm)
    register_lowering(aten.addmm.default, type_promotion_kind=None)(few_rows_addmm)


def few_rows_linear(left: Any, right: Any) -> Any | None:
    """`left @ right` by our template, or by what autotuning prefers to it; None where the template does not apply.

    Decided by static facts alone: the graph, the number of rows, dtypes, strides, instruction set, Inductor's options.

    Args:
        left: [M, K].
        right: [K, N], the transposed view of a contiguous weight.
    """
    from torch._inductor import config, ir
    from torch._inductor.virtualized import V

    node = V.current_node
    if node is None or not node.graph.find_nodes(op="call_function", target=torch.ops.bitdelta.delta_linear.default):
        return None
    if not (_dtype_and_rows_suit(left) and left.get_dtype() == right.get_dtype() and ir.is_storage_and_layout(right)):
        return None
    _, layout = ir.as_storage_and_layout(right)
    features, outputs = right.get_size()
    if [*layout.stride, layout.offset] != [1, features, 0] or not _static(features, outputs):
        return None
    inputs = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(left)), right]
    result = ir.FixedLayout(left.get_device(), left.get_dtype(), [left.get_size()[0], outputs])
    ours = _template()(inputs, result, most_rows=MOST_ROWS).generate()
    if not (config.max_autotune or config.max_autotune_gemm):
        return ours.output_node()

    from torch._inductor.kernel.mm import aten_mm
    from torch._inductor.select_algorithm import autotune_select_algorithm

    choices = [aten_mm.bind(inputs, result), ours]
    chosen: Any = autotune_select_algorithm("bitdelta_base_linear", choices, inputs, result)
    return chosen[0] if isinstance(chosen, tuple) else chosen


def _dtype_and_rows_suit(left: Any) -> bool:
    rows, dtype = left.get_size()[0], left.get_dtype()
    if left.get_device().type != "cpu" or (_static(rows) and not 0 < int(rows) <= MOST_ROWS):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _multiplies_bf16())


def _multiplies_bf16() -> bool:
    """Whether the generated code may use dot products of bf16."""
    from .cpp import instruction_set

    return bool(torch.cpu._is_avx512_bf16_supported()) and instruction_set() == "AVX512"


def _static(*sizes: Any) -> bool:
    return all(isinstance(size, int) or size.is_Integer for size in sizes)


def _template() -> Any:
    from .cpp import BaseLinearTemplate

    return BaseLinearTemplate
