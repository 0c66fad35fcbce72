"""Parameters whose tuned weights were let go (`release=True`): they hold the base's values, and share its storage."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .errors import UnsupportedError

_released: WeakIdKeyDictionary = WeakIdKeyDictionary()


def mark(parameter: Tensor) -> None:
    """Remember that a parameter's tuned weights are gone."""
    _released[parameter] = True


def refuse(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise UnsupportedError, naming the parameter, if the tuned weights of one of these were let go."""
    for name, parameter in named:
        if parameter in _released:
            raise UnsupportedError(
                f"the tuned weights of {name} were released when the model was compiled, what it holds now is the "
                "base's: load the fine-tune again"
            )
