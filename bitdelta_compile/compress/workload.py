"""A runnable tuned model for whatever the caller named: the module itself, or one built from a checkpoint folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, match_names
from ..errors import CalibrationError, UnsupportedError
from ..progress import Progress
from . import calibrate
from .encode import Settings

log = logging.getLogger(__name__)

# Enough to see every use once: two sequences of eight tokens.
_GLANCE_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What `encode` runs.

    Attributes:
        forward: runs the tuned model; None when there is nothing to run.
        handles: the tensors it uses, by the checkpoint's names.
    """

    forward: Callable[[], None] | None
    handles: Mapping[str, Tensor]


def _architecture(checkpoint: Checkpoint) -> tuple[type[nn.Module], Any] | None:
    """The transformers class and config of a folder, None (and a warning) where it names none that transformers has."""
    import transformers

    raw = checkpoint.side_files.get("config.json")
    names = raw.get("architectures") if isinstance(raw, Mapping) else None
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        log.warning(
            "%s names no architecture that transformers has (%s): its matrices count as [out, in] linear weights, "
            "and scales come from the weights alone; give loaded models and calibration batches for more",
            checkpoint.source,
            name,
        )
        return None
    return found, transformers.AutoConfig.from_pretrained(checkpoint.source)


def _handles(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by the checkpoint's names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = match_names([*checkpoint.names(), *checkpoint.tied], parameters)
    found: dict[str, Tensor] = {}
    for name, theirs in names.items():
        found.setdefault(checkpoint.tied.get(name, name), parameters[theirs])
    return found


def _tokenizer(source: str) -> Callable[[], Any]:
    def load() -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(source)
        except Exception as error:  # transformers raises many kinds, by what is missing
            raise CalibrationError(
                f"calibration texts need a tokenizer and {source or 'the model'} has none that loads: "
                "give batches of token ids instead"
            ) from error

    return load


def _on_meta(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def _glance(model: nn.Module, progress: Progress | None) -> Callable[[], None]:
    """A run on a few tokens: it shows uses and nothing else."""
    return calibrate.runner(
        model, calibrate.random_tokens(model, _GLANCE_TOKENS, 0, calibrate.device_of(model)), progress
    )


def prepare(
    source: nn.Module | str | Path,
    checkpoint: Checkpoint,
    calibration: Iterable[Any] | None,
    settings: Settings,
    *,
    tokens: int,
    seed: int,
    progress: Progress | None,
) -> Workload:
    """The run that shows `encode` how `source` uses its parameters and, for `closed_form`, what inputs they meet.

    Raises:
        CalibrationError: calibration is empty, or the model does not run on it.
        UnsupportedError: calibration is given for a folder whose architecture transformers does not have.
    """
    if isinstance(source, nn.Module):
        model = source
        name = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    else:
        built = _architecture(checkpoint)
        if built is None:
            if calibration is not None:
                raise UnsupportedError(
                    f"{checkpoint.source}: calibration needs a model that runs, and transformers has no such "
                    "architecture: give loaded models instead of folders"
                )
            return Workload(None, {})
        model_class, config = built
        if settings.method == "mean_abs":
            shape = _on_meta(model_class, config)
            return Workload(_glance(shape, progress), _handles(checkpoint, shape))
        model = model_class.from_pretrained(checkpoint.source, dtype="auto")  # type: ignore[attr-defined]
        name = checkpoint.source
    handles = _handles(checkpoint, model)
    if calibration is None and calibrate.vocabulary(model) is None:
        log.warning(
            "%s has no config with a vocabulary and no calibration is given: its matrices count as [out, in] linear "
            "weights, and row scales are the mean of |d| over each row",
            checkpoint.source,
        )
        return Workload(None, handles)
    if settings.method == "mean_abs" and calibration is None:
        return Workload(_glance(model, progress), handles)
    batches = calibrate.make_batches(model, calibration, _tokenizer(name), tokens=tokens, seed=seed)
    return Workload(calibrate.runner(model, batches, progress), handles)
