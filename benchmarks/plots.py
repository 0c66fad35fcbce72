"""Plots shared by the cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    y_label: str,
    title: str,
    path: Path,
    *,
    log: bool = False,
) -> None:
    """Grouped bars, saved as PNG; a line at 1, or a logarithmic axis."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.5), layout="constrained")
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        axes.bar(
            [index + (place - (len(series) - 1) / 2) * width for index in range(len(groups))], values, width, label=name
        )
    if log:
        axes.set_yscale("log")
    else:
        axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(series), frameon=False)
    _save(figure, path)


def panels(
    records: Sequence[Mapping[str, Any]],
    panel: tuple[str, str],
    x: str,
    series: Mapping[str, str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """A grid of small line plots, saved as PNG.

    Args:
        panel: fields of a record whose values tell the rows and the columns of the grid apart.
        x: field for the horizontal axis, in powers of two.
        series: label -> field; a line each, beside a line at 1.
        labels: of both axes.
    """
    pyplot = _pyplot()
    rows, columns = (list(dict.fromkeys(record[field] for record in records)) for field in panel)
    figure, grid = pyplot.subplots(
        len(rows), len(columns), figsize=(3.2 * len(columns), 2.6 * len(rows) + 0.6), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for row, axes_of_row in zip(rows, grid, strict=True):
        for column, axes in zip(columns, axes_of_row, strict=True):
            chosen = [record for record in records if (record[panel[0]], record[panel[1]]) == (row, column)]
            for label, field in series.items():
                axes.plot([record[x] for record in chosen], [record[field] for record in chosen], "o-", label=label)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{column}, {row}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel(labels[0], fontsize=9)
    figure.supylabel(labels[1], fontsize=9)
    figure.suptitle(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(series), frameon=False)
    _save(figure, path)


def lines(
    records: Sequence[Mapping[str, Any]],
    panel: str | None,
    x: str,
    series: Mapping[str, str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """Lines over a field in powers of two, both axes logarithmic, saved as PNG.

    Args:
        panel: field whose values get a plot each, side by side; None for one plot.
        x: field for the horizontal axis.
        series: label -> field; where a record has None the line breaks.
        labels: of both axes.
    """
    pyplot = _pyplot()
    values = list(dict.fromkeys(record[panel] for record in records)) if panel else [None]
    figure, grid = pyplot.subplots(
        1, len(values), figsize=(4.6 * max(len(values), 1.4), 4.2), squeeze=False, sharey=True, layout="constrained"
    )
    for value, axes in zip(values, grid[0], strict=True):
        chosen = [record for record in records if panel is None or record[panel] == value]
        for label, field in series.items():
            heights = [float("nan") if record[field] is None else record[field] for record in chosen]
            axes.plot([record[x] for record in chosen], heights, "o-", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.set_xlabel(labels[0])
        if panel:
            axes.set_title(f"{panel} {value}", fontsize=10)
    grid[0][0].set_ylabel(labels[1])
    figure.suptitle(title)
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(2, len(series)), frameon=False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
