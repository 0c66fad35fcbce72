"""How faithful a compressed fine-tune is: what share of the way from the base to the tuned model it recovers.

Encoders: cosine of mean-pooled last hidden states to the tuned model's. Language models: KL(tuned || x) per token. Both
are means over an evaluation set that the compression has not seen; `recovered` is the ratio of those means. Beside them
stands what users of either kind look at: the order in which an encoder ranks pairs of texts, a language model's
perplexity.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from .checkpoint import open_checkpoint
from .errors import CalibrationError, CheckpointError, UnsupportedError
from .figures import (
    Batch,
    EncoderOutputs,
    TokenFigures,
    encoder_outputs,
    layer_states,
    lost_by_layer,
    mean_cosine,
    rank_correlation,
    share_of_gap,
    token_figures,
)
from .progress import Progress

if TYPE_CHECKING:
    from .delta import Delta

__all__ = [
    "Batch",
    "Beside",
    "EncoderOutputs",
    "Fidelity",
    "Kind",
    "TokenFigures",
    "encoder_outputs",
    "evaluation_batches",
    "held_out_texts",
    "layer_states",
    "load_model",
    "lost_by_layer",
    "mean_cosine",
    "padded",
    "random_batches",
    "rank_correlation",
    "read_texts",
    "share_of_gap",
    "token_batches",
    "token_figures",
    "verify",
]

log = logging.getLogger(__name__)

Kind = Literal["encoder", "language model"]

_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"}
_NO_GAP = {"encoder": 1e-6, "language model": 1e-9}  # below this the base already equals the tuned model, in fp32


@dataclasses.dataclass(frozen=True)
class Beside:
    """A second figure of one evaluation.

    Attributes:
        name: "rank correlation" (encoders: Spearman's, of the cosines of all pairs of texts with the tuned model's) or
            "perplexity" (language models, of the texts themselves).
        tuned, base, compressed: the figure of each model.
    """

    name: Literal["rank correlation", "perplexity"]
    tuned: float
    base: float
    compressed: float


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Result of one evaluation.

    Attributes:
        kind: what the two figures are. "encoder": mean cosine to the tuned model; "language model": KL(tuned || x) in
            nats per token.
        base: the figure of the base model, before any delta.
        compressed: the figure of base plus delta.
        count: texts (encoder) or tokens (language model) that went into the means.
        data: what was evaluated on, in words.
        beside: a second figure; None where it was not taken.
        layers: squared distance of base + delta to the tuned model after every layer, the embedding first, as a share
            of the base's distance there; empty where it was not taken, or the model does not show its hidden states.
    """

    kind: Kind
    base: float
    compressed: float
    count: int
    data: str
    beside: Beside | None = None
    layers: tuple[float, ...] = ()

    @property
    def recovered(self) -> float | None:
        """Share of the base-to-tuned gap: 1 is the tuned model, 0 the base; None where base and tuned do not differ."""
        gap = 1 - self.base if self.kind == "encoder" else self.base
        left = 1 - self.compressed if self.kind == "encoder" else self.compressed
        return None if gap < _NO_GAP[self.kind] else 1 - left / gap


def held_out_texts(count: int = 128) -> list[str]:
    """English paragraphs of the Python manual, from the standard library, spread evenly over it; always the same."""
    from pydoc_data.topics import topics

    paragraphs = (" ".join(part.split()) for topic in sorted(topics) for part in topics[topic].split("\n\n"))
    prose = list(dict.fromkeys(text for text in paragraphs if text.endswith(".") and 12 <= len(text.split()) <= 120))
    return prose[:: max(1, len(prose) // count)][:count]


def read_texts(path: Path) -> list[str]:
    """The paragraphs of a text file (set apart by blank lines), each as one line.

    Raises:
        CalibrationError: not readable as UTF-8 text, or nothing but white space.
    """
    try:
        parts = path.read_text(encoding="utf-8").split("\n\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}") from None
    texts = [" ".join(part.split()) for part in parts if part.strip()]
    if not texts:
        raise CalibrationError(f"{path} holds no text: give a file with paragraphs set apart by blank lines")
    return texts


def token_batches(tokenizer: Any, texts: Sequence[str], *, max_length: int = 128, batch_size: int = 16) -> list[Batch]:
    """Tokenized texts as padded batches, similar lengths together. Padding has id 0: every vocabulary has one."""
    ids = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    ids = sorted((row for row in ids if row), key=len)
    if not ids:
        raise CalibrationError("the texts give no tokens: they are empty, or foreign to the tokenizer")
    return [padded(ids[at : at + batch_size]) for at in range(0, len(ids), batch_size)]


def random_batches(vocabulary: int, *, count: int = 32, length: int = 32, seed: int = 0) -> list[Batch]:
    """Random tokens, for models without a tokenizer."""
    drawn = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in drawn.split(16)]


def padded(rows: Sequence[Sequence[int]]) -> Batch:
    """Token ids as one batch, padded with 0 on the right."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def load_model(folder: str | Path) -> tuple[nn.Module, Kind]:
    """A checkpoint as transformers loads it, in fp32 and in eval mode, and what kind of model it is.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = (config.architectures or [""])[0]
        auto: Any = transformers.AutoModel
        kind: Kind = "encoder"
        if architecture.endswith(("ForCausalLM", "LMHeadModel")):
            auto, kind = transformers.AutoModelForCausalLM, "language model"
        elif architecture.endswith("ForConditionalGeneration") and config.is_encoder_decoder:
            auto, kind = transformers.AutoModelForSeq2SeqLM, "language model"
        model = auto.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} is not a checkpoint that transformers loads: {reason}") from error
    return model.eval(), kind


