"""`generate` with tenants, end to end: tokens checked against the dense models alone, then tokens per second."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.lowering.torch_internals import compiled_so_far
from torch import Tensor

import bitdelta_compile as bdc
from bitdelta_compile import fidelity
from bitdelta_compile.delta import Delta

from . import finetune
from .plots import bars
from .registry import Record, Run, case, require
from .timing import side_by_side

TIE = 1e-3  # logits nearer than that are a tie, which rounding decides
Prompts = dict[str | None, list[Tensor]]


def plot(records: list[Record], path: Path) -> None:
    ways = ("attached", "separate", "separate_eager")
    labels = ("attached, one batch", "dense, compiled", "dense, eager")
    series = {label: [r[f"{way}_tokens_s"] for r in records] for way, label in zip(ways, labels, strict=True)}
    groups = [f"{r['rows']} rows,\n{r['tenants']} models" for r in records]
    bars(groups, series, "tokens / s (log)", f"{records[0]['model']}, fp32, greedy", path, log=True)


@case(
    "generate",
    "SmolLM2-135M: greedy generate of a fine-tune and the base in one batch, beside a dense model for each",
    columns=(
        "model", "rows", "tenants", "new_tokens", "equal_rows", "compile_s", "attached_tokens_s", "separate_tokens_s",
        "separate_eager_tokens_s", "speedup",
    ),
    plot=plot,
)  # fmt: skip
def measure(run: Run) -> list[Record]:
    """Every token must be what the row's dense model gives alone, without padding; a tie may fall either way."""
    torch._dynamo.reset()
    count, new = (1, 6) if run.quick else (4, 32)
    base, deltas, prompts = _small() if run.quick else _smollm2(run)
    dense: dict[str | None, Any] = {None: copy.deepcopy(base)}
    dense |= {name: _merged(base, delta) for name, delta in deltas.items()}
    longest = max(prompt.numel() for some in prompts.values() for prompt in some[:count])
    names = list(dense)
    rows = [(name, at) for at in range(count) for name in names]
    tenants = [name for name, _ in rows]
    inputs = padded([prompts[name][at] for name, at in rows], longest)
    parts = {name: padded(prompts[name][:count], longest) for name in names}

    model: Any = bdc.attach(base, deltas, slots=4)
    start, before = time.perf_counter(), compiled_so_far()
    found = model.generate(**inputs, tenants=tenants, max_new_tokens=new, do_sample=False)
    compile_seconds, graphs = time.perf_counter() - start, (compiled_so_far() - before).graphs
    print(f"  attached: first call {compile_seconds:.1f} s, {graphs} graphs", flush=True)
    equal = 0
    for row, (name, at) in enumerate(rows):
        prompt, tokens = prompts[name][at], found[row, longest:].tolist()
        equal += same_up_to_ties(dense[name], prompt, tokens, _alone(dense[name], prompt, new))
    print(f"  {equal} of {len(rows)} rows equal, no other than by ties", flush=True)

    # Of one length, ends ignored: what is timed is as many tokens for every row and way.
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    compiled = {name: _compiled(each) for name, each in dense.items()}
    ways: dict[str, Callable[[], object]] = {
        "attached": functools.partial(model.generate, **inputs, tenants=tenants, **fixed),
        "separate": functools.partial(_each, compiled, parts, fixed),
        "separate_eager": functools.partial(_each, dense, parts, fixed),
    }
    for name, way in ways.items():
        start = time.perf_counter()
        way()
        print(f"  {name}: warm-up {time.perf_counter() - start:.1f} s", flush=True)
    seconds = side_by_side(ways, repeats=2 if run.quick else 3, warmup=0)
    speeds = {f"{way}_tokens_s": len(rows) * new / value for way, value in seconds.items()}
    return [
        {
            "model": "random llama" if run.quick else "SmolLM2-135M",
            "rows": len(rows),
            "tenants": len(names),
            "new_tokens": new,
            "equal_rows": equal,
            "compile_s": compile_seconds,
            "graphs": graphs,
            **speeds,
            "speedup": speeds["attached_tokens_s"] / speeds["separate_tokens_s"],
        }
    ]


