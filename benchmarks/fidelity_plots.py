"""Plots of the fidelity table: what each row loses, and where in the model it is lost."""

from __future__ import annotations

from pathlib import Path

from .plots import _pyplot, _save
from .registry import Record


def draw(records: list[Record], path: Path) -> None:
    """Lost share by row and pair in `path`; by layer in its neighbour `-layers`."""
    _rows(records, path)
    _layers(records, path.with_name(f"{path.stem}-layers{path.suffix}"))


def _rows(records: list[Record], path: Path) -> None:
    rows = list(dict.fromkeys((r["method"], r["text"]) for r in records))
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    lost = {(r["method"], r["text"], r["pair"]): 1 - r["recovered"] for r in records}
    figure, axes = _pyplot().subplots(figsize=(8.0, 1.5 + 0.34 * len(rows)), layout="constrained")
    marks = "osD^v<>"
    for pair, mark in zip(pairs, marks, strict=False):
        found = [(lost[(*row, pair)], place) for place, row in enumerate(rows) if (*row, pair) in lost]
        axes.plot([max(x, 1e-6) for x, _ in found], [y for _, y in found], mark, label=pair, alpha=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_yticks(range(len(rows)), [f"{method} ({text} text)" for method, text in rows], fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_xlabel("share of the base-to-tuned gap lost on held-out text")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=len(pairs), frameon=False, fontsize=8)
    _save(figure, path)


def _layers(records: list[Record], path: Path) -> None:
    pairs = list(dict.fromkeys(r["pair"] for r in records))
    figure, grid = _pyplot().subplots(
        1, len(pairs), figsize=(3.6 * len(pairs), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    handles = {}
    methods = list(dict.fromkeys(r["method"] for r in records))
    colours = {method: f"C{place}" for place, method in enumerate(methods)}
    for pair, axes in zip(pairs, grid[0], strict=True):
        for record in records:
            if record["pair"] == pair and record["text"] in ("same", "none"):
                shown = [max(share, 1e-7) for share in record["layers"]]
                style = "-" if record["text"] == "same" else "--"
                label = f"{record['method']} ({record['text']} text)"
                (handles[label],) = axes.plot(shown, style, color=colours[record["method"]], linewidth=1.2)
        axes.set_yscale("log")
        axes.set_title(pair, fontsize=10)
        axes.set_xlabel("layer", fontsize=9)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("squared distance to the tuned model,\nas a share of the base's", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)
