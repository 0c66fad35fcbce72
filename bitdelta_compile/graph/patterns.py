"""Recognising what a node does with a parameter: matrix product, lookup, transpose. Torch calls and ATen alike."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter as an op sees it: the placeholder itself or its transpose."""

    node: fx.Node
    transposed: bool


@dataclasses.dataclass(frozen=True)
class LinearUse:
    """`out = x @ matrix.T (+ bias)`, wherever the parameter stands.

    Attributes:
        node: the call.
        x: the other operand, [*, K], or [K, M] when `left`.
        bias: added by the call itself, or None.
        transposed: the parameter is stored [K, N].
        left: the parameter is the left operand: out [N, M].
    """

    node: fx.Node
    x: fx.Node
    bias: fx.Node | None
    transposed: bool
    left: bool = False


_ATEN = torch.ops.aten
# Of torch 2.15 on, Dynamo captures `.T` and `.mT` as overload packets; before, as getattr.
_TRANSPOSES: tuple[Any, ...] = (
    *(torch.t, torch.transpose, torch.permute),
    *(_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default, _ATEN.numpy_T.default, _ATEN.mT.default),
    *(_ATEN.t, _ATEN.numpy_T, _ATEN.mT),
)
_LINEAR: tuple[Any, ...] = (torch.nn.functional.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
_ADDMM: tuple[Any, ...] = (torch.addmm, torch.ops.aten.addmm.default)
_MATMUL: tuple[Any, ...] = (
    torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default,
)  # fmt: skip


def linear_use(node: fx.Node, view: View) -> LinearUse | None:
    """The call as a matrix product with the viewed parameter, or None if it is something else."""
    use = _product(node, view)
    if use is not None and use.left and _dim(use.x) == 1:  # W @ v contracts the whole vector: it is x [K] already
        return dataclasses.replace(use, left=False)
    return use


def _product(node: fx.Node, view: View) -> LinearUse | None:
    target: Any = node.target
    args, kwargs = list(node.args), node.kwargs
    if node.op == "call_method":
        known = {"matmul": torch.matmul, "mm": torch.mm, "addmm": torch.addmm, "__matmul__": operator.matmul}
        target = known.get(str(target), target)
    named: dict[str, Any]
    if target in _LINEAR:
        named = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        if named.get("weight") is view.node and named.get("input") is not view.node:
            return LinearUse(node, named["input"], named.get("bias"), transposed=view.transposed)
    elif target in _ADDMM:
        named = {**dict(zip(("input", "mat1", "mat2"), args, strict=False)), **kwargs}
        plain = named.get("beta", 1) == 1 and named.get("alpha", 1) == 1
        if plain and named.get("mat2") is view.node and view.node not in (named.get("input"), named.get("mat1")):
            return LinearUse(node, named["mat1"], named["input"], transposed=not view.transposed)
    elif target in _MATMUL and len(args) == 2 and args[0] is not args[1]:
        if args[1] is view.node and isinstance(args[0], fx.Node):
            return LinearUse(node, args[0], None, transposed=not view.transposed)
        if args[0] is view.node and isinstance(args[1], fx.Node):
            return LinearUse(node, args[1], None, transposed=view.transposed, left=True)
    return None


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias that a linear or addmm adds itself, or None."""
    if node.target in _LINEAR:
        return dict(zip(("input", "weight", "bias"), node.args, strict=False)).get("bias", node.kwargs.get("bias"))  # type: ignore[return-value]
    if node.target in _ADDMM or (node.op == "call_method" and node.target == "addmm"):
        named = {**dict(zip(("input", "mat1", "mat2"), node.args, strict=False)), **node.kwargs}
        plain = named.get("beta", 1) == 1 and named.get("alpha", 1) == 1
        return named["input"] if plain else None  # type: ignore[return-value]
    return None


def drop_bias(node: fx.Node) -> None:
    """Let a linear or addmm do without the bias that it adds itself."""
    if node.target in _LINEAR:
        named = {**dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}
        node.args, node.kwargs = (named["input"], named["weight"]), {}
    else:
        named = {**dict(zip(("input", "mat1", "mat2"), node.args, strict=False)), **node.kwargs}
        node.op, node.target = "call_function", torch.mm
        node.args, node.kwargs = (named["mat1"], named["mat2"]), {}


def embedding_ids(node: fx.Node, view: View) -> fx.Node | None:
    """The ids of an embedding lookup in the viewed parameter, or None if the call is something else."""
    if node.op != "call_function" or view.transposed:
        return None
    if node.target is torch.nn.functional.embedding:
        named = dict(zip(("input", "weight"), node.args, strict=False)) | dict(node.kwargs)
        table, ids = named.get("weight"), named.get("input")
    elif node.target in (torch.embedding, torch.ops.aten.embedding.default):
        named = dict(zip(("weight", "indices"), node.args, strict=False)) | dict(node.kwargs)
        table, ids = named.get("weight"), named.get("indices")
    else:
        return None
    return ids if table is view.node and isinstance(ids, fx.Node) else None


def uses_of(placeholder: fx.Node) -> list[tuple[fx.Node, View]]:
    """Nodes that consume a parameter or a transpose of it, each with what it sees, in graph order per view."""
    found: list[tuple[fx.Node, View]] = []
    pending = [View(placeholder, False)]
    while pending:
        view = pending.pop()
        for user in view.node.users:
            if _is_transpose(user, view.node):
                pending.append(View(user, not view.transposed))
            else:
                found.append((user, view))
    return found


def stored_transposed(placeholder: fx.Node) -> bool | None:
    """Whether a matrix is stored [K, N], as its first product or lookup says; None where it has none."""
    for node, view in uses_of(placeholder):
        use = linear_use(node, view)
        if use is not None:
            return use.transposed
        if embedding_ids(node, view) is not None:
            return False
    return None


def _is_transpose(node: fx.Node, of: fx.Node) -> bool:
    if not node.args or node.args[0] is not of:
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    called = node.op == "call_method" and node.target in ("t", "transpose", "permute")
    if not called and not (node.op == "call_function" and node.target in _TRANSPOSES):
        return False
    rest = _flat(node.args[1:])
    if not rest:
        return not node.kwargs
    if len(rest) != 2 or not all(isinstance(dim, int) for dim in rest):
        return False
    dims = [dim % 2 for dim in rest]
    permutes = node.target in ("permute", torch.permute, torch.ops.aten.permute.default)
    return dims == [1, 0] or (not permutes and dims == [0, 1])


def _dim(node: fx.Node) -> int | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dim() if isinstance(value, torch.Tensor) else None


def _flat(args: Any) -> list[Any]:
    return [inner for arg in args for inner in (arg if isinstance(arg, list | tuple) else [arg])]


def op_name(node: fx.Node) -> str:
    """The name a reader knows the call by: "linear", "bitdelta.delta_linear", "transpose"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.name().split('::')[1].split('.')[0]}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def base_name(node: fx.Node) -> str:
    """What the call does, under one name for its torch, method, ATen, dunder and in-place forms: "add", "permute"."""
    return op_name(node).rsplit(".", 1)[-1].strip("_").removeprefix("i" if op_name(node) in _IN_PLACE else "")


def is_in_place(node: fx.Node) -> bool:
    """Whether the call writes to its first operand."""
    name = op_name(node)
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow")