def evaluation_batches(model: nn.Module, folder: str | Path, texts: Sequence[str] | None) -> tuple[list[Batch], str]:
    """Batches for a model, and what they are: the given texts, else held-out ones, else (no tokenizer) random tokens.

    Raises:
        CalibrationError: texts are given and the checkpoint has no tokenizer.
    """
    import transformers

    config: Any = model.config
    longest = min(128, getattr(config, "max_position_embeddings", None) or 128)
    # Asked for a tokenizer that is not there, transformers makes an empty one without a word.
    if not _TOKENIZER_FILES & open_checkpoint(folder).side_files.keys():
        if texts is not None:
            raise CalibrationError(f"{folder} has no tokenizer, so texts cannot be used on it")
        log.warning("%s has no tokenizer: evaluating on random tokens", folder)
        words = getattr(config, "vocab_size", None)
        if not isinstance(words, int):
            raise CalibrationError(
                f"{folder} has neither a tokenizer nor a vocabulary: only models that read tokens are compared"
            )
        return random_batches(words, length=min(32, longest)), "random tokens"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = token_batches(tokenizer, held_out_texts() if texts is None else texts, max_length=longest)
    return batches, "paragraphs of the Python manual" if texts is None else f"{len(texts)} given texts"


def verify(
    delta: Delta,
    base: nn.Module | str | Path,
    tuned: str | Path,
    texts: Sequence[str] | None = None,
    *,
    progress: Progress | None = None,
) -> Fidelity:
    """Compare a delta with the tuned model it stands for: both models and base + delta, in fp32, on the same texts.

    Args:
        delta: the compressed fine-tune.  base, tuned: checkpoint folders or hub ids; a base that is quantized is given
            as a model, and runs as it is.
        texts: to evaluate on; None takes held-out paragraphs, or random tokens where there is no tokenizer.
        progress: called with (stage, done, total).

    Raises:
        BaseMismatchError: the delta belongs to another base.
        CheckpointError, CalibrationError: a model or its tokenizer cannot be loaded.
    """
    report = progress or (lambda stage, done, total: None)
    with tempfile.TemporaryDirectory() as scratch:
        report("Restoring base + delta", 0, 3)
        restored = Path(scratch) / "restored"
        delta.save_pretrained(base, restored, dtype=torch.float32)
        report("Comparing with the tuned model", 1, 3)
        expected, kind = load_model(tuned)
        batches, data = evaluation_batches(expected, tuned, texts)
        reference = encoder_outputs(expected, batches) if kind == "encoder" else None
        found: list[tuple[float, float, float]] = []  # the figure, and the second one of the tuned model and of this
        states = [layer_states(expected, batches[-1])]
        count = 0
        for step, folder in enumerate((base, restored), start=2):
            model, found_kind = (folder, kind) if isinstance(folder, nn.Module) else load_model(folder)
            if found_kind != kind:
                raise UnsupportedError(f"{tuned} is an {kind} but {folder} is not: compare models of one kind")
            if reference is not None:
                outputs = encoder_outputs(model, batches)
                count = len(outputs.pooled)
                found.append((mean_cosine(reference, outputs), 1.0, rank_correlation(reference, outputs)))
            else:
                figures = token_figures(expected, model, batches)
                count = figures.tokens
                found.append((figures.kl, figures.perplexity_tuned, figures.perplexity))
            states.append(layer_states(model, batches[-1]))
            report("Comparing with the tuned model", step, 3)
    before, after = found
    beside = Beside("perplexity" if reference is None else "rank correlation", after[1], before[2], after[2])
    return Fidelity(kind, before[0], after[0], count, data, beside, lost_by_layer(*states))
