"""A device that is not there: its tensors hold their values in host memory.

What a GPU would refuse is refused: an operation on tensors of both sides, other than copies, lookups by indices of the
host, and numbers without dimensions.
"""

from __future__ import annotations

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
DEVICE = "pretended"
CROSSING = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
ASSIGNMENTS = {aten.index_put_.default, aten.index_put.default}


class There(torch.Tensor):
    """A tensor of the pretended device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here):
        layout = {"dtype": here.dtype, "device": DEVICE}
        found = torch.Tensor._make_wrapper_subclass(cls, here.shape, here.stride(), here.storage_offset(), **layout)
        found.here = here
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def tolist(self):
        return self.here.tolist()

    def data_ptr(self):
        return self.here.data_ptr()


def dispatch(func, args, kwargs):
    """The operation in host memory, and its results where a GPU would have them."""
    there = any(isinstance(leaf, There) for leaf in tree_leaves((args, kwargs)))
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE
        kwargs = {**kwargs, "device": "cpu"}
    elif func is aten.copy_.default:
        there = isinstance(args[0], There)
    elif there and func not in CROSSING:
        operands = (args, kwargs)
        if func is aten.index.Tensor:
            operands = args[:1]
        elif func in ASSIGNMENTS:
            operands = (args[0], args[2])
        tensors = [leaf for leaf in tree_leaves(operands) if isinstance(leaf, torch.Tensor)]
        if not all(isinstance(tensor, There) or not tensor.ndim for tensor in tensors):
            raise RuntimeError(f"{func} of tensors on two devices")
    args_here, kwargs_here = here((args, kwargs))
    found = func(*args_here, **kwargs_here)
    if not there:
        return found
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, There, found))


def here(tree):
    """The same with the tensors in host memory."""
    return tree_map_only(There, lambda leaf: leaf.here, tree)


def on(model, place):
    """The model on a device, its ties kept."""
    model.to(place)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # a tensor of a class of its own is moved once for each name
    return model


def add_device() -> None:
    """To the process, for good."""
    _setup_privateuseone_for_python_backend(DEVICE)
    LIBRARY.fallback(lambda func, *args, **kwargs: dispatch(func, args, kwargs), "PrivateUse1")
    _device_constructors()  # remembers what `with torch.device(...)` applies to: the original among that
    made = torch.tensor

    def tensor(*args, device=None, **kwargs):  # the original does not ask the device
        found = made(*args, **kwargs)
        return found if device is None else found.to(device)

    torch.tensor = tensor


LIBRARY = torch.library.Library("_", "IMPL")  # for operations without an operand that says where it is
