"""The `bitdelta` command. The only module that prints: results on stdout, progress, warnings and errors on stderr.

Exit codes: 0 done, 1 a check failed (`verify`, `doctor`, `demo`), 2 an error in what was asked for or given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import render
from .errors import BitDeltaError, UnsupportedError

if TYPE_CHECKING:
    from .delta import Delta
    from .progress import Progress as Report

CHECK_FAILED, BAD_REQUEST = 1, 2


class _Group(typer.core.TyperGroup):
    """Turns this package's errors, and those of the file system, into one sentence."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            known = getattr(error, "inner_exception", error)  # torch.compile wraps what a backend raises
            if ctx.params.get("debug") or not isinstance(known, BitDeltaError | OSError):
                raise
            message = " ".join(str(known).split())
            Console(stderr=True, soft_wrap=True).print(f"[red]Error: {escape(message)}[/red]", highlight=False)
            raise typer.Exit(BAD_REQUEST) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep a fine-tune as one bit per weight on top of its base.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="The base: checkpoint folder or hub id.")]
TunedArgument = Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tune: checkpoint folder or hub id.")]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The delta file.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The delta file to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")]
TextOption = Annotated[Path | None, typer.Option("--text", help="Text file, paragraphs set apart by blank lines.")]


class Quality(enum.StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


class Method(enum.StrEnum):
    sequential = "sequential"
    closed_form = "closed_form"
    mean_abs = "mean_abs"


class DType(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _out(f"bitdelta {version('bitdelta_compile')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors, and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    log = logging.getLogger("bitdelta_compile")
    log.handlers = [handler]
    log.setLevel(logging.DEBUG if debug else logging.WARNING)


@app.command()
def compress(
    base: BaseArgument,
    tuned: TunedArgument,
    output: OutputOption,
    quality: Annotated[Quality, typer.Option(help="How much work goes into signs and scales.")] = Quality.best,
    method: Annotated[
        Method | None, typer.Option(help="In place of the quality's own; mean_abs needs no forward pass.")
    ] = None,
    planes: Annotated[int, typer.Option(min=1, max=4, help="Bits per weight.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the low-rank part of every matrix.")] = 0,
    text: TextOption = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Calibration tokens; by the quality by default.")] = None,
    sampled: Annotated[
        int, typer.Option(min=0, help="Calibration tokens that TUNED writes itself, beside those of --text.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of sampled and random calibration tokens.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampled calibration tokens.")] = 1.0,
    bits: Annotated[
        float | None, typer.Option(help="Most bits of FILE per weight: measured on the model, matrices share them.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option("--max-bytes", help="Most bytes of FILE, instead of --bits.")] = None,
    distill: Annotated[
        int,
        typer.Option(
            min=0, metavar="STEPS", help="Then train the scales on the fine-tune's outputs: the paper has 200."
        ),
    ] = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            "--work-dir",
            help="Keeps every fitted matrix and step of --distill: the call, repeated, goes on from there.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute, cuda for example; weights go there one at a time.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress TUNED into a delta on BASE. Needs no data; --text gives it some."""
    from .compress import compress as run
    from .compress.distill import distill as train
    from .fidelity import read_texts

    _check_output(output, force)
    if distill and (bits is not None or max_bytes is not None):
        raise UnsupportedError("--distill writes of itself into the file, past what a budget allows: give one of them")
    texts = read_texts(text) if text else None
    _quiet_transformers()
    start = time.perf_counter()
    with _progress() as report:
        delta = run(
            base,
            tuned,
            texts,
            quality=quality.value,
            method=method.value if method else None,
            planes=planes,
            rank=rank,
            tokens=tokens,
            sampled=sampled,
            seed=seed,
            temperature=temperature,
            bits=bits,
            max_bytes=max_bytes,
            work_dir=work_dir,
            device=device,
            progress=report,
        )
        if distill:
            delta = train(base, tuned, delta, texts, steps=distill, seed=seed, work_dir=work_dir, progress=report)
        delta.save(output)
    _show_written(delta, output, time.perf_counter() - start, as_json)


@app.command()
def inspect(
    file: FileArgument,
    params: Annotated[bool, typer.Option("--params", help="List every parameter.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is in a delta file."""
    delta = _load(file)
    if as_json:
        found = render.described(delta, file) | {"tied": dict(delta.tied), "side_files": sorted(delta.side_files)}
        if params:
            found["parameters"] = {name: render.parameter(delta, name) for name in delta.encodings}
        _print_json(found)
        return
    _out(f"{file}: {render.size(file.stat().st_size)}, made with {render.options(delta.options)}")
    _out(delta.summary())
    _out(f"carries {', '.join(sorted(delta.side_files)) or 'no side files'}")
    if params:
        _out(render.parameter_table(delta))


@app.command()
def verify(
    file: FileArgument,
    base: BaseArgument,
    tuned: TunedArgument,
    text: TextOption = None,
    min_recovered: Annotated[float, typer.Option(help="Fail (exit 1) below this share of the gap.")] = 0.0,
    layers: Annotated[bool, typer.Option("--layers", help="Show where in the model it is lost.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of the way from BASE to TUNED a delta file recovers."""
    from . import fidelity

    delta = _load(file)
    texts = fidelity.read_texts(text) if text else None
    _quiet_transformers()
    with _progress() as report:
        found = fidelity.verify(delta, base, tuned, texts, progress=report)
    passed = found.recovered is None or found.recovered >= min_recovered
    if as_json:
        _print_json(dataclasses.asdict(found) | {"recovered": found.recovered, "passed": passed})
    else:
        _out(render.fidelity_table(found))
        if layers:
            _out(render.layer_table(found))
    if not passed:
        raise typer.Exit(CHECK_FAILED)


@app.command()
def materialize(
    base: BaseArgument,
    file: FileArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; new or empty.")],
    dtype: Annotated[DType | None, typer.Option(help="Of the weights; the fine-tune's own by default.")] = None,
) -> None:
    """Write base + delta as a checkpoint folder that from_pretrained loads."""
    import torch

    delta = _load(file)
    with _progress() as report:
        report("Writing", 0, 1)
        delta.save_pretrained(base, output, dtype=getattr(torch, dtype.value) if dtype else None)
        report("Writing", 1, 1)
    _out(f"wrote {output}")


@app.command("import-bitdelta")
def import_bitdelta(
    diff: Annotated[Path, typer.Argument(metavar="DIFF.pt", help="A file of BitDelta's own code.")],
    base: BaseArgument,
    output: OutputOption,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a delta made by the BitDelta paper's own code."""
    from .importer import import_bitdelta as run

    _check_output(output, force)
    start = time.perf_counter()
    with _progress() as report:
        delta = run(diff, base, progress=report)
        delta.save(output)
    _show_written(delta, output, time.perf_counter() - start, as_json)


@app.command()
def export(
    base: BaseArgument,
    tenants: Annotated[
        list[str], typer.Argument(metavar="[NAME=]DELTA...", help="Delta files; a tenant is named after its file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.pt2", help="The package to write.")],
    max_batch: Annotated[int, typer.Option(min=2, help="Most rows of a call.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of a row.")] = 512,
    slots: Annotated[int | None, typer.Option(min=1, help="Room for tenants; as many as there are by default.")] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compile BASE and its tenants into one file that runs with torch alone, a tenant per row."""
    from .programs.package import read_metadata
    from .programs.textmodel import export_checkpoint

    _check_output(output, force)
    deltas = {name: _load(file) for name, file in _named(tenants).items()}
    _quiet_transformers()
    start = time.perf_counter()
    with _progress() as report:
        export_checkpoint(
            base, deltas, output, max_batch=max_batch, max_tokens=max_tokens, slots=slots, progress=report
        )
    seconds = time.perf_counter() - start
    found = {"file": str(output), "file_bytes": output.stat().st_size, "metadata": read_metadata(output)}
    if as_json:
        _print_json(found | {"seconds": round(seconds, 3)})
    else:
        _out(f"wrote {output}: {render.size(output.stat().st_size)}, tenants {', '.join(deltas)}; {seconds:.1f} s")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.pt2", help="A package of `bitdelta export`.")],
    text: Annotated[list[str] | None, typer.Option("--text", help="A row of the batch; give it once per row.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--ids", help="A row as token ids: 101,2023,102.")] = None,
    tenant: Annotated[
        list[str] | None, typer.Option("--tenant", help="Of each row in turn, or one for all; none is the base.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the tokenizer is, if the base has moved.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run texts through a package, each with its tenant: next tokens of a language model, embeddings of an encoder."""
    from .programs.packaged import load_package
    from .programs.textmodel import read_ids, run_rows, shown, tokenizer_of

    if bool(text) == bool(ids):
        raise UnsupportedError("give the rows either as --text or as --ids")
    model = load_package(file)
    _quiet_transformers()
    tokenizer: Any = tokenizer_of(model, base) if text else None
    rows = [tokenizer(each)["input_ids"] for each in text or ()] + [read_ids(each) for each in ids or ()]
    names = [None if each == "none" and each not in model.tenants else each for each in tenant or ["none"]]
    if len(names) == 1:
        names *= len(rows)
    found = run_rows(model, rows, names, tokenizer)
    if as_json:
        _print_json({"file": str(file), "rows": found})
    else:
        for row in found:
            _out(shown(row))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for delta files, results and the plot.")] = Path("demo-output"),
    cache: Annotated[Path | None, typer.Option(help="Folder for the downloads.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the texts; no Inductor, so no package.")] = False,
) -> None:
    """Two real fine-tunes of MiniLM: how faithful and how small they are, and both and their base in one batch."""
    from . import demo as steps
    from .demo.rows import DemoFailedError
    from .materials import default_cache

    _quiet_transformers()
    try:
        with _progress() as report:
            result = steps.run(out, cache or default_cache(), quick=quick, progress=report)
    except DemoFailedError as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]Failed: {escape(str(error))}[/red]", highlight=False)
        raise typer.Exit(CHECK_FAILED) from None
    for table in [*render.demo_tables(result.tenants), render.rows_table(result.many.rows)]:
        _out(table)
    for sentence in render.many_tenants(result.many):
        _out(sentence)
    for path in result.files:
        _out(f"wrote {path}")
    if result.graph:
        _out("\nThe rewritten graph of one layer:")
        _out(result.graph)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: versions, C++ compiler, GPU, caches."""
    from .doctor import examine

    found = examine()
    if as_json:
        _print_json(dataclasses.asdict(found))
    else:
        table = Table(show_header=False, box=None)
        for name, value in found.findings.items():
            table.add_row(name, escape(value))
        _out(table)
        for sentence in (*found.warnings, *found.problems):
            Console(stderr=True).print(f"[yellow]{escape(sentence)}[/yellow]")
    if found.problems:
        raise typer.Exit(CHECK_FAILED)


def main() -> None:
    """The console script."""
    app()


def _out(shown: object) -> None:
    console = Console(soft_wrap=isinstance(shown, str))
    console.print(shown, markup=False, highlight=False)


def _print_json(found: Mapping[str, object]) -> None:
    print(json.dumps(found, indent=2, sort_keys=True, allow_nan=False))


@contextlib.contextmanager
def _progress() -> Iterator[Report]:
    """A callback `(stage, done, total)` that draws one bar per stage on stderr, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(escape(stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _quiet_transformers() -> None:
    """Its progress bars and its remarks on unused heads would stand between ours."""
    from transformers.utils import logging as messages

    messages.disable_progress_bar()
    messages.set_verbosity_error()


def _load(file: Path) -> Delta:
    from .delta import Delta

    return Delta.load(file)


def _named(tenants: Sequence[str]) -> dict[str, Path]:
    """Tenant -> file, from `name=file` or `file`."""
    found: dict[str, Path] = {}
    for each in tenants:
        name, equals, file = each.rpartition("=")
        path = Path(file)
        name = name if equals else path.name.removesuffix(".safetensors").removesuffix(".bitdelta")
        if not name or name in found:
            raise UnsupportedError(f"{each} gives the tenant name {name!r} {'twice' if name else ''}: use NAME={path}")
        found[name] = path
    return found


def _show_written(delta: Delta, output: Path, seconds: float, as_json: bool) -> None:
    found = render.described(delta, output) | {"seconds": round(seconds, 3)}
    if as_json:
        _print_json(found)
        return
    _out(delta.summary())
    written = output.stat().st_size
    factor = render.tuned_bytes(delta) / written
    _out(f"wrote {output}: {render.size(written)}, the fine-tune is {factor:.1f} times as large; {seconds:.1f} s")


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise UnsupportedError(f"{output} exists: give another name, or --force to replace it")
    if output.is_dir():
        raise UnsupportedError(f"{output} is a folder: give the name of a file")
    if not output.absolute().parent.is_dir():
        raise UnsupportedError(f"{output.parent} is no folder: make it first, or give another place for {output.name}")
