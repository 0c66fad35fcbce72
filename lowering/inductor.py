"""The rewritten graph under Inductor: lowerings of the bitdelta:: ops, and the one call that compiles a graph.

Inductor is imported on first use: importing this package must not cost a compiler.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..kernels.layout import CANONICAL
from . import base_linear, torch_internals

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Compile a rewritten graph with Inductor.

    Args:
        gm: the graph; Inductor takes it over.
        example_inputs: real or fake inputs of the graph, one per placeholder.
        options: Inductor options.
    """
    from torch._inductor.compile_fx import compile_fx

    from .cache import graph_passes

    register_lowerings()
    patches = dict(options)
    patches |= graph_passes(patches)
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled  # type: ignore[no-any-return]


@functools.cache
def register_lowerings() -> None:
    """Teach Inductor the bitdelta:: ops, once per process."""
    from torch._inductor.lowering import make_fallback, register_lowering

    ops = torch.ops.bitdelta
    register_lowering(ops.delta_linear.default, type_promotion_kind=None)(_delta_linear)
    register_lowering(ops.base_delta_linear.default, type_promotion_kind=None)(_base_delta_linear)
    register_lowering(ops.delta_embedding.default, type_promotion_kind=None)(_delta_embedding)
    make_fallback(ops.delta_linear_backward.default)
    make_fallback(ops.delta_embedding_backward.default)
    base_linear.register()


def _delta_linear(
    x: Any,
    signs: Any,
    row_scale: Any,
    col_scale: Any,
    left: Any,
    right: Any,
    tenant: Any,
    *,
    layout: str = "canonical",
    exact: bool = False,
) -> Any:
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, view

    device, dtype = x.get_device(), x.get_dtype()
    *batch, features = x.get_size()
    outputs = row_scale.get_size()[2]
    found = None
    if dtype in KERNEL_DTYPES:
        realized = _realized(x, signs, row_scale, col_scale, left, right, tenant)
        if device.type == "cpu" and layout == CANONICAL:
            result = ir.FixedLayout(device, dtype, [_product(batch), outputs])
            template: Any = _linear_template()(realized, result, features=int(features), exact=exact)
            found = template.generate().output_node()
        elif device.type == "cuda" and triton_is_there():
            from . import triton_templates

            found = triton_templates.delta_linear(_problem(realized), layout, exact)
    if found is None:
        _log_fallback(device.type, dtype, layout)
        eager = fallback_handler(torch.ops.bitdelta.delta_linear.default, add_to_fallback_set=False)
        return eager(x, signs, row_scale, col_scale, left, right, tenant, layout=layout, exact=exact)
    return view(found, [*batch, outputs])


def _base_delta_linear(
    x: Any,
    weight: Any,
    signs: Any,
    row_scale: Any,
    col_scale: Any,
    left: Any,
    right: Any,
    tenant: Any,
    *,
    layout: str = "canonical",
    exact: bool = False,
) -> Any:
    """In one launch where there is a kernel for that, else as the two ops that it stands for."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings, view

    aten = torch.ops.aten
    *batch, features = x.get_size()
    if x.get_device().type == "cuda" and x.get_dtype() in KERNEL_DTYPES and triton_is_there():
        from . import triton_fused

        problem = _problem(_realized(x, signs, row_scale, col_scale, left, right, tenant))
        realized = ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(weight))
        found = triton_fused.base_delta_linear(problem, realized, layout, exact)
        if found is not None:
            return view(found, [*batch, problem.outputs])
    turned = lowerings[aten.permute.default](weight, [1, 0])
    base = lowerings[aten.mm.default](view(x, [_product(batch), features]), turned)
    delta = _delta_linear(x, signs, row_scale, col_scale, left, right, tenant, layout=layout, exact=exact)
    return lowerings[aten.add.Tensor](view(base, [*batch, weight.get_size()[0]]), delta)


def _realized(x: Any, signs: Any, row_scale: Any, col_scale: Any, left: Any, right: Any, tenant: Any) -> dict[str, Any]:
    """The op's tensors as the templates read them: contiguous buffers, x as [M, K], scales in fp32."""
    from torch._inductor import ir
    from torch._inductor.lowering import to_dtype, view

    *batch, features = x.get_size()
    scales = [
        scale if scale is None or scale.get_dtype() == torch.float32 else to_dtype(scale, torch.float32)
        for scale in (row_scale, col_scale)
    ]
    inputs = {
        "X": view(x, [_product(batch), features]),
        "Signs": signs,
        "RowScale": scales[0],
        "ColScale": scales[1],
        "Left": left,
        "Right": right,
        "Tenant": tenant,
    }
    return {
        name: None if node is None else ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(node))
        for name, node in inputs.items()
    }


def _problem(realized: dict[str, Any]) -> Any:
    from .triton_operands import Problem

    return Problem(
        x=realized["X"],
        signs=realized["Signs"],
        row_scale=realized["RowScale"],
        col_scale=realized["ColScale"],
        left=realized["Left"],
        right=realized["Right"],
        tenant=realized["Tenant"],
    )


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(lambda a, b: a * b, sizes, 1)


