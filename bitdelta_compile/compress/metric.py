"""What an error in a weight costs: H = X^T X over the inputs X that a matrix multiplies, and what follows from H.

The source of the damping, of the order of columns and of the inverse's Cholesky factor is GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

BLOCK_TOKENS = 2048
# H + DAMPING * mean(diag H) * I: directions that calibration never showed still count a little. That mean is taken with
# the mean input in it, also where a bias makes up for the mean input.
DAMPING = 0.01
SMALLEST = 1e-30  # of the mean square of inputs: less is nothing


class Moments:
    """Sums over the inputs of one matrix; fp32 [K, K] and fp64 [K], however many tokens.

    Attributes:
        tokens: inputs so far.
        gram: sum of x^T x.
        drift: sum of (x' - x)^T x, with x' the input in the tuned model where x is that in the compressed one; None as
            long as no x' was given.
        total, moved: sums of x and of x' - x.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.tokens = 0
        self.gram = torch.zeros(features, features, device=device)
        self.drift: Tensor | None = None
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.moved = torch.zeros_like(self.total)

    def add(self, x: Tensor, tuned: Tensor | None = None) -> None:
        """Add inputs x [t, K], and those of the tuned model in the same places."""
        self.tokens += x.shape[0]
        if tuned is not None and self.drift is None:
            self.drift = torch.zeros_like(self.gram)
        for first in range(0, x.shape[0], BLOCK_TOKENS):
            part = x[first : first + BLOCK_TOKENS].float()
            self.gram.addmm_(part.T, part)
            self.total += part.sum(0, dtype=torch.float64)
            if tuned is not None and self.drift is not None:
                apart = tuned[first : first + BLOCK_TOKENS].float() - part
                self.drift.addmm_(apart.T, part)
                self.moved += apart.sum(0, dtype=torch.float64)

    def center(self) -> tuple[Tensor, Tensor]:
        """Leave in the products what varies of the inputs; the means of x and of x' - x, fp32 [K]."""
        mean, moved = (each.div(max(1, self.tokens)).float() for each in (self.total, self.moved))
        self.gram.addr_(mean, self.total.float(), alpha=-1)
        if self.drift is not None:
            self.drift.addr_(moved, self.total.float(), alpha=-1)
        return mean, moved


@dataclasses.dataclass(frozen=True)
class Metric:
    """The squared error of a layer's output, as a quadratic form in the error r of a row of weights: r H r.

    Attributes:
        h: fp32 [K, K], damped, per token.
        order: int64 [K], features by falling diag(H): the order in which error feedback settles columns.
        upper: fp32 [K, K], upper triangular with upper^T upper = inverse(H), both in that order; None where nothing
            needs it.
        shift: fp32 [K, K] or None. A weight w that should give in the compressed model what it gives in the tuned one
            is to be w + w @ shift.
        mean, offset: fp32 [K], where a bias makes up for what errors make of the mean input, else None. For a tuned row
            w that ends with the error r it is to grow by r @ mean + w @ offset.
    """

    h: Tensor
    order: Tensor
    upper: Tensor | None = None
    shift: Tensor | None = None
    mean: Tensor | None = None
    offset: Tensor | None = None

    def unshifted(self) -> Metric:
        """The metric for which weights are to be what they are in the tuned model."""
        if self.shift is None:
            return self
        offset = None if self.offset is None or self.mean is None else self.offset + self.shift @ self.mean
        return dataclasses.replace(self, shift=None, offset=offset)

    @property
    def ordered(self) -> Tensor:
        """H in that order."""
        return self.h[self.order[:, None], self.order[None, :]]


def measure(moments: Moments, *, factor: bool, extra: float = 0.0, centered: bool = False) -> Metric | None:
    """The metric of these inputs, which it uses up; None where there were none, or next to nothing but zeros.

    Args:
        factor: find `upper`, and `shift` where the moments have the drift for it.
        extra: added to H's diagonal: what the weights as such count, beside what they are multiplied with. For tables
            that are also looked up.
        centered: a bias makes up for what the mean input makes of errors.
    """
    tokens = max(1, moments.tokens)
    level = float(moments.gram.diagonal().mean()) / tokens if moments.gram.numel() else 0.0
    if not level > SMALLEST:
        return None
    mean, offset = moments.center() if centered else (None, None)
    h = moments.gram.div_(tokens)
    order = h.diagonal().argsort(descending=True, stable=True)
    damping = DAMPING * level + extra
    h.diagonal().add_(damping)
    if not factor:
        return Metric(h, order, mean=mean, offset=offset)
    lower, failed = torch.linalg.cholesky_ex(h)
    while int(failed) or not bool(torch.isfinite(lower).all()):  # rounding of sums over very uneven inputs
        h.diagonal().add_(9 * damping)
        damping *= 10
        lower, failed = torch.linalg.cholesky_ex(h)
    shift = None
    if moments.drift is not None:
        shift = torch.cholesky_solve(moments.drift.T, lower).T.div_(tokens)
        moments.drift = None
    inverse = torch.cholesky_inverse(lower)
    del lower
    inverse = inverse[order[:, None], order[None, :]]
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    while int(failed):
        inverse.diagonal().mul_(1.01)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if shift is not None and mean is not None and offset is not None:
        offset = offset - shift @ mean
    return Metric(h, order, upper, shift, mean, offset)
