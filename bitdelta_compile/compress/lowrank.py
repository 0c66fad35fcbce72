"""The low-rank part: what the sign planes leave of a layer's output, in its r strongest output directions.

With R [N, K] the delta that the planes leave and Y = X R^T the output they lose, the best rank-r correction of Y is Y
V V^T with V [N, r] the right singular vectors of Y (Eckart and Young). It is reached by left = V, right = V^T R, so
neither X nor H is held: a sketch of Y's rows, folded after every few tokens, gives V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fit import Planes

FOLD_TOKENS = 256
OVERSAMPLING = 16


class LowRankFit:
    """Streams inputs, then gives the two factors.

    Args:
        planes, row_scale: the fitted sign planes, scales fp32 [P, N].
        rank: r, cut to min(N, K).
    """

    def __init__(self, planes: Planes, row_scale: Tensor, rank: int) -> None:
        self.planes = planes
        self.row_scale = row_scale
        self.rank = min(rank, planes.matrix.rows, planes.matrix.features)
        self._sketch = torch.zeros(0, planes.matrix.rows, device=planes.matrix.tuned.device)

    def update(self, x: Tensor, weight: float = 1.0) -> None:
        """Add inputs x [*, K]; `weight` multiplies their squared error."""
        matrix = self.planes.matrix
        for chunk in x.detach().reshape(-1, matrix.features).split(FOLD_TOKENS):
            tokens = chunk.float().mul(weight**0.5)
            lost = torch.empty(tokens.shape[0], matrix.rows, device=tokens.device)
            for first, block in matrix.blocks():
                _, left_over = self.planes.residual(block, first, self.row_scale)
                lost[:, first : first + block.shape[0]] = tokens @ left_over.T
            self._fold(lost)

    def update_weights(self, weight: float = 1.0) -> None:
        """Add one input per feature: every weight counts alike, as for rows that are looked up."""
        matrix = self.planes.matrix
        for first in range(0, matrix.features, FOLD_TOKENS):
            count = min(FOLD_TOKENS, matrix.features - first)
            one_hot = torch.zeros(count, matrix.features, device=matrix.tuned.device)
            one_hot[:, first : first + count].fill_diagonal_(1.0)
            self.update(one_hot, weight)

    def _fold(self, rows: Tensor) -> None:
        """Keep the strongest directions of the sketch and the new rows together."""
        stacked = torch.cat([self._sketch, rows])
        count, features = stacked.shape
        keep = min(count, features, self.rank + OVERSAMPLING)
        if count <= features:
            _, vectors = torch.linalg.eigh((stacked @ stacked.T).double())
            self._sketch = vectors[:, -keep:].float().T @ stacked
        else:
            energies, vectors = torch.linalg.eigh((stacked.T @ stacked).double())
            self._sketch = (vectors * energies.clamp_min(0).sqrt())[:, -keep:].float().T

    def solve(self) -> tuple[Tensor, Tensor, float]:
        """left bf16 [N, r], right bf16 [r, K], and the energy of the lost output that they bring back."""
        matrix = self.planes.matrix
        energies, vectors = torch.linalg.eigh((self._sketch @ self._sketch.T).double())
        energies, vectors = energies[-self.rank :].clamp_min(0), vectors[:, -self.rank :]
        strength = torch.where(energies > 0, energies.rsqrt(), 0.0)
        left = (self._sketch.T @ (vectors * strength).float()).bfloat16()  # [N, r], orthonormal
        left = torch.nn.functional.pad(left, (0, self.rank - left.shape[1]))
        right = torch.zeros(self.rank, matrix.features, device=left.device)
        for first, block in matrix.blocks():
            _, left_over = self.planes.residual(block, first, self.row_scale)
            right += left[first : first + block.shape[0]].float().T @ left_over
        return left.cpu(), right.bfloat16().cpu(), float(energies.sum())
