"""The deltas of one parameter, stacked over slots: what a graph is called with, for one fine-tune or for many."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from .encodings import Encoding, Rows, Sign
from .kernels.configs import device_layout
from .kernels.layout import layout_of, padding_bytes, to_layout


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """One parameter over T slots. Any part may be missing; without all of them every tenant has the base's tensor.

    Sizes as in `lowering.ops`: N out, K in, C rows that a slot can store, D dense tensors.

    Attributes:
        shape, dtype: of the base's parameter as the model stores it.
        transposed: it is stored [K, N].
        signs, row_scale, col_scale, left, right: int32 [T, P, N, W] or in the layout of the base's device
            (`kernels.layout`), fp32 [T, P, N], fp32 [T, P, K], bf16 [T, N, r] and [T, r, K].
        rows_index, rows_values: int64 [T, C] ascending, unused places hold `out_features`; [T, C, K].
        vocabulary: int64 [T + 1], rows of each slot's matrix, the base's last; None where none has grown.
        out_features: rows of the largest matrix.
        dense, place: [D, N, K] and int64 [T], a slot's entry in dense or -1: for matrices that few tenants store so.
        small: [T + 1, *shape], the base's own last: for parameters that every slot stores so.
    """

    kind: ClassVar[str] = "stack"
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    signs: Tensor | None = None
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    rows_index: Tensor | None = None
    rows_values: Tensor | None = None
    vocabulary: Tensor | None = None
    out_features: int = 0
    dense: Tensor | None = None
    place: Tensor | None = None
    small: Tensor | None = None

    @classmethod
    def of(cls, encoding: Encoding, base: Tensor) -> Stack:
        """The stack of one slot for an encoding over the base's tensor."""
        shape, dtype = tuple(base.shape), base.dtype
        sign = encoding.over if isinstance(encoding, Rows) else encoding
        packed: dict[str, Any] = {}
        if isinstance(sign, Sign):
            packed = {name: tensor.unsqueeze(0) for name, tensor in sign.tensors().items()}
        if not isinstance(encoding, Rows):
            return cls(
                shape, dtype, isinstance(encoding, Sign) and encoding.transposed, **_prepacked(packed, sign, base)
            )
        rows = shape[1 if encoding.transposed else 0]
        if isinstance(sign, Sign) and sign.out_features < rows:  # the base was resized: its new rows have no signs
            missing = rows - sign.out_features
            for field, after in (
                ("signs", (0, 0, 0, missing)),
                ("row_scale", (0, missing)),
                ("left", (0, 0, 0, missing)),
            ):
                if field in packed:
                    packed[field] = torch.nn.functional.pad(packed[field], after)
        grown = encoding.out_features > rows
        return cls(
            shape,
            dtype,
            encoding.transposed,
            **_prepacked(packed, sign, base),
            rows_index=encoding.index.unsqueeze(0) if encoding.index.numel() else None,
            rows_values=encoding.values.to(dtype).unsqueeze(0) if encoding.index.numel() else None,
            vocabulary=torch.tensor([encoding.out_features, rows], device=base.device) if grown else None,
            out_features=encoding.out_features,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name; those that are None are left out."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def layout(self) -> tuple[object, ...]:
        """What a graph over this stack depends on: everything but the values."""
        tensors = ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors().items())
        return (self.kind, self.shape, self.dtype, self.transposed, self.out_features, *tensors)

    @property
    def base_rows(self) -> int:
        """N of the base's matrix."""
        return self.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[0 if self.transposed else 1]

    @property
    def grown(self) -> bool:
        """Whether some slot's matrix may have more rows than the base's."""
        return self.vocabulary is not None

    @property
    def packed(self) -> bool:
        """Whether uses of the parameter become packed nodes: it has planes, stored rows or single dense matrices."""
        return self.signs is not None or self.out_features > 0 or self.dense is not None

    @property
    def sign_layout(self) -> str:
        """Name of the layout of `signs`."""
        assert self.signs is not None
        return layout_of(self.signs, self.base_rows, self.in_features)

    @property
    def padding_bytes(self) -> int:
        """Bytes of `nbytes` that only fill up the layout of `signs`."""
        if self.signs is None:
            return 0
        slots, planes = self.signs.shape[:2]
        return slots * planes * padding_bytes(self.base_rows, self.in_features, self.sign_layout)

    @property
    def planes(self) -> int:
        """P."""
        return 0 if self.signs is None else self.signs.shape[1]

    @property
    def rank(self) -> int:
        """r of the low-rank part, 0 where there is none."""
        return 0 if self.left is None else self.left.shape[2]

    @property
    def stored_rows(self) -> int:
        """C."""
        return 0 if self.rows_index is None else self.rows_index.shape[1]


def _prepacked(packed: dict[str, Any], sign: Encoding | None, base: Tensor) -> dict[str, Any]:
    """The packed tensors with their signs as the kernels of the base's device want them."""
    if not isinstance(sign, Sign):
        return packed
    signs = to_layout(packed["signs"], sign.in_features, device_layout(base.device))
    return packed | {"signs": signs}
