"""Sampling with one random generator per row: what a row draws does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

_SEED_LIMIT = 2**63 - 1


def seeded(rows: int, device: torch.device) -> list[torch.Generator]:
    """One generator per row, seeded from torch's default generator."""
    seeds = torch.randint(_SEED_LIMIT, (rows,)).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def streams(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """Independent generators derived from one, which moves on by the same amount however much they are used."""
    seeds = torch.randint(_SEED_LIMIT, (count,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]


def derived(generator: torch.Generator | None, count: int) -> Sequence[torch.Generator | None]:
    """A row's generators for `count` return sequences: its own for one, else streams; None where it draws nothing."""
    return [generator] * count if generator is None or count == 1 else streams(generator, count)


class Draw(LogitsProcessor):
    """Draws each row's token from that row's own generator and leaves no other token to choose.

    It stands behind all other processors, so that the loop's argmax finds the token drawn. A row draws as
    `torch.multinomial` does alone, with its generator in the place of the default one, and draws nothing any more once
    it has finished.
    """

    def __init__(self, generators: Sequence[torch.Generator | None]) -> None:
        """generators: one per row of the scores; None: the row takes its most likely token."""
        self.generators = generators
        self.finished = [False] * len(generators)
        self._drawn: tuple[Tensor, Tensor] | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [rows, V] fp32 -> the same shape, 0 at each row's token and -inf elsewhere."""
        probabilities = torch.softmax(scores, dim=-1)
        tokens = torch.argmax(scores, dim=-1, keepdim=True)
        for row, generator in enumerate(self.generators):
            if generator is not None and not self.finished[row]:
                tokens[row] = torch.multinomial(probabilities[row : row + 1], 1, generator=generator)[0]
        only = torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)
        self._drawn = only, scores
        return only

    def restore(self) -> None:
        """Give the scores that the loop has recorded for the step the values that were drawn from."""
        if self._drawn is not None:
            only, scores = self._drawn
            only.copy_(scores)
            self._drawn = None


class DrawingCriteria(StoppingCriteriaList):
    """The stopping criteria of a call that draws: after each step they tell `Draw` which rows have finished."""

    def __init__(self, criteria: StoppingCriteriaList, draw: Draw) -> None:
        super().__init__(criteria)
        self.draw = draw

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.draw.restore()
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        self.draw.finished = [old or new for old, new in zip(self.draw.finished, done.tolist(), strict=True)]
        return done


def continuations(log_probs: Tensor, keep: int, generators: Sequence[torch.Generator | None]) -> Tensor:
    """The `keep` continuations of each row's beams: drawn without replacement, or the most likely for a row without
    generator. log_probs [B, beams * V] -> int64 [B, keep], in the order drawn.
    """
    chosen = torch.topk(log_probs, k=keep).indices
    for row, generator in enumerate(generators):
        if generator is not None:
            probabilities = torch.softmax(log_probs[row], dim=-1)
            chosen[row] = torch.multinomial(probabilities, keep, generator=generator)
    return chosen
