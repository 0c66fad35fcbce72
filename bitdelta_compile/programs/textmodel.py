"""transformers checkpoints as packages, and packages run on texts: what `bitdelta export` and `bitdelta run` do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta
from ..errors import UnsupportedError
from ..fidelity import load_model
from ..progress import Progress
from .export import export
from .package import package
from .packaged import Package
from .program import with_extra

_KIND = "kind"
_TOKENS = "max_tokens"
_TOP = 5  # most likely next tokens shown
_SHOWN = 8  # components of an embedding shown


def export_checkpoint(
    base: str | Path,
    deltas: Mapping[str, Delta],
    path: Path,
    *,
    max_batch: int = 64,
    max_tokens: int = 512,
    slots: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Package a transformers checkpoint with its tenants, for any batch and any number of tokens up to a limit.

    Args:
        base: checkpoint folder or hub id; the package refers to it for the tokenizer.
        deltas: by tenant name.
        path: of the package; ends in `.pt2`.
        max_batch, max_tokens: limits; the model's own number of positions is one too.
        slots: how many tenants there is room for; default: as many as there are.

    Raises:
        CheckpointError: transformers cannot load the base.  BaseMismatchError: a delta of another base.
        UnsupportedError: as `export`; a model that takes more than token ids and a mask.
    """
    steps = ("Loading", "Exporting", "Compiling")

    def report(done: int) -> None:
        if progress is not None:
            progress(steps[min(done, len(steps) - 1)], done, len(steps))

    report(0)
    model, kind = load_model(base)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{base} has an encoder and a decoder, and a package takes token ids once: use bdc.export and bdc.package"
        )
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise UnsupportedError(f"{base} reads no tokens, and a package takes token ids: use bdc.export and bdc.package")
    tokens = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    rows, columns = torch.export.Dim("batch", min=1, max=max_batch), torch.export.Dim("tokens", min=1, max=tokens)
    ids = torch.arange(2 * 3).reshape(2, 3) % config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = {name: {0: rows, 1: columns} for name in inputs}
    config.use_cache = False
    forward = model.forward

    def first_output(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits, or last hidden states. transformers' own output classes would have to be known where it runs."""
        output: Tensor = forward(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return output

    model.forward = first_output  # on the instance: a module around it would rename the parameters
    report(1)
    with torch.no_grad():
        program = export(model, (), inputs, delta=deltas, dynamic_shapes=shapes, slots=slots)
    report(2)
    package(with_extra(program, {_KIND: kind, _TOKENS: str(tokens)}, base=str(base)), path)
    report(3)


def read_ids(text: str) -> list[int]:
    """Token ids written as "101,2023,102".

    Raises:
        UnsupportedError: anything else.
    """
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isdecimal() for part in parts):
        raise UnsupportedError(f"{text!r} is not a list of token ids such as 101,2023,102")
    return [int(part) for part in parts]


def tokenizer_of(model: Package, base: str | Path | None) -> Any:
    """The tokenizer of a package's base.

    Raises:
        UnsupportedError: it cannot be loaded.
    """
    import transformers

    source = base or model.metadata["bitdelta.base"]
    try:
        return transformers.AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds, by what is missing
        raise UnsupportedError(
            f"there is no tokenizer at {source!r}, where the package says its base is: give --base, or --ids"
        ) from error


def run_rows(
    model: Package, rows: Sequence[Sequence[int]], tenants: Sequence[str | None], tokenizer: Any = None
) -> list[dict[str, Any]]:
    """Run token ids through a package of `export_checkpoint`, each row with its tenant.

    Returns:
        For each row {"tenant", "tokens"} and, of a language model, "next": the most likely next tokens [{"id",
        "probability", "text" (with a tokenizer)}]; of an encoder "embedding": the mean of the last hidden states.

    Raises:
        UnsupportedError: an unknown tenant, empty or too long rows, or another package.
    """
    kind, limit = (model.metadata.get(f"bitdelta.extra.{name}") for name in (_KIND, _TOKENS))
    if kind is None or limit is None:
        raise UnsupportedError("the package was not made by `bitdelta export`: call it from Python with its own inputs")
    lengths = [len(row) for row in rows]
    if not lengths or not min(lengths) or max(lengths) > int(limit):
        raise UnsupportedError(f"a row has {max(lengths, default=0)} tokens: the package takes 1 to {limit}")
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).to(torch.int64)
    found: Tensor = model(input_ids=ids, attention_mask=mask, tenants=tenants)
    describe = _next_tokens if kind == "language model" else _embedding
    return [
        {"tenant": tenant, "tokens": length, **describe(values[:length].float(), tokenizer)}
        for tenant, length, values in zip(tenants, lengths, found, strict=True)
    ]


def _next_tokens(logits: Tensor, tokenizer: Any) -> dict[str, Any]:
    top = logits[-1].softmax(-1).topk(min(_TOP, logits.shape[-1]))
    return {
        "next": [
            {"id": token, "probability": probability}
            | ({} if tokenizer is None else {"text": tokenizer.decode([token])})
            for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    }


def _embedding(hidden: Tensor, tokenizer: Any) -> dict[str, Any]:
    return {"embedding": hidden.mean(0).tolist()}


def shown(row: Mapping[str, Any]) -> str:
    """One row of `run_rows` for people."""
    name = row["tenant"] or "base"
    if "next" in row:
        tokens = [
            json.dumps(each["text"], ensure_ascii=False) if "text" in each else each["id"] for each in row["next"]
        ]
        pairs = zip(tokens, row["next"], strict=True)
        return f"{name}: next " + ", ".join(f"{token} {each['probability']:.4f}" for token, each in pairs)
    values = " ".join(f"{value:.4f}" for value in row["embedding"][:_SHOWN])
    return f"{name}: embedding {values} ... ({len(row['embedding'])} components)"
