"""fp32 products of all 24 bits, whatever the process allows for its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no bf16 in the products of fp32 matrices, as `torch.set_float32_matmul_precision` may allow them.

    Sums over thousands of tokens are inverted and each sign depends on those before it: products of 11 bits would give
    other planes on every machine. The setting is the process's, so other threads compute at full precision meanwhile;
    it is put back when the last fit ends.
    """
    global _inside
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    with _lock:
        if _inside == 0:
            _before[:] = [place.fp32_precision for place in places]
            for place in places:
                _set(place, "ieee")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for place, precision in zip(places, _before, strict=True):
                    _set(place, precision)


def _set(place: Any, precision: str) -> None:
    if place.fp32_precision != precision:  # saying again what is inherited would end the inheritance
        place.fp32_precision = precision
