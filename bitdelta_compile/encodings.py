"""How one parameter's delta is stored: `same`, `sign`, `dense`, `rows`. Dispatch over them lives here and in `graph/rewrite.py`.

An encoding is an immutable bundle of named tensors plus the parameter's shape as the model stores it. `transposed` says that the
parameter is stored [K, N] (GPT-2's Conv1D) while the encoding speaks of [N, K]: N out, K in.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .kernels import layout, reference


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Common part of all encodings.

    Attributes:
        shape: of the tuned parameter as the model stores it.
        dtype: of the tuned parameter.
    """

    kind: ClassVar[str]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this encoding by field name, in a fixed order; those that are None are left out."""
        fields = (field.name for field in dataclasses.fields(self))
        found = {name: getattr(self, name) for name in fields}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this encoding."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def apply(self, base: Tensor) -> Tensor:
        """The tuned parameter, dense: `base` [shape of the base parameter] -> fp32 [shape] (`dense` and `same` keep their dtype)."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Same(Encoding):
    """The tuned parameter equals the base's."""

    kind = "same"

    def apply(self, base: Tensor) -> Tensor:
        return base


@dataclasses.dataclass(frozen=True)
class Dense(Encoding):
    """The tuned parameter itself.

    Attributes:
        value: the tuned parameter in its own dtype, [shape].
    """

    kind = "dense"
    value: Tensor

    def apply(self, base: Tensor) -> Tensor:
        return self.value


@dataclasses.dataclass(frozen=True)
class Sign(Encoding):
    """P sign planes with scales, and optionally a low-rank part, of a matrix [N, K].

    Attributes:
        signs: int32 [P, N, W].
        row_scale: fp32 [P, N].
        col_scale: fp32 [P, K] or None.
        left, right: bf16 [N, r] and [r, K], or None.
        transposed: the parameter is stored [K, N].
    """

    kind = "sign"
    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"sign planes encode matrices, not shape {list(self.shape)}")
        stacked = {name: tensor.unsqueeze(0) for name, tensor in self.tensors().items()}
        layout.check_bank(
            stacked["signs"],
            stacked["row_scale"],
            stacked.get("col_scale"),
            stacked.get("left"),
            stacked.get("right"),
            self.in_features,
        )
        if self.signs.shape[1] != self.out_features:
            raise ValueError(f"signs of shape {list(self.signs.shape)} do not fit {self.out_features} output features")

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def planes(self) -> int:
        return self.signs.shape[0]

    @property
    def rank(self) -> int:
        return 0 if self.left is None else self.left.shape[1]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense delta, [shape]."""
        banked = [None if t is None else t.unsqueeze(0) for t in (self.signs, self.row_scale, self.col_scale, self.left, self.right)]
        signs, row_scale, col_scale, left, right = banked
        assert signs is not None and row_scale is not None
        dense = reference.delta_weight(signs, row_scale, col_scale, left, right, self.in_features, dtype)[0]
        return dense.T if self.transposed else dense

    def apply(self, base: Tensor) -> Tensor:
        return base.float() + self.delta()


@dataclasses.dataclass(frozen=True)
class Rows(Encoding):
    """A matrix of which some rows are stored outright: few rows changed, or the table grew.

    Rows listed in `index` are `values`; every other row is what `over` says (the base's own row when `over` is None).
    Rows at or past the base's count are always listed. Row means output feature, also when `transposed`.

    Attributes:
        index: int64 [r], ascending, unique.
        values: the tuned rows in their own dtype, [r, K].
        over: the encoding beneath, for the rows that the base has; its shape is the base's.
        transposed: the parameter is stored [K, N].
    """

    kind = "rows"
    index: Tensor
    values: Tensor
    over: Sign | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"rows encode matrices, not shape {list(self.shape)}")
        if self.over is not None and self.over.transposed != self.transposed:
            raise ValueError("the sign planes under rows must have the orientation of the rows")
        if self.index.dtype != torch.int64 or self.index.dim() != 1:
            raise ValueError(f"index must be int64 [r], got {self.index.dtype} {list(self.index.shape)}")
        if tuple(self.values.shape) != (self.index.numel(), self.in_features):
            raise ValueError(f"values must be {[self.index.numel(), self.in_features]}, got {list(self.values.shape)}")

    @property
    def out_features(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.over.nbytes if self.over is not None else 0)

    def apply(self, base: Tensor) -> Tensor:
        under = base.float() if self.over is None else self.over.apply(base)
        under = under.T if self.transposed else under
        tuned = torch.zeros(self.out_features, self.in_features)
        kept = min(under.shape[0], self.out_features)
        tuned[:kept] = under[:kept]
        tuned[self.index] = self.values.float()
        return tuned.T.contiguous() if self.transposed else tuned


KINDS: dict[str, type[Encoding]] = {cls.kind: cls for cls in (Same, Dense, Sign, Rows)}
