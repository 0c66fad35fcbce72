"""What a graph can hold of one parameter: fixed when a model is attached, because shapes are compiled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from ..encodings import Dense, Encoding, Rows, Same, Sign
from ..errors import UnsupportedError

SMALL = 4096  # elements: a parameter below, or of one dimension, is stored outright by every slot


@dataclasses.dataclass(frozen=True)
class Reserve:
    """Room for one parameter in every slot.

    Attributes:
        planes: sign planes; 0: no packed delta.
        col_scale: room for column scales.
        rank: of the low-rank part.
        rows: stored rows, added tokens among them.
        out_features: rows of the largest matrix, 0: as many as the base has.
        dense: how many tenants may store the whole matrix.
        small: every tenant may store the whole tensor (biases, norm weights, small tables).
    """

    planes: int = 0
    col_scale: bool = False
    rank: int = 0
    rows: int = 0
    out_features: int = 0
    dense: int = 0
    small: bool = False

    @classmethod
    def default(cls, base: Tensor) -> Reserve:
        """A matrix or table gets one sign plane, a small parameter a dense slot, anything else nothing."""
        if base.dim() < 2 or base.numel() < SMALL:
            return cls(small=base.is_floating_point())
        return cls(planes=1) if base.dim() == 2 else cls()

    @classmethod
    def needed(cls, encoding: Encoding, base: Tensor) -> Reserve:
        """What one encoding takes."""
        if isinstance(encoding, Same):
            return cls()
        if cls.default(base).small or base.dim() != 2:
            return cls(small=True)
        if isinstance(encoding, Dense):
            return cls(dense=1)
        sign = encoding.over if isinstance(encoding, Rows) else encoding
        packed = cls()
        if isinstance(sign, Sign):
            packed = cls(planes=sign.planes, col_scale=sign.col_scale is not None, rank=sign.rank)
        if isinstance(encoding, Rows):
            rows = base.shape[1 if encoding.transposed else 0]
            grown = encoding.out_features if encoding.out_features > rows else 0
            packed = dataclasses.replace(packed, rows=encoding.index.numel(), out_features=grown)
        return packed

    def __or__(self, other: Reserve) -> Reserve:
        """Room for what either has room for."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in _FIELDS)
        return Reserve(**{name: max(mine, theirs) for name, mine, theirs in pairs})

    def lacks(self, needed: Reserve) -> list[str]:
        """What `needed` has and this has not, in words."""
        pairs = ((field.name, getattr(self, field.name), getattr(needed, field.name)) for field in _FIELDS)
        return [f"{name}={wanted} (there is room for {int(mine)})" for name, mine, wanted in pairs if wanted > mine]


_FIELDS = dataclasses.fields(Reserve)


def plan(
    base: Mapping[str, Tensor],
    first: Mapping[str, Mapping[str, Encoding]],
    asked: Reserve | Mapping[str, Reserve] | None,
) -> dict[str, Reserve]:
    """Room for every parameter: the default, what the first tenants need, and what was asked for.

    Args:
        base: its parameters.
        first: tenant -> encodings by the base's names.
        asked: for every matrix, or by parameter name.

    Raises:
        UnsupportedError: a name that the base does not have.
    """
    if isinstance(asked, Mapping):
        for name in asked:
            if name not in base:
                raise UnsupportedError(f"reserve names {name}, but the base has no such parameter")
    room: dict[str, Reserve] = {}
    for name, tensor in base.items():
        needs = [Reserve.needed(each[name], tensor) for each in first.values() if name in each]
        room[name] = Reserve.default(tensor)
        for need in needs:
            room[name] |= need
        dense = sum(need.dense for need in needs)
        if dense:  # one more, so that a tenant can be replaced while its old tensor is in use
            room[name] = dataclasses.replace(room[name], dense=dense + 1)
        if isinstance(asked, Mapping):
            room[name] |= asked.get(name, Reserve())
        elif asked is not None and tensor.dim() == 2 and not room[name].small:
            room[name] |= asked
    return room
