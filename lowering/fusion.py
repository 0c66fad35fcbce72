"""A base linear and the delta over the same x, added up, become one op: what Inductor may then run in one launch.

Over the graphs that Inductor lowers, after autograd and decompositions; what users print or export keeps the three.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import configs
from .rows import Rows

_ATEN = torch.ops.aten
_DELTA = torch.ops.bitdelta.delta_linear.default
_CONVERT = torch.ops.prims.convert_element_type.default
_RESHAPES = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)


@dataclasses.dataclass(frozen=True)
class _Product:
    """`x @ weight.T (+ bias)`, x [M, K], weight [N, K]."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None


def fuse_base_and_delta(graph: fx.Graph) -> None:
    """Replace `linear(x, weight) + bitdelta::delta_linear(x, ...)` by `bitdelta::base_delta_linear(x, weight, ...)`.

    Where the device has a kernel for both that is likely to be faster, or Inductor will time both ways. The weight must
    be an input of the graph as it is, and nobody else may read the linear's result or the delta's; a bias is added
    afterwards.
    """
    for delta in graph.find_nodes(op="call_function", target=_DELTA):
        total = next(iter(delta.users), None)
        if total is None or len(delta.users) > 1 or not _is_plain_sum(total):
            continue
        (other,) = [node for node in total.args if node is not delta] or [None]
        product = _product(other) if isinstance(other, fx.Node) else None
        if product is not None and _fits(product, delta, total) and _wanted(delta):
            _replace(graph, product, delta, total)


def _is_plain_sum(node: fx.Node) -> bool:
    return node.target is _ATEN.add.Tensor and not node.kwargs


def _product(node: fx.Node) -> _Product | None:
    """The node as a base linear that nobody else reads: mm, addmm, or a row times a matrix as Inductor writes it."""
    while node.target in (*_RESHAPES, _CONVERT) and len(node.users) == 1:
        node = node.args[0]  # type: ignore[assignment]
    if len(node.users) != 1 or node.kwargs:
        return None
    bias: Any = None
    operands: Any = node.args
    if node.target is _ATEN.addmm.default:
        bias, *operands = node.args
    elif node.target is _ATEN.sum.dim_IntList:
        operands = _summed(node)
    elif node.target is not _ATEN.mm.default:
        return None
    x, turned = operands
    weight = _turned_input(turned)
    return None if weight is None or not isinstance(x, fx.Node) else _Product(x, weight, bias)


def _summed(node: fx.Node) -> tuple[Any, Any]:
    """a and b of `(a.float()[:, :, None] * b.float()[None]).sum(1)`, what Inductor makes of `a @ b` with one row."""
    product, *dims = node.args
    if dims != [[1]] or not isinstance(product, fx.Node) or product.target is not _ATEN.mul.Tensor:
        return None, None
    column, row = product.args
    if len(product.users) != 1 or not (_is_unsqueezed(column, 2) and _is_unsqueezed(row, 0)):
        return None, None
    return _unconverted(column.args[0]), _unconverted(row.args[0])  # type: ignore[union-attr]


def _unconverted(node: Any) -> Any:
    converted = isinstance(node, fx.Node) and node.target is _CONVERT and node.args[1] == torch.float32
    return node.args[0] if converted else node


def _is_unsqueezed(node: Any, dim: int) -> bool:
    return isinstance(node, fx.Node) and node.target is _ATEN.unsqueeze.default and bool(node.args[1] == dim)


def _turned_input(node: Any) -> fx.Node | None:
    """The contiguous graph input of which the node is the transpose."""
    if not isinstance(node, fx.Node):
        return None
    turned = node.target is _ATEN.permute.default and node.args[1] == [1, 0]
    if not (turned or node.target is _ATEN.t.default):
        return None
    weight = node.args[0]
    if not isinstance(weight, fx.Node) or weight.op not in ("placeholder", "get_attr"):
        return None
    value = weight.meta.get("val")
    return weight if isinstance(value, Tensor) and value.is_contiguous() else None


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _sizes(node: Any) -> tuple[Any, ...]:
    """The shape as numbers and expressions, which can be compared without a guard on them."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in _value(node).shape)


def _origin(node: fx.Node) -> fx.Node:
    while node.target in _RESHAPES:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _fits(product: _Product, delta: fx.Node, total: fx.Node) -> bool:
    """Whether both read one tensor, as rows of one length, and dtypes, shapes and device are those of one linear."""
    x, signs, row_scale, *_ = delta.args
    bias = [product.bias] if product.bias is not None else []
    summed = (delta, total, *total.args)
    typed = (*summed, x, product.x, product.weight)
    nodes = (*typed, *delta.all_input_nodes, *bias)
    if not all(isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) for node in nodes):
        return False
    if _origin(product.x) is not _origin(x) or any(_value(node).dim() != 1 for node in bias):  # type: ignore[arg-type]
        return False
    same = len({_sizes(node) for node in summed}) == 1 and len({_value(node).dtype for node in typed}) == 1
    features = _sizes(x)[-1]
    expected = (_sizes(row_scale)[2], features)
    return same and _sizes(product.x)[-1] == features and _sizes(product.weight) == expected and _value(signs).is_cuda


def _wanted(delta: fx.Node) -> bool:
    """Whether there is a kernel, and static facts or autotuning may prefer it."""
    from torch._inductor import config

    from .inductor import triton_is_there

    if not triton_is_there():
        return False
    x, row_scale = _value(delta.args[0]), _value(delta.args[2])
    rows = _rows(math.prod(x.shape[:-1]), delta.args[6])
    slots, _, outputs = row_scale.shape
    facts = (rows.likely, slots, outputs, x.shape[-1], x.dtype)
    options: dict[str, Any] = {"layout": "canonical", "exact": False, **delta.kwargs}
    options |= {"column": delta.args[3] is not None, "unbounded": rows.unbounded}
    arch = configs.architecture(x.device)
    plan = configs.choose_fused(arch, *facts, **options)
    timed = bool(config.max_autotune or config.max_autotune_gemm)
    if plan is not None:
        return timed or configs.fused_pays(plan, *facts)
    apart = configs.choose(arch, *facts, **options)
    return timed and apart is not None and isinstance(apart.config, configs.Exact)


def _rows(size: int | torch.SymInt, tenant: Any) -> Rows:
    if isinstance(size, int):
        return Rows(size, size)
    entries = None if tenant is None else _sizes(tenant)[0]
    return Rows.of(size.node.expr, entries, size.node.hint or configs.DECODE_ROWS, size.node.shape_env)


def _replace(graph: fx.Graph, product: _Product, delta: fx.Node, total: fx.Node) -> None:
    with graph.inserting_before(total):
        x, *packed = delta.args
        fused = graph.call_function(
            torch.ops.bitdelta.base_delta_linear.default, (x, product.weight, *packed), dict(delta.kwargs)
        )
        fused.meta = dict(delta.meta)
        result = fused
        if product.bias is not None:
            result = graph.call_function(_ATEN.add.Tensor, (fused, product.bias))
            result.meta = dict(total.meta)
    total.replace_all_uses_with(result)
    _erase(graph, total)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Take a call out of the graph, and those that only it needed."""
    pending = [node]
    while pending:
        each = pending.pop()
        inputs = each.all_input_nodes
        graph.erase_node(each)
        pending += [unused for unused in inputs if not unused.users and unused.op == "call_function"]
