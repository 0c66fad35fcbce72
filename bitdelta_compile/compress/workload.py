"""A runnable tuned model for whatever the caller named: the module itself, or one built from a checkpoint folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, match_names
from ..errors import CalibrationError, UnsupportedError
from ..fileformat import map_tensors, read_header, write_tensors
from ..fingerprint import Fingerprint
from ..progress import Progress
from . import calibrate
from .loading import mapped_model
from .sample import can_write, first_tokens, sample
from .settings import Method
from .streams import Run, Substitution
from .weights import TunedValues
from .workdir import SAMPLED

log = logging.getLogger(__name__)

Data = Literal["texts", "batches", "sampled", "random", "none"]

# Enough to see every use once: two sequences of eight tokens.
_GLANCE_TOKENS = 16
_SAMPLED_ROWS = 4
MANY_BATCHES = 64


@dataclasses.dataclass(frozen=True)
class Workload:
    """What `encode` runs.

    Attributes:
        runs: the tuned model on each calibration batch; none when there is nothing to run.
        handles: the tensors it uses, by the checkpoint's names.
        data: what the batches are: `texts`, `batches`, `sampled`, `random`, or `none`.
        digest: of the batches' values.
        model: the module that runs, None where there is none.
        device: where it computes; None: where its parameters are.
    """

    runs: Sequence[Run]
    handles: Mapping[str, Tensor]
    data: Data = "none"
    digest: str = ""
    model: nn.Module | None = None
    device: torch.device | None = None

    @property
    def place(self) -> torch.device:
        """Where things are computed."""
        if self.device is not None:
            return self.device
        return torch.device("cpu") if self.model is None else calibrate.device_of(self.model)

    def evaluation(self) -> contextlib.AbstractContextManager[None]:
        """To run in: no dropout, no gradients."""
        return contextlib.nullcontext() if self.model is None else calibrate.evaluation(self.model, self.device)


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
    try:
        return found, transformers.AutoConfig.from_pretrained(checkpoint.source)
    except ValueError:  # a config without a model type; most classes know their own
        if found.config_class is None:
            raise
        return found, found.config_class.from_pretrained(checkpoint.source)


def _handles(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters by the checkpoint's names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = match_names([*checkpoint.names(), *checkpoint.tied], parameters)
    found: dict[str, Tensor] = {}
    for name, theirs in names.items():
        found.setdefault(checkpoint.tied.get(name, name), parameters[theirs])
    return found


def tokenizer_of(source: str) -> Callable[[], Any]:
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


def _glance(model: nn.Module) -> list[Run]:
    """A run on a few tokens: it shows uses and nothing else."""
    batches = calibrate.random_tokens(model, _GLANCE_TOKENS, 0, calibrate.device_of(model))
    return calibrate.model_runs(model, batches[:1])


def _load(model_class: Any, config: Any, checkpoint: Checkpoint) -> nn.Module:
    """The model on its mapped file; loaded into memory where the file has other tensors than the model."""
    model = mapped_model(model_class, config, checkpoint)
    if model is None:
        log.info("%s is loaded into memory: its file has other tensors than the model", checkpoint.source)
        model = model_class.from_pretrained(checkpoint.source, dtype="auto")
    return model.eval()


def prepare(
    source: nn.Module | str | Path,
    checkpoint: Checkpoint,
    calibration: Iterable[Any] | None,
    method: Method,
    *,
    tokens: int,
    random_tokens: int,
    sampled: int,
    seed: int,
    temperature: float,
    keep: Path | None,
    progress: Progress | None,
    device: torch.device | None = None,
) -> Workload:
    """The runs that show `encode` how `source` uses its parameters and what inputs they meet.

    Args:
        tokens, random_tokens: how many, and how many where they are random.
        sampled: how many the model writes itself, beside the calibration given.
        keep: where sampled tokens are kept, so that they are drawn once.
        device: where the model is to compute; None: where its parameters are.

    Raises:
        CalibrationError: calibration is empty, or the model does not run on it.
        UnsupportedError: calibration is given for a folder whose architecture transformers does not have, or tokens are
            to be sampled from a model that writes none.
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
            return Workload([], {})
        model_class, config = built
        if method == "mean_abs":
            shape = _on_meta(model_class, config)
            readable = calibrate.vocabulary(shape) is not None
            return Workload(_glance(shape) if readable else [], _handles(checkpoint, shape), model=shape)
        model = _load(model_class, config, checkpoint)
        name = checkpoint.source
    handles = _handles(checkpoint, model)
    if calibration is None and calibrate.vocabulary(model) is None:
        log.warning(
            "%s has no config with a vocabulary and no calibration is given: its matrices count as [out, in] linear "
            "weights, and row scales are the mean of |d| over each row",
            checkpoint.source,
        )
        return Workload([], handles)
    if method == "mean_abs" and calibration is None:
        return Workload(_glance(model), handles, model=model)
    tokenizer = tokenizer_of(name)

    def written(count: int) -> list[calibrate.Batch]:
        theirs = Fingerprint.of(checkpoint).digest
        return _sampled(model, handles, theirs, tokenizer, keep, count, seed, temperature, progress, device)

    if sampled and not can_write(model):
        raise UnsupportedError(f"{type(model).__name__} writes no text: give calibration without sampled=")
    data: Data
    if calibration is not None:
        batches, data = calibrate.make_batches(model, calibration, tokenizer, tokens=tokens, device=device)
        batches += written(sampled) if sampled else []
        if len(batches) > MANY_BATCHES:
            log.warning(
                "%d calibration batches run side by side, each with threads and memory of its own: "
                "fewer and larger ones do the same",
                len(batches),
            )
    elif can_write(model):
        batches, data = written(tokens), "sampled"
    else:
        place = device or calibrate.device_of(model)
        batches, data = calibrate.random_tokens(model, random_tokens, seed, place), "random"
    return Workload(calibrate.model_runs(model, batches), handles, data, digest_of(batches), model, device)


def digest_of(batches: Iterable[Mapping[str, Any]]) -> str:
    """Of the values of batches, or of any tensors and plain values by name."""
    found = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            if isinstance(value, Tensor):
                found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{key}{value!r}".encode())
    return found.hexdigest()


def _sampled(
    model: nn.Module,
    handles: Mapping[str, Tensor],
    theirs: str,
    tokenizer: Callable[[], Any],
    keep: Path | None,
    tokens: int,
    seed: int,
    temperature: float,
    progress: Progress | None,
    device: torch.device | None,
) -> list[calibrate.Batch]:
    """Sequences that the model (`theirs`, its fingerprint) writes, in batches of one run each."""
    drawn_from = f"{theirs} {tokens} {seed} {temperature}"
    path = (
        None if keep is None else keep / f"{SAMPLED}{hashlib.sha256(drawn_from.encode()).hexdigest()[:16]}.safetensors"
    )
    if path is not None and path.exists():
        stored = map_tensors(path, read_header(path))
        drawn = [stored[key] for key in sorted(stored)]
    else:
        starts = first_tokens(model, tokenizer)
        away = Substitution(handles, lambda use: None, TunedValues(handles, device)) if device is not None else None
        with calibrate.evaluation(model, device), away or contextlib.nullcontext():
            drawn = sample(
                model, starts, tokens, longest=calibrate.sequence_length(model), temperature=temperature, seed=seed,
                device=device, progress=progress,
            )  # fmt: skip
        if path is not None:
            write_tensors(path, {str(place): ids for place, ids in enumerate(drawn)}, {})
    place = device or calibrate.device_of(model)
    return [{"input_ids": part.to(place)} for ids in drawn for part in ids.split(_SAMPLED_ROWS)]
