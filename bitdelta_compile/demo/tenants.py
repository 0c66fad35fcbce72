"""The second half of the demo: the base and two fine-tunes of it as rows of one batch, each row with its own delta.

Attached, with tenants that come and go while the model runs; then packaged. All of it is checked before it is shown.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import fidelity
from ..fidelity import Batch
from ..lowering.torch_internals import Compiled, compiled_so_far
from ..progress import Progress
from . import package as demo_package
from .package import Packaged
from .rows import DemoFailedError, Row, Scale, check_alone, hidden

if TYPE_CHECKING:
    from ..serve.model import TenantModel

SLOTS = 8
ROUNDS, QUICK_ROUNDS = 12, 3
_SWAPPED, _GUEST = "swapped", "guest"  # tenants that change while the model runs


@dataclasses.dataclass(frozen=True)
class Changes:
    """What happened while one thread called the model without a break and another changed its tenants.

    Attributes:
        calls, rows: of the thread that called; every row was compared bit for bit.
        added, replaced, removed: tenants.
        add_seconds: median time of an addition, reading the file included.
        compiled: meanwhile; nothing.
    """

    calls: int
    rows: int
    added: int
    replaced: int
    removed: int
    add_seconds: float
    compiled: Compiled


@dataclasses.dataclass(frozen=True)
class ManyTenants:
    """What the second half found; `packaged` is None where it ran without Inductor."""

    rows: list[Row]
    changes: Changes
    packaged: Packaged | None


def run(
    base_folder: Path,
    tuned: Mapping[str, Path],
    files: Mapping[str, Path],
    package_file: Path,
    *,
    quick: bool = False,
    progress: Progress | None = None,
) -> ManyTenants:
    """Serve the base and two fine-tunes row by row, change tenants while running, package them, and check all of it.

    Args:
        base_folder: the base's checkpoint, an encoder with a tokenizer.
        tuned: the fine-tunes' checkpoints, by tenant name.
        files: their delta files.
        package_file: the package to write; ends in `.pt2`.
        quick: without Inductor, and so without the package.
        progress: called with (stage, done, total).

    Raises:
        DemoFailedError: a row is not what its tenant's dense model gives, a change of tenants compiled something or
            disturbed a call, or the package gives other numbers.
    """
    import transformers

    from ..delta import Delta
    from ..serve.model import attach

    def step(number: int) -> None:
        if progress is not None:
            progress(f"base, {', '.join(files)} in one batch: attach, change, package", number, 4)

    step(0)
    deltas = {name: Delta.load(file) for name, file in files.items()}
    first, *rest = files
    tenants = [first, None, *rest] * 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    texts = fidelity.held_out_texts(len(tenants))
    (batch,) = fidelity.token_batches(tokenizer, texts, max_length=64, batch_size=len(texts))
    scale = Scale(base_folder, tuned, deltas, batch)
    base: Any = fidelity.load_model(base_folder)[0]
    base.config.use_cache, base.config.return_dict = False, False  # tuples need no transformers where the package runs
    model = attach(base, deltas, slots=SLOTS, lower="eager" if quick else "inductor")
    found = hidden(model, batch, tenants=tenants)
    step(1)
    read = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    rows = [scale.row(found, at, tenant, read[at]) for at, tenant in enumerate(tenants)]
    for row in rows:
        row.check()
    changes = change_while_running(
        model, batch, tenants, found, files, rounds=QUICK_ROUNDS if quick else ROUNDS, compiled=not quick
    )
    step(2)
    packaged = None
    if not quick:
        seconds = demo_package.make(base, deltas, package_file)
        step(3)
        packaged = demo_package.run(package_file, seconds, deltas, tenants, found, scale)
    step(4)
    return ManyTenants(rows, changes, packaged)


def change_while_running(
    model: TenantModel,
    batch: Batch,
    tenants: Sequence[str | None],
    found: Tensor,
    files: Mapping[str, Path],
    *,
    rounds: int,
    compiled: bool,
) -> Changes:
    """Call the model in one thread while another adds, replaces and removes tenants, and compare every row.

    Args:
        model: with the tenants of `files` attached, and room for four more.
        batch, tenants, found: a call of it and what it gave, [B, S, H].
        files: delta files of two tenants, which take turns as a third one that is replaced.
        rounds: of changes; at least one whole call of the first thread falls into each.
        compiled: it runs through Inductor.

    Raises:
        DemoFailedError: a row differed in any bit from what its tenant gives when all rows are its own, or a change
            compiled something.
    """
    alone = {name: hidden(model, batch, tenants=[name] * len(tenants)) for name in {None, *tenants}}
    check_alone(found, tenants, alone)
    before = compiled_so_far()
    if not before.graphs or (compiled and not before.compilations):
        raise DemoFailedError("this torch does not count its graphs and compilations where they are looked for")
    names = [*files]
    model.add(_SWAPPED, files[names[0]])
    stop, calls, seconds = threading.Event(), [0], []

    def call() -> None:
        rows = [_SWAPPED, *tenants[1:]]
        while not stop.is_set():
            check_alone(hidden(model, batch, tenants=rows), rows, alone, either={_SWAPPED: names})
            calls[0] += 1

    made = 0
    with ThreadPoolExecutor(1) as threads:
        running: Future[None] = threads.submit(call)
        try:
            while made < rounds and not running.done():
                made += 1
                one, other = names[made % 2], names[1 - made % 2]
                model.replace(_SWAPPED, files[one])
                begun = calls[0]
                start = time.perf_counter()
                model.add(_GUEST, files[other])
                seconds.append(time.perf_counter() - start)
                rows = [_SWAPPED, *tenants[1:-1], _GUEST]
                now = {**alone, _SWAPPED: alone[one], _GUEST: alone[other]}
                check_alone(hidden(model, batch, tenants=rows), rows, now)
                model.remove(_GUEST)
                while calls[0] < begun + 2 and not running.done():  # the first may have begun before the replacement
                    time.sleep(0.001)
        finally:
            stop.set()
        running.result()
    model.remove(_SWAPPED)
    more = compiled_so_far() - before
    if any(more):
        raise DemoFailedError(
            f"changes of tenants made Dynamo bring {more.graphs} graphs and Inductor compile {more.compilations} and "
            f"record {more.records} CUDA graphs: none is needed"
        )
    return Changes(
        calls=calls[0],
        rows=calls[0] * len(tenants),
        added=made + 1,
        replaced=made,
        removed=made + 1,
        add_seconds=statistics.median(seconds),
        compiled=more,
    )
