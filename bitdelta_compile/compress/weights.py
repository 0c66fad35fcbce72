"""What the two models compute with: tuned parameters, and base + delta for every matrix that is fitted already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..encodings import Dense, Encoding, Rows, Same, Sign


class TunedValues:
    """The tuned model's own parameters, in fp32.

    Args:
        device: where they are put while an operation uses them; None leaves them where they are.
    """

    def __init__(self, tuned: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        self._tuned, self.device = tuned, device
        self._wide: dict[str, Tensor] = {}

    def matrix(self, name: str) -> Tensor | None:
        stored = self._tuned.get(name)
        if stored is None or stored.is_meta or (stored.dtype == wide(stored.dtype) and not self._away(stored)):
            return None
        if name not in self._wide:
            self._wide[name] = stored.detach().to(self.device or stored.device).to(wide(stored.dtype))
        return self._wide[name]

    def _away(self, stored: Tensor) -> bool:
        return self.device is not None and stored.device != self.device

    def rows(self, name: str, ids: Tensor) -> Tensor | None:
        stored = self._tuned.get(name)
        if stored is None or stored.is_meta or not self._away(stored):
            return None
        return stored.detach()[ids.to(stored.device)].to(self.device).to(wide(stored.dtype))

    def vector(self, name: str) -> Tensor | None:
        return None

    def forget(self, name: str | None = None) -> None:
        """Let go of a converted copy, or of all: the streams have moved on."""
        _forget(self._wide, name)


class FittedValues:
    """Base + delta where a matrix is fitted, the tuned parameter elsewhere.

    Attributes:
        encodings, vectors: what is fitted, by name; to be filled by the caller.

    Args:
        device: as in `TunedValues`.
    """

    def __init__(
        self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], device: torch.device | None = None
    ) -> None:
        self._base, self._tuned, self.device = base, tuned, device
        self._others = TunedValues(tuned, device)
        self._dense: dict[str, Tensor] = {}
        self.encodings: dict[str, Encoding] = {}
        self.vectors: dict[str, Tensor] = {}

    def matrix(self, name: str) -> Tensor | None:
        encoding = self.encodings.get(name)
        if encoding is None or isinstance(encoding, Dense):
            return self._others.matrix(name)
        if name not in self._dense:
            tuned = self._tuned[name]
            dense = encoding.apply(self._base[name].detach().to(self.device or tuned.device))
            self._dense[name] = dense.to(wide(tuned.dtype))
        return self._dense[name]

    def vector(self, name: str) -> Tensor | None:
        found = self.vectors.get(name)
        return None if found is None else found.to(self.device or found.device, wide(found.dtype))

    def rows(self, name: str, ids: Tensor) -> Tensor | None:
        encoding = self.encodings.get(name)
        if encoding is None or isinstance(encoding, Dense):
            return self._others.rows(name, ids)
        unique, place = ids.unique(return_inverse=True)
        stored = self._tuned[name].detach()
        found = stored[unique.to(stored.device)].to(self.device or stored.device, wide(stored.dtype))
        sign = encoding.over if isinstance(encoding, Rows) else encoding
        if isinstance(sign, Sign | Same):
            listed = encoding.index if isinstance(encoding, Rows) else unique.new_zeros(0)
            covered = torch.isin(unique, listed.to(unique.device), invert=True)
            known = unique[covered]
            under = self._base[name].detach()[known.to(self._base[name].device)].float().to(found.device)
            if isinstance(sign, Sign):
                under = under + sign.rows(known.cpu(), device=found.device)
            found[covered] = under.to(found.dtype)
        return found[place]

    def forget(self, name: str | None = None) -> None:
        """Let go of a dense copy, or of all: the streams have moved on."""
        _forget(self._dense, name)
        self._others.forget(name)


def _forget(copies: dict[str, Tensor], name: str | None) -> None:
    if name is None:
        copies.clear()
    else:
        copies.pop(name, None)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a model of this dtype is computed in: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)
