"""Weights that a quantization library holds in a form of its own, such as torchao's.

Such a weight is a subclass of Tensor that wraps the tensors it is stored as, looks like the floating-point weight it
stands for, and brings its own linear. That is all that is known of it here: no library is named or imported. A delta
over a quantized base is one over the values that this linear multiplies with, so it also makes up for what quantization
did to the base; the graph keeps the quantized weight and its linear.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import UnsupportedError

_COLUMNS = 1024  # read at a time from a packed form


def is_quantized(tensor: object) -> bool:
    """Whether this is a tensor that is held in a quantized form: one that can dequantize itself, or holds integers."""
    if not isinstance(tensor, Tensor) or not is_traceable_wrapper_subclass(tensor):
        return False
    return _dequantizes(tensor) or not all(part.is_floating_point() for part in parts(tensor))


def _dequantizes(tensor: Tensor) -> bool:
    return type(tensor).dequantize is not Tensor.dequantize


def values(tensor: Tensor) -> Tensor:
    """A quantized tensor's values as a plain tensor of its dtype, made anew by each call; any other tensor itself.

    A packed form that only its kernels can read gives them as its product with the identity.
    """
    if not is_quantized(tensor):
        return tensor
    with torch.no_grad():
        if _dequantizes(tensor):
            return tensor.dequantize()
        identity = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
        columns = [nn.functional.linear(some, tensor) for some in identity.split(_COLUMNS)]
        return torch.cat(columns).T.contiguous()


class Values(Mapping[str, Tensor]):
    """The values of tensors by name. Those of a quantized one are made when it is asked for, which takes a product with
    the identity for some, and are there until another one is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._made: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        if not is_quantized(stored):
            return stored
        if self._made is None or self._made[0] != name:
            self._made = None  # let go of before another is made
            self._made = name, values(stored)
        return self._made[1]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is stored as: of a plain one, itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(tensor, name))]


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored as the same values, each part in the same memory or equal."""
    mine, its = parts(one), parts(other)
    pairs = zip(mine, its, strict=False)
    return len(mine) == len(its) and all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of what a tensor is stored as; its own `nbytes` counts the floating-point values."""
    return sum(part.nbytes for part in parts(tensor))


def remedy(tensor: Tensor | None) -> str:
    """What to do where a base's tensor is not the one that a delta was made against."""
    if tensor is not None and is_quantized(tensor):
        return (
            f"here it is quantized ({type(tensor).__name__}), and a delta is fitted to that: compress the fine-tune "
            "against this base (save_pretrained restores a fine-tune from its delta and the delta's own base)"
        )
    return "give the base that it was compressed against"


def refuse(named: Iterable[tuple[str, Tensor]]) -> None:
    """UnsupportedError, naming the parameter, if a fine-tune is quantized: its delta would carry its own error."""
    for name, tensor in named:
        if is_quantized(tensor):
            raise UnsupportedError(
                f"{name} of the fine-tune is quantized ({type(tensor).__name__}): give the fine-tune as it was before, "
                "only the base may be quantized"
            )


@contextlib.contextmanager
def plain_parameters(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Puts a plain parameter without values in the place of each quantized one, for torch.export.

    Exporting a quantized linear takes it apart into whatever the library does, which differs by format and version; an
    export in this context has a linear there.

    Yields:
        The quantized parameters by every name they have.
    """
    owners: list[tuple[nn.Module, str, nn.Parameter]] = []
    quantized: dict[str, Tensor] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner._parameters.items():
            if parameter is not None and is_quantized(parameter):
                owners.append((owner, name, parameter))
                quantized[f"{path}.{name}" if path else name] = parameter
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                stand_ins.setdefault(id(parameter), nn.Parameter(empty, requires_grad=False))
    try:
        for owner, name, parameter in owners:
            owner._parameters[name] = stand_ins[id(parameter)]
        yield quantized
    finally:
        for owner, name, parameter in owners:
            owner._parameters[name] = parameter
