"""What two models make of an evaluation set, in figures: cosines, ranks, KL, perplexity, distances layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError

Batch = Mapping[str, Tensor]  # forward's keyword arguments, `attention_mask` [B, S] among them


@dataclasses.dataclass(frozen=True)
class EncoderOutputs:
    """What an encoder makes of an evaluation set.

    Attributes:
        tokens: last hidden states of all tokens that are not padding, fp32 [tokens, H].
        pooled: their mean per text, fp32 [texts, H].
    """

    tokens: Tensor
    pooled: Tensor


@dataclasses.dataclass(frozen=True)
class TokenFigures:
    """Two language models on an evaluation set.

    Attributes:
        kl: KL(tuned || other) in nats per token, on the vocabulary both have.
        perplexity_tuned, perplexity: of the text, by either model; 1 where no token has one before it.
        tokens: that are not padding.
    """

    kl: float
    perplexity_tuned: float
    perplexity: float
    tokens: int


@torch.no_grad()
def encoder_outputs(model: Callable[..., Any], batches: Iterable[Batch]) -> EncoderOutputs:
    """Run an encoder (a module, compiled or not) over an evaluation set."""
    tokens, pooled = [], []
    for batch in batches:
        hidden = _outputs(model, batch).last_hidden_state.float().cpu()  # [B, S, H]
        mask = batch["attention_mask"].bool()
        tokens.append(hidden[mask])
        weights = mask.unsqueeze(-1).float()
        pooled.append((hidden * weights).sum(1) / weights.sum(1))
    return EncoderOutputs(torch.cat(tokens), torch.cat(pooled))


def mean_cosine(tuned: EncoderOutputs, other: EncoderOutputs) -> float:
    """Mean over texts of the cosine between two models' pooled outputs."""
    return float(nn.functional.cosine_similarity(tuned.pooled.double(), other.pooled.double(), dim=-1).mean())


def share_of_gap(found: EncoderOutputs, expected: EncoderOutputs, base: EncoderOutputs, tuned: EncoderOutputs) -> float:
    """Distance of `found` to `expected` (all tokens, Frobenius norm) as a share of the base-to-tuned distance."""
    return float((found.tokens - expected.tokens).norm() / (tuned.tokens - base.tokens).norm())


def rank_correlation(tuned: EncoderOutputs, other: EncoderOutputs) -> float:
    """Spearman's correlation of two models' cosines between all pairs of texts; 1 where there are too few to rank."""
    ranks = []
    for outputs in (tuned, other):
        unit = nn.functional.normalize(outputs.pooled.double(), dim=-1)
        pairs = torch.ones(len(unit), len(unit), dtype=torch.bool).triu(1)
        ranks.append((unit @ unit.T)[pairs].argsort().argsort().double())
    if len(ranks[0]) < 2:
        return 1.0
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@torch.no_grad()
def token_figures(tuned: Callable[..., Any], other: Callable[..., Any], batches: Iterable[Batch]) -> TokenFigures:
    """Run two language models over an evaluation set."""
    kl, count, predicted = 0.0, 0, 0
    lost = [0.0, 0.0]  # nats of the text itself
    for batch in batches:
        mask = batch["attention_mask"].bool()
        ids, follows = batch["input_ids"], mask[:, 1:] & mask[:, :-1]
        log_p, log_q = (_outputs(model, batch).logits.float().log_softmax(-1).cpu() for model in (tuned, other))
        for side, found in enumerate((log_p, log_q)):
            chosen = found[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            lost[side] -= float(chosen[follows].sum(dtype=torch.float64))
        shared = min(log_p.shape[-1], log_q.shape[-1])
        log_p, log_q = (
            found[mask] if found.shape[-1] == shared else found[mask][:, :shared].log_softmax(-1)
            for found in (log_p, log_q)
        )
        kl += float(nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += int(mask.sum())
        predicted += int(follows.sum())
    ours, theirs = (math.exp(each / max(1, predicted)) for each in lost)
    return TokenFigures(kl / count, ours, theirs, count)


@torch.no_grad()
def layer_states(model: Callable[..., Any], batch: Batch) -> list[Tensor]:
    """Hidden states after every layer, the embedding first, [tokens, H] each; none where a model does not show them."""
    found = getattr(_outputs(model, batch, output_hidden_states=True), "hidden_states", None) or ()
    return [states.cpu()[batch["attention_mask"].bool()].float() for states in found]


def lost_by_layer(tuned: Sequence[Tensor], base: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, ...]:
    """Squared distance of `other` to `tuned` as a share of that of `base`, by layer; 0 where those do not differ."""
    found = []
    for expected, before, after in zip(tuned, base, other, strict=True):
        gap = float((before - expected).square().sum(dtype=torch.float64))
        found.append(float((after - expected).square().sum(dtype=torch.float64)) / gap if gap > 0 else 0.0)
    return tuple(found)


def _outputs(model: Any, batch: Batch, **options: Any) -> Any:
    """The model on a batch, where the model is; a decoder reads the same tokens as its encoder."""
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    largest = int(batch["input_ids"].max())
    if vocabulary is not None and largest >= vocabulary:
        raise UnsupportedError(
            f"the text has token {largest}, past the {vocabulary} of {type(model).__name__}: "
            "leave out texts with tokens that the fine-tune has added"
        )
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    inputs = {name: value if first is None else value.to(first.device) for name, value in batch.items()}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return model(**inputs, **options)
