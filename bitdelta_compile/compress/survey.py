"""A look at what the model runs: which matrices it uses, how, and how often."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .streams import Run, Substitution, Values
from .uses import Use


@dataclasses.dataclass
class Usage:
    """How one run uses one matrix.

    Attributes:
        multiplied, looked_up: how often.
        transposed: it is stored [K, N].
        refused: why sign planes cannot stand for it; None where they can.
    """

    multiplied: int = 0
    looked_up: int = 0
    transposed: bool | None = None
    refused: str | None = None

    def add(self, use: Use) -> None:
        if use.kind == "other":
            self.refused = f"used by {use.op}"
        elif self.transposed is not None and self.transposed != use.transposed:
            self.refused = "multiplied both as stored and transposed"
        else:
            self.transposed = use.transposed
            self.multiplied += use.kind == "linear"
            self.looked_up += use.kind == "embedding"


@dataclasses.dataclass(frozen=True)
class Survey:
    """How a model uses its matrices.

    Attributes:
        usage: by name, as in the first run that reached the matrix; those that none did are missing.
        last: the matrix that the first run used last, None where there was none.
        others: how many operations used a parameter in another way, by its name; adding a bias is one.
    """

    usage: Mapping[str, Usage]
    last: str | None
    others: Mapping[str, int]


def survey(runs: Sequence[Run], handles: Mapping[str, Tensor], names: set[str], values: Values) -> Survey:
    """Watch the uses of `names` in the first run, and in as many more as it takes to have seen each of them."""
    usage: dict[str, Usage] = {}
    others: Counter[str] = Counter()
    last: str | None = None
    for run in runs:
        found = _look(run, handles, names, values)
        last = found.last if last is None else last
        others |= Counter(found.others)  # the most that a run has
        for name, seen in found.usage.items():
            if usage.setdefault(name, seen).refused is None:
                usage[name].refused = seen.refused
        if names <= usage.keys():
            break
    return Survey(usage, last, others)


def _look(run: Run, handles: Mapping[str, Tensor], names: set[str], values: Values) -> Survey:
    usage: dict[str, Usage] = {}
    order: list[str] = []
    others: Counter[str] = Counter()

    def on_use(use: Use) -> None:
        others[use.name] += use.kind == "other"
        if use.name in names:
            usage.setdefault(use.name, Usage()).add(use)
            order.append(use.name)

    with torch.no_grad(), Substitution(handles, on_use, values):
        run.call()
    return Survey(usage, order[-1] if order else None, others)
