"""A model run from base weights plus sign planes whose scales can be trained: no tuned weight is formed for a linear.

A linear's delta path keeps Z_p = (x * col_scale[p]) sign[p]^T of the forward pass, so that the gradient of row_scale[p]
is the sum over tokens of dY * Z_p: it costs no product of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..encodings import Sign
from ..kernels import layout

Per = Literal["matrix", "row"]

# Asked of a weight, these read no value of it.
_QUERIES = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "requires_grad")}


class _SignProduct(torch.autograd.Function):
    """sum_p scale[p] * ((x * col_scale[p]) sign[p]^T); products in `compute` dtype, sums of planes in x's.

    x [M, K], signs int8 [P, N, K], scale [P, N], col_scale [P, K] or None -> [M, N].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, signs: Tensor, scale: Tensor, col_scale: Tensor | None, compute: torch.dtype
    ) -> Tensor:
        found = x.new_zeros(x.shape[0], signs.shape[1])
        products = []
        for plane in range(signs.shape[0]):
            scaled = x if col_scale is None else x * col_scale[plane]
            products.append(scaled.to(compute) @ signs[plane].to(compute).T)
            found.addcmul_(products[-1].to(x.dtype), scale[plane].to(x.dtype))
        ctx.save_for_backward(signs, scale, col_scale, *products)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        signs, scale, col_scale, *products = ctx.saved_tensors
        dscale = torch.stack([(dy * z).sum(0, dtype=torch.float32) for z in products])
        if not ctx.needs_input_grad[0]:
            return None, None, dscale, None, None
        dx = dy.new_zeros(dy.shape[0], signs.shape[2])
        for plane, z in enumerate(products):
            back = (dy * scale[plane]).to(z.dtype) @ signs[plane].to(z.dtype)
            dx += back.to(dx.dtype) if col_scale is None else back.to(dx.dtype) * col_scale[plane]
        return dx, None, dscale, None, None


class TrainedSign(nn.Module):
    """A `sign` encoding with a factor on its row scales that starts at 1 and can be trained.

    Args:
        sign: where to start; nothing of it is written to.
        per: `matrix` gives each plane one factor, `row` one per output feature.
        device: where the model is.

    Attributes:
        factor: fp32 [P, 1] or [P, N].
        size: mean |row_scale| of the start.
    """

    def __init__(self, sign: Sign, per: Per, device: torch.device) -> None:
        super().__init__()
        self.sign = sign
        start = sign.row_scale.to(device, torch.float32)
        self.size = float(start.abs().mean())
        self.factor = nn.Parameter(torch.ones(start.shape if per == "row" else (start.shape[0], 1), device=device))
        self.start = start
        self.signs = layout.unpack_signs(sign.signs.to(device), sign.in_features, torch.int8)  # [P, N, K]
        self.col_scale = None if sign.col_scale is None else sign.col_scale.to(device)
        self.left = None if sign.left is None else sign.left.to(device, torch.float32)
        self.right = None if sign.right is None else sign.right.to(device, torch.float32)
        # Signs are exact in bf16, and of a delta's own product 8 bits are plenty; without AVX-512 it would be slower.
        fast = device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        self.compute = torch.bfloat16 if fast else torch.float32

    @property
    def row_scale(self) -> Tensor:
        """fp32 [P, N]."""
        return self.start * self.factor

    def product(self, x: Tensor) -> Tensor:
        """x [*, K] times the transposed delta: [*, N]."""
        flat = x.reshape(-1, x.shape[-1])
        found: Tensor = _SignProduct.apply(flat, self.signs, self.row_scale, self.col_scale, self.compute)  # type: ignore[no-untyped-call]
        if self.left is not None and self.right is not None:
            found = found + (flat @ self.right.T.to(x.dtype)) @ self.left.T.to(x.dtype)
        return found.view(*x.shape[:-1], -1)

    def lookup(self, ids: Tensor) -> Tensor:
        """The delta's rows `ids` [*]: fp32 [*, K]."""
        chosen = self.signs[:, ids] * self.row_scale[:, ids].unsqueeze(-1)  # [P, *, K]
        if self.col_scale is not None:
            chosen = chosen * self.col_scale.view(-1, *[1] * ids.dim(), self.signs.shape[2])
        found = chosen.sum(0)
        return found if self.left is None or self.right is None else found + self.left[ids] @ self.right

    def dense(self) -> Tensor:
        """The delta as the model stores the parameter, fp32, and with a gradient."""
        terms = self.signs * self.row_scale.unsqueeze(-1)
        found = (terms if self.col_scale is None else terms * self.col_scale.unsqueeze(1)).sum(0)
        if self.left is not None and self.right is not None:
            found = found + self.left @ self.right
        return found.T if self.sign.transposed else found


class DeltaPath(TorchFunctionMode):
    """While entered, every use of a parameter sees base + delta. Gradients reach the factors and the activations.

    F.linear and F.embedding with the whole parameter add the delta's own product or rows; every other use gets the
    dense sum, formed once per entering.

    Args:
        planes: by parameter, the base's value in the model's own dtype.
    """

    def __init__(self, planes: Iterable[tuple[Tensor, TrainedSign]]) -> None:
        super().__init__()
        self._planes = {id(parameter): (parameter, planes_of) for parameter, planes_of in planes}
        self._dense: dict[int, Tensor] = {}

    def __exit__(self, *exception: Any) -> None:
        self._dense.clear()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _sum(self, parameter: Tensor) -> Tensor:
        known = self._planes.get(id(parameter))
        if known is None:
            return parameter
        if id(parameter) not in self._dense:
            self._dense[id(parameter)] = known[0] + known[1].dense().to(parameter.dtype)
        return self._dense[id(parameter)]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        planes = self._planes.get(id(args[1]), (None, None))[1] if len(args) > 1 else None
        if planes is not None and func is F.linear and not planes.sign.transposed:
            return func(*args, **kwargs) + planes.product(args[0])
        # The other options of a lookup concern the gradient of the table; max_norm writes to the table.
        if planes is not None and func is F.embedding and len(args) == 2 and kwargs.get("max_norm") is None:
            return func(*args, **kwargs) + planes.lookup(args[0]).to(args[1].dtype)
        if func in _QUERIES:
            return func(*args, **kwargs)
        return func(*tree_map_only(Tensor, self._sum, args), **tree_map_only(Tensor, self._sum, kwargs))
