"""How many rows an op has, as far as its graph says: what `kernels.configs` chooses kernels by."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy

from ..kernels import configs
from . import torch_internals


@dataclasses.dataclass(frozen=True)
class Rows:
    """M of an op.

    Attributes:
        likely: M, or its hint where it is symbolic.
        most: what M never exceeds; None where it is symbolic and may be more than `configs.DECODE_ROWS`.
        unbounded: what is known of M where `most` is None.
    """

    likely: int
    most: int | None
    unbounded: configs.Unbounded | None = None

    @classmethod
    def of(cls, size: Any, entries: Any, hint: int, shape_env: Any) -> Rows:
        """
        Args:
            size: M, an int or a sympy expression.
            entries: R alike, None without a row index.
            hint: of M.
        """
        if is_static(size):
            return cls(int(size), int(size))
        most = torch_internals.upper_bound(size, shape_env)
        if most is not None and most <= configs.DECODE_ROWS:
            return cls(hint, most)
        if entries is None:
            return cls(hint, None, configs.Unbounded(indexed=False, each=None))
        each: Any = sympy.cancel(shape_env.simplify(sympy.sympify(size)) / shape_env.simplify(sympy.sympify(entries)))
        return cls(hint, None, configs.Unbounded(indexed=True, each=int(each) if is_static(each) else None))


def is_static(size: Any) -> bool:
    return isinstance(size, int) or bool(size.is_Integer)
