"""transformers' logits processors and stopping criteria, each applied to some rows of the batch.

Beams and return sequences stand in the place of their input row: entry i of a batch of R * n belongs to row i // n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


def entries(rows: Sequence[int], times: int) -> list[int]:
    """The entries in the place of these input rows, `times` each."""
    return [row * times + each for row in rows for each in range(times)]


def for_rows(rows: Sequence[int], total: int, values: Mapping[str, Any], times: int = 1) -> dict[str, Any]:
    """The values, every tensor of total * times entries cut to those of these rows."""
    chosen = entries(rows, times)
    return {
        name: value[chosen] if isinstance(value, Tensor) and value.ndim and value.shape[0] == total * times else value
        for name, value in values.items()
    }


class _Indices:
    """Entries of several groups of input rows, as index tensors that are made once per batch size and device."""

    def __init__(self, groups: Sequence[Sequence[int]], total: int) -> None:
        self._groups = groups
        self._total = total
        self._made: dict[tuple[int, torch.device], list[Tensor]] = {}

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """int64 indices into the first dimension of [total * n, ...], per group."""
        key = batch.shape[0], batch.device
        if key not in self._made:
            times = batch.shape[0] // self._total
            self._made[key] = [torch.tensor(entries(rows, times), device=batch.device) for rows in self._groups]
        return self._made[key]


class RowwiseProcessor(LogitsProcessor):
    """Each group's logits processors on the group's own rows."""

    def __init__(self, groups: Sequence[Sequence[int]], parts: Sequence[Sequence[LogitsProcessor]], total: int) -> None:
        """groups: their input rows, out of `total`; parts: their processors."""
        self._parts = [LogitsProcessorList(part) for part in parts]
        self._indices = _Indices(groups, total)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids int64 [entries, S], scores [entries, V] -> [entries, V]."""
        processed = scores.clone()
        for index, processors in zip(self._indices(scores), self._parts, strict=True):
            processed[index] = processors(input_ids[index], scores[index])
        return processed


class RowwiseCriteria(StoppingCriteria):
    """Each group's stopping criteria on the group's own rows."""

    def __init__(
        self, groups: Sequence[Sequence[int]], parts: Sequence[Sequence[StoppingCriteria]], total: int
    ) -> None:
        """groups: their input rows, out of `total`; parts: their criteria."""
        self._parts = [StoppingCriteriaList(part) for part in parts]
        self._indices = _Indices(groups, total)
        ends = [each.eos_token_id for part in parts for each in part if hasattr(each, "eos_token_id")]
        if ends:
            # The sampling loop fills finished rows up if any criterion has an attribute of this name.
            self.eos_token_id = torch.cat(ends).unique()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """input_ids int64 [entries, S] -> bool [entries]."""
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for index, criteria in zip(self._indices(input_ids), self._parts, strict=True):
            done[index] = criteria(input_ids[index], None, **kwargs)
        return done