def same_up_to_ties(dense: Any, prompt: Tensor, found: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether a row's tokens are exactly the dense model's; what follows the end of `expected` is padding.

    Raises:
        WrongResultError: they differ first where the dense model's logits of both tokens are no tie.
    """
    pairs = zip(found, expected, strict=False)
    first = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if first is None:
        require(len(found) >= len(expected), f"{len(found)} tokens were generated instead of {len(expected)}")
        return True
    context = torch.cat([prompt, torch.tensor(list(expected[:first]), dtype=prompt.dtype)])
    with torch.no_grad():
        logits = dense(input_ids=context.unsqueeze(0)).logits[0, -1]
    gap = float(logits[expected[first]] - logits[found[first]])
    require(abs(gap) < TIE, f"token {first} is {found[first]} instead of {expected[first]}, {gap:.2g} below it")
    return False


def padded(prompts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """Token ids and mask [rows, length], padded on the left with id 0."""
    ids = torch.stack([torch.nn.functional.pad(prompt, (length - prompt.numel(), 0)) for prompt in prompts])
    lengths = torch.tensor([prompt.numel() for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) >= length - lengths[:, None]).long()}


def _alone(dense: Any, prompt: Tensor, new: int) -> list[int]:
    found = dense.generate(
        input_ids=prompt.unsqueeze(0), attention_mask=torch.ones(1, prompt.numel(), dtype=torch.long),
        max_new_tokens=new, do_sample=False,
    )  # fmt: skip
    tokens: list[int] = found[0, prompt.numel() :].tolist()
    return tokens


def _each(models: dict[str | None, Any], parts: dict[str | None, dict[str, Tensor]], options: dict[str, Any]) -> None:
    for name, part in parts.items():
        models[name].generate(**part, **options)


def _compiled(dense: Any) -> Any:
    """The model, weights shared, with a compiled forward; torch.compile shares the code among models of one shape."""
    model = copy.copy(dense)
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


def _merged(base: Any, delta: Delta) -> Any:
    """The fine-tune as a model of its own, fp32, with its own generation config."""
    import transformers

    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, value in delta.materialize(base, dtype=torch.float32):
            model.get_parameter(name).copy_(value)
    stored = delta.side_files.get("generation_config.json")
    if isinstance(stored, dict):
        model.generation_config = transformers.GenerationConfig.from_dict(stored)
    return model


def _small() -> tuple[Any, dict[str, Delta], Prompts]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base: Any = transformers.LlamaForCausalLM(config).eval()
    deltas = {}
    for name in ("a", "b"):
        tuned = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        deltas[name] = bdc.compress(base, tuned, method="mean_abs")
    prompts = {name: [torch.randint(3, 96, (length,)) for length in (5, 7)] for name in ("a", None, "b")}
    return base, deltas, prompts


def _smollm2(run: Run) -> tuple[Any, dict[str, Delta], Prompts]:
    """The base, the delta of its fine-tune, and prompts: the first words of texts that no training has seen."""
    import transformers

    pairs = finetune.pairs(run.cache, ["jargon"])
    folder = next(iter(pairs.values())).base
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    deltas = {
        name: _delta(pair, run.cache / "smollm2" / f"{name}.bitdelta.safetensors") for name, pair in pairs.items()
    }

    def first_words(domain: finetune.Domain) -> list[Tensor]:
        texts = finetune.texts(run.cache, domain, "evaluation")[:4]
        return [tokenizer(" ".join(text.split()[:10]), return_tensors="pt")["input_ids"][0] for text in texts]

    prompts: Prompts = {name: first_words(pair.domain) for name, pair in pairs.items()}
    return fidelity.load_model(folder)[0], deltas, {**prompts, None: first_words("fortunes")}


def _delta(pair: finetune.Pair, file: Path) -> Delta:
    """The fine-tune's delta, from `file` if that is newer than the fine-tune."""
    if not file.is_file() or file.stat().st_mtime < (pair.tuned / "recipe.json").stat().st_mtime:
        print(f"  compressing {pair.tuned.name}", flush=True)
        bdc.compress(pair.base, pair.tuned).save(file)
    return Delta.load(file)