def _linear_template() -> Any:
    """The template class; its module is where a torch of another layout breaks first."""
    try:
        from .cpp import DeltaLinearTemplate
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"torch {torch.__version__} has moved what the C++ template is built on ({error}): "
            f'use torch {torch_internals.SUPPORTED}, or options={{"lower": "eager"}}'
        ) from error
    return DeltaLinearTemplate


def _delta_embedding(
    ids: Any,
    signs: Any,
    row_scale: Any,
    col_scale: Any,
    left: Any,
    right: Any,
    tenant: Any,
    *,
    embedding_dim: int,
    dtype: torch.dtype,
    layout: str = "canonical",
) -> Any:
    """As one pointwise loop over the result, so that Inductor fuses it with the base lookup and what follows."""
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler
    from torch._inductor.virtualized import ops
    from torch.utils._sympy.functions import FloorDiv, Max

    if dtype not in KERNEL_DTYPES:
        eager = fallback_handler(torch.ops.bitdelta.delta_embedding.default, add_to_fallback_set=False)
        tensors = (ids, signs, row_scale, col_scale, left, right, tenant)
        return eager(*tensors, embedding_dim=embedding_dim, dtype=dtype, layout=layout)
    slots, planes, vocabulary = row_scale.get_size()
    rank = 0 if left is None else int(left.get_size()[2])
    loads: dict[str, Any] = {
        name: None if node is None else node.make_loader()
        for name, node in (
            ("ids", ids), ("signs", signs), ("row", row_scale), ("col", col_scale), ("left", left), ("right", right),
            ("tenant", tenant),
        )
    }  # fmt: skip
    sizes = list(ids.get_size())
    rows = _product(sizes)

    def inner(index: Sequence[Any]) -> Any:
        *at, feature = index
        row = ops.indirect_indexing(loads["ids"](at), vocabulary)
        slot: Any = 0
        valid = None
        if tenant is not None:
            flat = functools.reduce(lambda total, pair: total * pair[1] + pair[0], zip(at, sizes, strict=True), 0)
            # Rows that the index does not cover share its last entry: a defined result, never a read past its end.
            length = tenant.get_size()[0]
            place = ops.index_expr(FloorDiv(flat, Max(1, FloorDiv(rows, length))), torch.int64)
            place = ops.minimum(place, ops.index_expr(length - 1, torch.int64))
            entry = loads["tenant"]([ops.indirect_indexing(place, length, check=False)])
            below = ops.ge(entry, ops.constant(0, torch.int32))
            valid = ops.and_(below, ops.lt(entry, ops.constant(int(slots), torch.int32)))
            known = ops.where(valid, entry, ops.constant(0, torch.int32))
            slot = ops.indirect_indexing(known, slots, check=False)
        total = None
        for plane in range(int(planes)):
            word = loads["signs"]([slot, plane, *word_at(row, feature // 32, embedding_dim, layout)])
            shift = ops.index_expr(feature % 32, torch.int32)
            bit = ops.bitwise_and(ops.bitwise_right_shift(word, shift), ops.constant(1, torch.int32))
            sign = ops.sub(ops.mul(ops.to_dtype(bit, torch.float32), ops.constant(2.0, torch.float32)), _one(ops))
            term = ops.mul(sign, loads["row"]([slot, plane, row]))
            if loads["col"] is not None:
                term = ops.mul(term, loads["col"]([slot, plane, feature]))
            total = term if total is None else ops.add(total, term)
        for r in range(rank):
            factor = ops.to_dtype(loads["left"]([slot, row, r]), torch.float32)
            other = ops.to_dtype(loads["right"]([slot, r, feature]), torch.float32)
            total = ops.add(total, ops.mul(factor, other))
        if valid is not None:
            total = ops.where(valid, total, ops.constant(0.0, torch.float32))
        return ops.to_dtype(total, dtype)

    return ir.Pointwise.create(device=signs.get_device(), dtype=dtype, inner_fn=inner, ranges=[*sizes, embedding_dim])


def word_at(row: Any, word: Any, features: int, layout: str) -> tuple[Any, Any]:
    """Where `kernels.layout` puts word `word` of row `row`: the last two indices of the signs, sympy or int."""
    from torch.utils._sympy.functions import FloorDiv, Mod, Where

    if layout == CANONICAL:
        return row, word
    whole = -(-features // 128) // 2  # blocks
    block, s, q = FloorDiv(word, 8), FloorDiv(Mod(word, 8), 4), Mod(word, 4)
    h, g = FloorDiv(Mod(row, 16), 8), Mod(row, 8)
    lane = 4 * g + q
    place = 128 * block + 4 * lane + 2 * s + h
    if -(-features // 128) % 2:
        place = Where(word < 8 * whole, place, 128 * whole + 2 * lane + h)
    return FloorDiv(row, 16), place


def _one(ops: Any) -> Any:
    return ops.constant(1.0, torch.float32)


@functools.cache
def _log_fallback(device: str, dtype: torch.dtype, layout: str) -> None:
    log.info(
        "no compiled kernel for %s on %s, signs in layout %s: delta_linear runs its eager kernel there",
        dtype, device, layout,
    )  # fmt: skip


@functools.cache
def triton_is_there() -> bool:
    """Whether triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
