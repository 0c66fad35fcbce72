"""How hard to fit, and what each parameter may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from ..kernels import layout

Method = Literal["sequential", "closed_form", "mean_abs"]
Quality = Literal["fast", "balanced", "best"]

MAX_PLANES = 4
FIT = 4  # goes up when equal settings give other planes: work of an earlier fit is not gone on with


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What one matrix is given, in place of the settings for all.

    Attributes:
        encoding: `sign`; `dense`, the tuned matrix itself; or `same`, the base's: its delta is dropped.
        planes, rank: of `sign`, as in `Settings`.
    """

    encoding: Literal["sign", "dense", "same"] = "sign"
    planes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.encoding not in ("sign", "dense", "same"):
            raise ValueError(f"an allocation's encoding must be 'sign', 'dense' or 'same', got {self.encoding!r}")
        check_size(self.planes, self.rank)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to encode.

    Attributes:
        method: `sequential` fits signs and scales to the inputs that each layer meets in the compressed model, in
            execution order; `closed_form` takes the delta's own signs and fits row scales to the inputs in the tuned
            model; `mean_abs` is one scale per matrix, mean |d|, from the weights.
        planes: sign planes per matrix, 1 to 4.
        rank: of the low-rank part of each matrix; 0 is none.
        columns: column scales for each plane: the column means of |d| over that of the whole; None gives them to
            `closed_form` only, which they help.
        passes: of error feedback over a matrix (`sequential`).
        sweeps: of single sign flips after them (`sequential`).
        max_error: a matrix is stored dense if its planes leave more than this share of the tuned matrix's own norm.
        far: a table that is looked up first and has moved by more than this share of its own norm gets a low-rank part
            and its most used rows outright (`sequential`, where `allocation` does not name it).
        min_elements: smaller matrices are stored dense.
        allocation: by parameter name, for those that differ from the rest.
    """

    method: Method = "closed_form"
    planes: int = 1
    rank: int = 0
    columns: bool | None = None
    passes: int = 2
    sweeps: int = 2
    max_error: float = 0.25
    far: float = 0.1
    min_elements: int = 4096
    allocation: Mapping[str, Allocation] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        check_size(self.planes, self.rank)

    def size(self, name: str) -> tuple[int, int]:
        """Planes and rank of a parameter."""
        given = self.allocation.get(name, self)
        return given.planes, given.rank

    @property
    def ranked(self) -> bool:
        """Whether some parameter gets a low-rank part."""
        return self.rank > 0 or any(given.rank > 0 for given in self.allocation.values())

    def sign_bytes(self, rows: int, features: int, name: str = "") -> int:
        """Bytes of the sign planes, scales and low-rank part of a matrix [rows, features]."""
        planes, rank = self.size(name)
        words = planes * (rows * (layout.words(features) + 1) + (features if self.scales_columns else 0))
        return 4 * words + 2 * min(rank, rows, features) * (rows + features)

    @property
    def scales_columns(self) -> bool:
        """Whether planes have column scales."""
        return self.method != "mean_abs" and (self.method == "closed_form" if self.columns is None else self.columns)


def check_size(planes: object, rank: object) -> None:
    """ValueError for a number of planes or a rank that no matrix can have."""
    if not isinstance(planes, int) or not 1 <= planes <= MAX_PLANES:
        raise ValueError(f"planes must be an integer, 1 to {MAX_PLANES}, got {planes!r}")
    if not isinstance(rank, int) or rank < 0:
        raise ValueError(f"rank must be an integer, 0 or more, got {rank!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a quality stands for. Costs are in passes over the calibration tokens and in products with H [K, K] per
    weight (2 K multiply-adds each), which is where the time goes.

    Attributes:
        method, passes, sweeps: as in `Settings`.
        tokens: of calibration, where the caller names no number.
        random_tokens: the same where they are random: it takes more of them.
    """

    method: Method
    passes: int
    sweeps: int
    tokens: int
    random_tokens: int


RECIPES: Mapping[Quality, Recipe] = {
    "fast": Recipe("closed_form", 0, 0, 2048, 2048),  # one pass, one product: seconds for 100 M weights
    "balanced": Recipe("sequential", 1, 0, 4096, 8192),  # two passes, five products
    "best": Recipe("sequential", 2, 2, 8192, 16384),  # two passes, eleven products
}
