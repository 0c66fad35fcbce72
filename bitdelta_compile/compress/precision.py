"""fp32 products of all 24 bits, whatever the process allows for its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_put_back: list[Callable[[], None]] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, no bf16 and no autocast in products of fp32 matrices; convolutions are as torch has them.

    Sums over thousands of tokens are inverted, and each sign depends on those before it: products of 11 bits would give
    other planes on every machine. Autocast is turned off for this thread. Precision (what
    `torch.set_float32_matmul_precision` sets) is the process's: other threads compute at full precision meanwhile, and
    what torch has compiled for another precision it compiles again. It is put back when the last fit ends.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _put_back[:] = _raise_precision()
        _inside += 1
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            while _inside == 0 and _put_back:
                _put_back.pop(0)()


def _raise_precision() -> list[Callable[[], None]]:
    """Set it; what to call to undo that. torch has an older setting and a newer one, and refuses to read the older
    where they disagree: so both are set."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    undo: list[Callable[[], None]] = []
    with contextlib.suppress(RuntimeError):  # they disagree already
        older = torch.get_float32_matmul_precision()
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
            undo.append(lambda: torch.set_float32_matmul_precision(older))
    for place, precision in zip(places, before, strict=True):
        if place.fp32_precision != "ieee":
            place.fp32_precision = "ieee"
        undo.append(lambda place=place, precision=precision: _set(place, precision))  # type: ignore[misc]
    return undo


def _set(place: Any, precision: str) -> None:
    """Without ending an inheritance: "none" is what a wider setting says."""
    for value in ("none", precision):
        if place.fp32_precision != precision:
            place.fp32_precision = value
