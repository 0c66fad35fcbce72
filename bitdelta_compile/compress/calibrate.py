"""What the tuned model runs on while its layers are watched: random tokens, texts, or batches the caller gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..progress import Progress

Batch = dict[str, Any]
# Lengths of random sequences, each with an equal share of the tokens. Attention over many random tokens is nearly an
# average, unlike any text: short sequences give the later layers inputs with more variety.
RANDOM_LENGTHS = (8, 16, 32, 64, 128)
TEXT_TOKENS = 512
# Positions kept free of random tokens: some tables (RoBERTa's) reserve their first entries.
RESERVED_POSITIONS = 2


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        return None
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocabulary(model: nn.Module) -> int | None:
    """`vocab_size` of the model's config, None where it has none: a model that does not read tokens."""
    size = getattr(_text_config(model), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _sequence_length(model: nn.Module, wanted: int) -> int:
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if isinstance(limit, int) and limit > RESERVED_POSITIONS:
        wanted = min(wanted, limit - RESERVED_POSITIONS)
    return max(1, wanted)


def _with_decoder(model: nn.Module, batch: Batch) -> Batch:
    """Encoder-decoder models also read the tokens on the decoder's side."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def random_tokens(model: nn.Module, tokens: int, seed: int, device: torch.device) -> list[Batch]:
    """One batch of uniformly random ids per length, in all at least `tokens`; the same for a seed on every device.

    Raises:
        CalibrationError: the model's config names no vocabulary.
    """
    size = vocabulary(model)
    if size is None:
        raise CalibrationError(
            f"{type(model).__name__} has no config with a vocab_size to draw tokens from: give calibration batches"
        )
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    for wanted in RANDOM_LENGTHS:
        length = _sequence_length(model, min(wanted, tokens))
        sequences = -(-tokens // (length * len(RANDOM_LENGTHS)))
        ids = torch.randint(size, (sequences, length), generator=generator).to(device)
        batches.append(_with_decoder(model, {"input_ids": ids}))
    return batches


def text_batches(
    model: nn.Module, texts: Iterable[str], tokenizer: Any, tokens: int, device: torch.device
) -> list[Batch]:
    """Texts tokenized one by one, cut to the model's positions, until `tokens` tokens are reached.

    Raises:
        CalibrationError: no text holds a token.
    """
    longest = _sequence_length(model, TEXT_TOKENS)
    batches: list[Batch] = []
    left = tokens
    for text in texts:
        if left <= 0:
            break
        if not text.strip():
            continue
        ids = tokenizer(text, truncation=True, max_length=min(longest, max(left, 8)), return_tensors="pt")["input_ids"]
        if ids.numel():
            left -= ids.numel()
            batches.append(_with_decoder(model, {"input_ids": ids.to(device)}))
    if not batches:
        raise CalibrationError("the calibration texts hold no token: give non-empty texts, or None for random tokens")
    return batches


def given_batches(calibration: Iterable[Any], device: torch.device) -> list[Batch]:
    """The caller's forward kwargs, tensors moved to the model's device.

    Raises:
        CalibrationError: there is none, or one is no mapping.
    """
    batches: list[Batch] = []
    for place, batch in enumerate(calibration):
        if not isinstance(batch, Mapping):
            raise CalibrationError(
                f"calibration item {place} is a {type(batch).__name__}: give texts, or mappings of forward arguments"
            )
        batches.append({key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    if not batches:
        raise CalibrationError("calibration is empty: give at least one text or batch, or None for random tokens")
    return batches


def check_amount(tokens: int, seed: int) -> None:
    """CalibrationError for a count of tokens, or a seed, that is none."""
    if not isinstance(tokens, int) or tokens < 1:
        raise CalibrationError(f"tokens must be an integer of at least 1, got {tokens!r}")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise CalibrationError(f"seed must be an integer of at most 64 bits, got {seed!r}")


def make_batches(
    model: nn.Module,
    calibration: Iterable[str] | Iterable[Mapping[str, Any]] | str | None,
    tokenizer: Callable[[], Any],
    *,
    tokens: int,
    seed: int,
) -> list[Batch]:
    """Batches for `model` from whatever the caller gave; `tokenizer` is called only for texts."""
    device = device_of(model)
    check_amount(tokens, seed)
    if calibration is None:
        return random_tokens(model, tokens, seed, device)
    items: list[Any] = [calibration] if isinstance(calibration, str) else list(calibration)
    texts = [item for item in items if isinstance(item, str)]
    if texts and len(texts) == len(items):
        return text_batches(model, texts, tokenizer(), tokens, device)
    return given_batches(items, device)


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients; every module's training flag is as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def runner(model: nn.Module, batches: list[Batch], progress: Progress | None = None) -> Callable[[], None]:
    """A function that runs the model over the batches.

    Raises (the function):
        CalibrationError: the model does not accept a batch.
    """

    def run() -> None:
        with evaluation(model):
            for done, batch in enumerate(batches):
                if progress is not None:
                    progress("calibrate", done, len(batches))
                try:
                    model(**batch)
                except CalibrationError:
                    raise
                except Exception as error:  # whatever the model's own code raises for inputs it cannot take
                    raise CalibrationError(
                        f"{type(model).__name__} does not run on calibration batch {done} ({', '.join(batch)}): "
                        f"{error}; give batches of its own forward arguments"
                    ) from error
        if progress is not None:
            progress("calibrate", len(batches), len(batches))

    return run
