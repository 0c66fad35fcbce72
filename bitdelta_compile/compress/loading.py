"""A model that runs on the checkpoint's mapped tensors: its weights stay in the file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checkpoint import Checkpoint, match_names


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, from which layers make their weights, gives tensors without memory; buffers have real values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def mapped_model(model_class: Any, config: Any, checkpoint: Checkpoint) -> nn.Module | None:
    """The model with the checkpoint's own tensors as parameters; None where a parameter or buffer has no counterpart
    there by name and shape (checkpoints that transformers converts while loading)."""
    with _EmptyOnMeta():
        model: nn.Module = model_class(config)
    model.tie_weights()  # type: ignore[operator]
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    names = match_names([*checkpoint.names(), *checkpoint.tied], state)
    tensors = {theirs: checkpoint.tensor(name) for name, theirs in names.items()}
    _assign(model, tensors)
    model.tie_weights()  # type: ignore[operator]
    left = [*model.parameters(), *model.buffers()]
    wrong = any(tensor.shape != state[name].shape for name, tensor in tensors.items())
    missing = {id(p) for p in model.parameters()} - {id(p) for p in _assigned(model, tensors)}
    return None if wrong or missing or any(tensor.is_meta for tensor in left) else model.eval()


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        elif leaf in module._buffers:
            module._buffers[leaf] = tensor


def _assigned(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[nn.Parameter]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [parameters[name] for name in tensors if name in parameters]
