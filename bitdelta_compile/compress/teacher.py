"""What distillation learns from: batches, and the tuned model's outputs on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BitDeltaError, CalibrationError, UnsupportedError
from ..fidelity import padded
from ..progress import Progress
from .calibrate import Batch, device_of, evaluation, given_batches, random_tokens, sequence_length
from .sample import can_write, first_tokens, sample
from .workload import tokenizer_of

_OWN_TOKENS = 8192  # sampled or random ones


def make_samples(
    model: nn.Module,
    source: nn.Module | str | Path,
    calibration: Iterable[Any] | None,
    *,
    steps: int,
    batch: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> list[Batch]:
    """The batches of as many steps, or fewer where calibration gives no more.

    Raises:
        CalibrationError: calibration is empty, or texts come without a tokenizer.
    """
    device = device_of(model)
    if calibration is None:
        if not can_write(model):
            return random_tokens(model, min(steps * batch * length, _OWN_TOKENS), seed, device)[:steps]
        starts = first_tokens(model, tokenizer_of(_name(source)))
        with evaluation(model):
            longest = sequence_length(model, length)
            tokens = min(steps * batch * length, _OWN_TOKENS)
            drawn = sample(model, starts, tokens, longest=longest, seed=seed, progress=progress)
        return [{"input_ids": part.to(device)} for ids in drawn for part in ids.split(batch)][:steps]
    items = [calibration] if isinstance(calibration, str) else list(calibration)
    if not items or not all(isinstance(item, str) for item in items):
        return given_batches(items, device)[:steps]
    tokenizer = tokenizer_of(_name(source))()
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [items[index] for index in order if items[index].strip()]
    if can_write(model):
        ids = [number for text in texts for number in tokenizer(text)["input_ids"]]
        rows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)] or [ids]
    else:
        rows = [
            tokenizer(text, truncation=True, max_length=sequence_length(model, length))["input_ids"] for text in texts
        ]
    rows = [row for row in rows if row][: steps * batch]
    if not rows:
        raise CalibrationError("the calibration texts hold no token: give non-empty texts, or None for no data")
    found = [padded(rows[at : at + batch]) for at in range(0, len(rows), batch)]
    return [{name: value.to(device) for name, value in each.items()} for each in found]


def _name(source: nn.Module | str | Path) -> str:
    return str(
        getattr(getattr(source, "config", None), "name_or_path", "") if isinstance(source, nn.Module) else source
    )


def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Logits or hidden states, fp32 [tokens, *], of the tokens that are not padding."""
    try:
        found = model(**batch)
    except BitDeltaError:
        raise
    except Exception as error:  # whatever the model's own code raises for inputs it cannot take
        raise CalibrationError(
            f"{type(model).__name__} does not run on the calibration batch ({', '.join(batch)}): {error}; "
            "give batches of its own forward arguments"
        ) from error
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise UnsupportedError(
            f"{type(model).__name__} gives neither logits nor hidden states: nothing to distill from"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == found.shape[:-1]:
        return found[mask.bool()].float()
    return found.flatten(0, -2).float()


class Teacher:
    """The tuned model's outputs by batch, each computed once; those that will be asked for again lie in files."""

    def __init__(self, model: nn.Module, samples: Sequence[Batch], steps: int, folder: Path) -> None:
        self._model, self._samples, self._steps, self._folder = model, samples, steps, folder
        self._kept: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        index = step % len(self._samples)
        if index in self._kept:
            return self._kept[index].to(device_of(self._model))
        with evaluation(self._model):
            found = outputs(self._model, self._samples[index])
        if not bool(torch.isfinite(found).all()):
            raise CalibrationError(
                f"the tuned model gives NaN or infinite values on calibration batch {index}: "
                "run it in fp32 or bf16, or give other calibration data"
            )
        if step + len(self._samples) < self._steps:
            file = str(self._folder / str(index))
            self._kept[index] = torch.from_file(file, True, found.numel(), dtype=torch.float32).view_as(found)
            self._kept[index].copy_(found)
        return found
