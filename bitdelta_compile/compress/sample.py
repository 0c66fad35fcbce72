"""Tokens that a language model writes itself: calibration where the caller has no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..progress import Progress
from .calibrate import accepted

LENGTH = 128  # tokens of a sequence, where the model has positions for as many


def can_write(model: nn.Module) -> bool:
    """Whether the model is a causal language model: it generates, from what it wrote alone."""
    config = getattr(model, "config", None)
    able = getattr(model, "can_generate", None)
    return bool(able is not None and able() and not getattr(config, "is_encoder_decoder", False))


@torch.no_grad()
def sample(
    model: nn.Module,
    starts: Sequence[Sequence[int]],
    tokens: int,
    *,
    longest: int,
    temperature: float = 1.0,
    seed: int = 0,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Sequences that the model writes, in all at least `tokens` tokens.

    Args:
        model: a causal language model.
        starts: token ids to start from, taken in turn, with an equal share of the sequences each; one batch each.
        longest: tokens that a sequence may have, its start included.
        temperature: of the softmax that is drawn from.
        device: of the model's inputs, by default that of its parameters.
        progress: called with ("sample", done, total), counting tokens.

    Returns:
        Ids int64 [sequences, S], one tensor for each of the starts.

    Raises:
        CalibrationError: the model gives logits that are not finite, or none.
    """
    generator = torch.Generator().manual_seed(seed)
    device = device or next(model.parameters()).device
    starts = [start for start in starts if len(start) < longest] or [starts[0][:1]]
    length = max(1, min(LENGTH, longest - max(map(len, starts)), tokens))
    height = -(-tokens // (length * len(starts)))
    caches = accepted(model) >= {"past_key_values", "use_cache"}
    found = []
    for place, start in enumerate(starts):
        ids = torch.tensor([list(start)] * height, device=device)
        written, cache = [ids], None
        for step in range(length - 1):
            if progress is not None:
                progress("sample", (place * length + step) * height, length * height * len(starts))
            if caches:
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
            else:  # it keeps its state in another way, or none: read again what there is
                output = model(input_ids=torch.cat(written, -1))
            logits = output.logits[:, -1].float().cpu()
            if not bool(torch.isfinite(logits).all()):
                raise CalibrationError("the tuned model gives NaN or infinite logits: give calibration data")
            odds = (logits / temperature).softmax(-1) if temperature > 0 else None
            drawn = logits.argmax(-1, True) if odds is None else torch.multinomial(odds, 1, generator=generator)
            ids = drawn.to(device)
            written.append(ids)
        found.append(torch.cat(written, -1))
    if progress is not None:
        progress("sample", length * height * len(starts), length * height * len(starts))
    return found


def first_tokens(model: nn.Module, tokenizer: Callable[[], Any]) -> list[list[int]]:
    """Where texts begin: after the token that begins or else ends one; with a chat template, also as users do."""
    config: Any = getattr(model, "config", None)
    begin = next((i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)), 0)
    starts = [[begin]]
    try:
        found = tokenizer()
        mark = "\u241f"
        written = found.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
        head = written.partition(mark)[0]
        ids = found(head, add_special_tokens=False)["input_ids"] if head else []
    except Exception:  # no tokenizer, no template, or one that wants more than a user: texts alone, then
        ids = []
    if ids:
        starts.append(list(ids))
    return starts
