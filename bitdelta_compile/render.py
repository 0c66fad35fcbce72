"""How results look: tables and sentences for the terminal, dictionaries for JSON. Prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from .delta import Delta
    from .demo import TenantResult
    from .demo.rows import Row
    from .demo.tenants import ManyTenants
    from .encodings import Encoding
    from .fidelity import Fidelity


def tuned_bytes(delta: Delta) -> int:
    """Bytes of the tuned model's own tensors, tied ones once."""

    def size(encoding: Encoding) -> int:
        return prod(encoding.shape) * encoding.dtype.itemsize

    return sum(map(size, delta.encodings.values()))


def size(count: int) -> str:
    """Bytes for people; MB are 10^6 bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count} bytes"


def options(found: Mapping[str, object]) -> str:
    """How a delta was made."""
    return ", ".join(f"{name} {value}" for name, value in sorted(found.items())) or "no options on record"


def described(delta: Delta, file: Path) -> dict[str, object]:
    """A delta file in figures; `factor` is the tuned model's tensors over the whole file."""
    tuned = tuned_bytes(delta)
    return {
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "tensor_bytes": delta.nbytes,
        "tuned_bytes": tuned,
        "factor": tuned / file.stat().st_size,
        "encodings": dict(Counter(encoding.kind for encoding in delta.encodings.values())),
        "options": dict(delta.options),
    }


def parameter(delta: Delta, name: str) -> dict[str, object]:
    """One parameter's encoding and what the fit reported on it."""
    encoding = delta.encodings[name]
    reports = delta.report.get("parameters")
    report = reports.get(name) if isinstance(reports, Mapping) else None
    return {
        "encoding": encoding.kind,
        "shape": list(encoding.shape),
        "dtype": str(encoding.dtype).removeprefix("torch."),
        "bytes": encoding.nbytes,
        **(report if isinstance(report, Mapping) else {}),
    }


def parameter_table(delta: Delta) -> Table:
    """All parameters, one per line; error is the relative output error of the fit, where it was measured."""
    table = Table(Column("parameter", overflow="fold"), "encoding", "shape", "bytes", "error", box=None)
    for name in delta.encodings:
        row = parameter(delta, name)
        error = row.get("error")
        shown = f"{error:.4f}" if isinstance(error, float) else ""
        table.add_row(escape(name), str(row["encoding"]), escape(str(row["shape"])), str(row["bytes"]), shown)
    return table


def fidelity_table(found: Fidelity) -> Table:
    """One evaluation: before, after, and the share recovered."""
    encoder = found.kind == "encoder"
    unit = "texts" if encoder else "tokens"
    beside = found.beside
    second = [] if beside is None else [beside.name]
    table = Table("", "mean cosine to the fine-tune" if encoder else "KL per token (nats)", *second, box=None)
    table.title = f"{found.data} ({found.count} {unit})"
    models = {
        "base": (found.base, beside and beside.base),
        "base + delta": (found.compressed, beside and beside.compressed),
    }
    for name, figures in models.items():
        table.add_row(name, *(f"{figure:.6f}" for figure in figures if figure is not None))
    table.add_row("recovered", share(found))
    if beside is not None and not encoder:
        table.add_row("fine-tune", "", f"{beside.tuned:.6f}")
    return table


def layer_table(found: Fidelity) -> Table:
    """What is lost after every layer."""
    table = Table("layer", "squared distance to the fine-tune, as a share of the base's", box=None)
    for place, lost in enumerate(found.layers):
        table.add_row(str(place) if place else "embedding", f"{lost:.2e}")
    return table


def demo_tables(tenants: Sequence[TenantResult]) -> list[Table]:
    """Fidelity, and size and time, of every tenant of the demo."""
    faithful = Table("fine-tune", "model", "mean cosine", "recovered", box=None)
    faithful.title = f"Likeness to the fine-tune, {tenants[0].ours.count} {tenants[0].ours.data}"
    cost = Table("fine-tune", "fp32 file", "delta file", "factor", "of bf16", "compress", "compile", "error", box=None)
    cost.title = "Size and time"
    cost.caption = "error: compiled against materialized in fp32, as a share of the base-to-tuned distance"
    for tenant in tenants:
        ours, mean_abs = tenant.ours, tenant.mean_abs
        faithful.add_row(tenant.name, "base", f"{ours.base:.6f}")
        faithful.add_row("", "mean |d| per tensor (the paper's start)", f"{mean_abs.compressed:.6f}", share(mean_abs))
        faithful.add_row("", "one bit per weight, compiled", f"{ours.compressed:.6f}", share(ours))
        sizes = (size(tenant.tuned_bytes), size(tenant.delta_bytes))
        factors = (f"{tenant.factor:.1f}x", f"{tenant.factor / 2:.1f}x")
        times = (f"{tenant.compress_seconds:.1f} s", f"{tenant.compile_seconds:.1f} s")
        cost.add_row(tenant.name, *sizes, *factors, *times, f"{tenant.error:.1e}")
    return [faithful, cost]


def rows_table(rows: Sequence[Row]) -> Table:
    """The demo's batch of several tenants, row by row."""
    names = list(dict.fromkeys(row.tenant for row in rows))
    text = Column("text", max_width=24, no_wrap=True, overflow="ellipsis")
    table = Table("row", "tenant", text, "its own", *names, "as published", box=None)
    table.title = "Rows of one batch: distance to what dense models give for the row's text"
    table.caption = (
        "Shares of the distance from the base to the fine-tune as published (to the nearer one for the base's rows). A "
        "tenant's own dense model is its delta, materialized in fp32."
    )
    for at, row in enumerate(rows):
        others = [f"{row.others[name]:.2f}" if name in row.others else "" for name in names]
        published = "" if row.published is None else f"{row.published:.2f}"
        table.add_row(str(at), escape(row.tenant), escape(row.text), f"{row.own:.1e}", *others, published)
    return table


def many_tenants(found: ManyTenants) -> list[str]:
    """What the demo did with many tenants, in sentences."""
    changes, packaged = found.changes, found.packaged
    sentences = [
        f"While {changes.calls} calls ran, {changes.added} tenants were added ({changes.add_seconds * 1e3:.0f} ms "
        f"each), {changes.replaced} replaced, {changes.removed} removed: {changes.compiled.graphs} graphs, "
        f"{changes.compiled.compilations} compilations and {changes.compiled.records} records of CUDA graphs more, "
        f"{changes.rows} of {changes.rows} rows bit for bit as when all rows are of one tenant."
    ]
    if packaged is not None:
        sizes = ", ".join(map(str, packaged.batches))
        error = f"at most {packaged.error:.1e} off the rows above" if packaged.error else "bit for bit the rows above"
        sentences.append(
            f"Exported and merged in {packaged.export_seconds:.0f} s, packaged in {packaged.package_seconds:.0f} s "
            f"({size(packaged.nbytes)}). A new process without this package ran batches of {sizes} rows, {error}; "
            f"with a tenant replaced in it, at most {packaged.replaced_error:.1e} off its new dense model."
        )
    return sentences


def share(found: Fidelity) -> str:
    """The recovered share of the gap."""
    return "base and fine-tune do not differ" if found.recovered is None else f"{found.recovered:.4f}"
