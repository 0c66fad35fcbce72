"""What the tuned model runs on while its layers are watched: random tokens, texts, or batches the caller gives."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .streams import Run

Batch = dict[str, Any]
# Lengths of random sequences, each with an equal share of the tokens. Attention over many random tokens is nearly an
# average, unlike any text: short sequences give the later layers inputs with more variety.
RANDOM_LENGTHS = (8, 16, 32, 64, 128)
# Of Zipf's law: odds fall as 1 / (rank + FLATTENING) past the first RESERVED_IDS of a LARGE_VOCABULARY.
FLATTENING, RESERVED_IDS, LARGE_VOCABULARY = 20, 1000, 20000
TEXT_TOKENS = 512
TEXT_BATCHES = 16  # at most: each is a run of its own
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


def accepted(model: nn.Module) -> frozenset[str]:
    """Names of the arguments of the model's forward; none where it does not tell."""
    try:
        return frozenset(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def sequence_length(model: nn.Module, wanted: int = TEXT_TOKENS) -> int:
    """How long a sequence may be: `wanted`, or as many tokens as the model has positions for."""
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
    """One batch of random ids per length, in all at least `tokens`; the same for a seed on every device.

    Vocabularies list their entries roughly by how often they occur: ids are drawn by Zipf's law over that order, past
    the entries that large ones reserve, or have for bytes and single letters.

    Raises:
        CalibrationError: the model's config names no vocabulary.
    """
    size = vocabulary(model)
    if size is None:
        raise CalibrationError(
            f"{type(model).__name__} has no config with a vocab_size to draw tokens from: give calibration batches"
        )
    first = RESERVED_IDS if size > LARGE_VOCABULARY else 0
    odds = torch.zeros(size)
    odds[first:] = 1 / torch.arange(1 + FLATTENING, 1 + FLATTENING + size - first)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    for wanted in RANDOM_LENGTHS:
        length = sequence_length(model, min(wanted, tokens))
        sequences = -(-tokens // (length * len(RANDOM_LENGTHS)))
        drawn = torch.multinomial(odds, sequences * length, replacement=True, generator=generator)
        ids = drawn.view(sequences, length).to(device)
        batches.append(_with_decoder(model, {"input_ids": ids}))
    return batches


def text_batches(
    model: nn.Module, texts: Iterable[Any], tokenizer: Any, tokens: int, device: torch.device
) -> list[Batch]:
    """Texts and conversations as token ids, cut to the model's positions, until `tokens` tokens are reached.

    Sequences of about one length share a batch, cut to the shortest of it: without padding no model needs to heed a
    mask. Texts that occur twice count once. A conversation, a list of messages {"role", "content"}, is written out by
    the tokenizer's chat template.

    Raises:
        CalibrationError: no text holds a token, or conversations meet a tokenizer without a template.
    """
    longest = sequence_length(model)
    rows: dict[tuple[int, ...], None] = {}
    left = tokens
    for text in texts:
        if left <= 0:
            break
        row = tuple(_ids(text, tokenizer, min(longest, max(left, 8))))
        if row and row not in rows:
            rows[row] = None
            left -= len(row)
    if not rows:
        raise CalibrationError("the calibration texts hold no token: give non-empty texts, or None for no data")
    ordered = sorted(rows, key=len)
    height = -(-len(ordered) // TEXT_BATCHES)
    groups = (ordered[first : first + height] for first in range(0, len(ordered), height))
    ids = (torch.tensor([row[: len(group[0])] for row in group], device=device) for group in groups)
    return [_with_decoder(model, {"input_ids": each}) for each in ids]


def _ids(text: Any, tokenizer: Any, longest: int) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text, truncation=True, max_length=longest)["input_ids"]) if text.strip() else []
    try:
        written = tokenizer.apply_chat_template(text, tokenize=False)
    except Exception as error:  # jinja's own errors, or the tokenizer's for having no template
        raise CalibrationError(
            f"a conversation cannot be written out by the tokenizer's chat template ({error}): give texts"
        ) from error
    options = {"truncation": True, "max_length": longest, "add_special_tokens": False}
    return list(tokenizer(written, **options)["input_ids"])


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
        batches.append({key: _moved(value, device) for key, value in batch.items()})
    if not batches:
        raise CalibrationError("calibration is empty: give at least one text or batch, or None for no data")
    return batches


def _moved(value: Any, device: torch.device) -> Any:
    """A value on the device; narrow floats as fp32, in which the model is run."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype)


def check_amount(tokens: int, seed: int) -> None:
    """CalibrationError for a count of tokens, or a seed, that is none."""
    if not isinstance(tokens, int) or tokens < 1:
        raise CalibrationError(f"tokens must be an integer of at least 1, got {tokens!r}")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise CalibrationError(f"seed must be an integer of at most 64 bits, got {seed!r}")


def make_batches(
    model: nn.Module,
    calibration: Iterable[Any] | str,
    tokenizer: Callable[[], Any],
    *,
    tokens: int,
    device: torch.device | None = None,
) -> tuple[list[Batch], Literal["texts", "batches"]]:
    """Batches for `model` from what the caller gave, and what that was; `tokenizer` is called only for texts.

    Args:
        device: of the batches, by default the model's.
    """
    device = device or device_of(model)
    items: list[Any] = [calibration] if isinstance(calibration, str) else list(calibration)
    if items and all(isinstance(item, str | list) for item in items):
        return text_batches(model, items, tokenizer(), tokens, device), "texts"
    return given_batches(items, device), "batches"


@contextlib.contextmanager
def _buffers_on(model: nn.Module, device: torch.device | None) -> Iterator[None]:
    """The model's buffers on a device, and where they were afterwards; None leaves them."""
    moved = []
    try:
        for module in model.modules() if device is not None else ():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta and buffer.device != device:
                    moved.append((module, name, buffer))
                    module._buffers[name] = buffer.to(device)
        yield
    finally:
        for module, name, buffer in moved:
            module._buffers[name] = buffer


@contextlib.contextmanager
def evaluation(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """No dropout, no gradients; every module's training flag is as before afterwards.

    Args:
        device: where the buffers are meanwhile; None leaves them. Parameters stay (`streams.Values.device` is theirs).
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), _buffers_on(model, device):
            yield
    finally:
        for module, training in flags:
            module.training = training


def model_runs(model: nn.Module, batches: Sequence[Batch]) -> list[Run]:
    """The model on each batch, without a cache of keys and values; to be run under `evaluation`.

    Raises (a run):
        CalibrationError: the model does not accept a batch.
    """
    cached = "use_cache" in accepted(model)
    # On the meta device the values that a model looks at when it has no cache are missing.
    extra = {"use_cache": False} if cached and device_of(model).type != "meta" else {}

    def run(place: int, batch: Batch) -> object:
        try:
            return model(**(extra | batch))
        except CalibrationError:
            raise
        except Exception as error:  # whatever the model's own code raises for inputs it cannot take
            raise CalibrationError(
                f"{type(model).__name__} does not run on calibration batch {place} ({', '.join(batch)}): "
                f"{error}; give batches of its own forward arguments"
            ) from error

    return [Run(functools.partial(run, place, batch), _mask(batch)) for place, batch in enumerate(batches)]


def _mask(batch: Batch) -> Tensor | None:
    """Which tokens count, where the batch says so for [B, S] and some do not."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()
