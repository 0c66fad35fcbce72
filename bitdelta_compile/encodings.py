"""How one parameter's delta is stored: `same`, `sign`, `dense`, `rows`; `graph/rewrite.py` dispatches over them too.

An encoding is an immutable bundle of named tensors plus the parameter's shape as the model stores it; two are equal
only if they are one object. `transposed` says that the parameter is stored [K, N] (GPT-2's Conv1D) while the encoding
speaks of [N, K]: N out, K in.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from .kernels import layout, reference

_BLOCK = 1 << 18  # weights unpacked at a time: keeps what `apply` needs beyond its result small


@dataclasses.dataclass(frozen=True, eq=False)
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

    @property
    def layout(self) -> tuple[object, ...]:
        """What a graph over this encoding depends on: everything but the values."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return (self.kind, *((name, _layout(value)) for name, value in fields))

    def apply(self, base: Tensor) -> Tensor:
        """The tuned parameter, dense: `base` [the base's shape] -> fp32 [shape], where the base is.

        `same` is the base itself; `dense` is its own tensor, whatever the base.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Same(Encoding):
    """The tuned parameter equals the base's."""

    kind = "same"

    def apply(self, base: Tensor) -> Tensor:
        return base


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Encoding):
    """The tuned parameter itself.

    Attributes:
        value: the tuned parameter in its own dtype, [shape]; of a bias, changed by what planes make of the mean input.
    """

    kind = "dense"
    value: Tensor

    def apply(self, base: Tensor) -> Tensor:
        return self.value


class Matrix(Encoding):
    """An encoding of a matrix [N, K].

    Attributes:
        transposed: the parameter is stored [K, N].
    """

    transposed: bool  # no dataclass field here: it comes last in the subclasses, after fields without a default

    def __post_init__(self) -> None:
        if len(self.shape) != 2:
            raise ValueError(f"a {self.kind} encoding is of a matrix, not of shape {list(self.shape)}")

    @property
    def out_features(self) -> int:
        """N."""
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[0] if self.transposed else self.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Sign(Matrix):
    """P sign planes with scales, and optionally a low-rank part, of a matrix [N, K].

    Attributes:
        signs: int32 [P, N, W].
        row_scale: fp32 [P, N].
        col_scale: fp32 [P, K] or None.
        left, right: bf16 [N, r] and [r, K], or None.
    """

    kind = "sign"
    signs: Tensor
    row_scale: Tensor
    col_scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def planes(self) -> int:
        """P."""
        return self.signs.shape[0]

    @property
    def rank(self) -> int:
        """r of the low-rank part, 0 where there is none."""
        return 0 if self.left is None else self.left.shape[1]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense delta, [shape]."""
        dense = self.rows(slice(0, self.out_features), dtype)
        return dense.T if self.transposed else dense

    def rows(
        self, rows: slice | Tensor, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """The dense delta of some output features, [rows, K].

        Args:
            device: where it is unpacked, by default where the signs are.
        """

        def there(part: Tensor) -> Tensor:
            return part.to(device or part.device).unsqueeze(0)

        deltas: Tensor = reference.delta_weight(
            there(self.signs[:, rows]),
            there(self.row_scale[:, rows]),
            None if self.col_scale is None else there(self.col_scale),
            None if self.left is None else there(self.left[rows]),
            None if self.right is None else there(self.right),
            self.in_features,
            dtype,
        )
        return deltas.squeeze(0)

    def apply(self, base: Tensor) -> Tensor:
        tuned = base.to(torch.float32, copy=True)
        rows = tuned.T if self.transposed else tuned  # [N, K]
        step = max(1, _BLOCK // max(1, self.in_features))
        for start in range(0, self.out_features, step):
            block = slice(start, start + step)
            rows[block] += self.rows(block, device=base.device)
        return tuned


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Matrix):
    """A matrix of which some rows are stored outright: few changed, the table grew, or it moved far.

    Rows listed in `index` are `values`; every other row is what `over` says (the base's own row when `over` is None).
    Rows at or past the base's count are always listed. Row means output feature, also when `transposed`.

    Attributes:
        index: int64 [r], ascending, unique.
        values: the tuned rows in their own dtype, [r, K].
        over: the encoding beneath, for the rows that the base has; its shape is the base's.
    """

    kind = "rows"
    index: Tensor
    values: Tensor
    over: Sign | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over is not None and self.over.transposed != self.transposed:
            raise ValueError("the sign planes under rows must have the orientation of the rows")
        if self.index.dtype != torch.int64 or self.index.dim() != 1:
            raise ValueError(f"index must be int64 [r], got {self.index.dtype} {list(self.index.shape)}")
        if tuple(self.values.shape) != (self.index.numel(), self.in_features):
            raise ValueError(f"values must be {[self.index.numel(), self.in_features]}, got {list(self.values.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this encoding and of the one beneath."""
        return super().nbytes + (self.over.nbytes if self.over is not None else 0)

    def apply(self, base: Tensor) -> Tensor:
        under = base if self.over is None else self.over.apply(base)
        tuned = torch.zeros(self.shape, device=base.device)
        rows, under_rows = (tuned.T, under.T) if self.transposed else (tuned, under)  # [N, K]
        kept = min(under_rows.shape[0], self.out_features)
        rows[:kept] = under_rows[:kept]
        rows[self.index.to(base.device)] = self.values.to(base.device).float()
        return tuned


def _layout(value: object) -> object:
    if isinstance(value, Encoding):
        return value.layout
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


KINDS: dict[str, type[Encoding]] = {cls.kind: cls for cls in (Same, Dense, Sign, Rows)}
