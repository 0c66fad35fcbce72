"""The low-rank part: what the sign planes leave of a layer's output, in its r strongest directions.

With R [N, K] what the planes leave of the delta and F any matrix with F F^T = H, the error of the output is R F. Its
best correction of rank r (Eckart and Young) is R F V V^T, V [K, r] being its strongest right singular vectors: left =
R F V and right = V^T inverse(F). V comes from the [K, K] Gram matrix of R F, which sums over blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .metric import Metric

OVERSAMPLING = 16
ITERATIONS = 12


class LowRank:
    """Takes the residual of all rows, block by block; then gives `right` once, and `left` block by block.

    Residuals are [K, n], features in the metric's order.

    Args:
        rank: r, at most K.
        metric: with its `upper`; None: every weight counts alike.
    """

    def __init__(self, rank: int, features: int, metric: Metric | None, device: torch.device) -> None:
        self.rank = rank
        self._upper = None if metric is None else metric.upper
        self._gram = torch.zeros(features, features, device=device)
        self._directions = torch.zeros(features, 0, device=device)

    def _output(self, rest: Tensor) -> Tensor:
        """(R F)^T, with inverse(upper) for F."""
        return rest if self._upper is None else torch.linalg.solve_triangular(self._upper.T, rest, upper=False)

    def add(self, rest: Tensor) -> None:
        lost = self._output(rest)
        self._gram.addmm_(lost, lost.T)

    def right(self) -> Tensor:
        """fp32 [r, K] of bf16 values, in the metric's order. To be called once, after every `add`."""
        features = self._gram.shape[0]
        width = min(features, self.rank + OVERSAMPLING)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(features, width, generator=generator).to(self._gram.device)
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(self._gram @ basis).Q
        _, turn = torch.linalg.eigh(basis.T @ self._gram @ basis)
        self._directions = (basis @ turn).flip(-1)[:, : self.rank]
        right = self._directions.T
        if self._upper is not None:
            right = right @ self._upper
        return right.bfloat16().float()

    def left(self, rest: Tensor) -> Tensor:
        """fp32 [n, r] of bf16 values, for these rows."""
        left = self._output(rest).T @ self._directions
        return left.bfloat16().float()
