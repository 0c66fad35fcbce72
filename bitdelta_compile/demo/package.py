"""The package of the demo: exported, merged, compiled ahead of time, run by torch alone, changed while loaded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .rows import EXACT, DemoFailedError, Scale, hidden

if TYPE_CHECKING:
    from ..delta import Delta

MAX_BATCH = 64

# Imports torch and nothing of this package.
_FRESH_PROCESS = """
import sys
sys.modules["bitdelta_compile"] = None  # an import of it would fail
import torch
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(**kwargs)[0] for kwargs in torch.load(inputs)], outputs)
"""


@dataclasses.dataclass(frozen=True)
class Packaged:
    """The package of all tenants.

    Attributes:
        file, nbytes: the package.
        batches: sizes of the batches that a process without this package ran; none is that of the export.
        error: the worst row there against the attached model, as a share of the row's gap.
        replaced_error: the worst row after a tenant was replaced in the loaded package, against the dense models.
        export_seconds, package_seconds: wall time, merging included in the first.
    """

    file: str
    nbytes: int
    batches: tuple[int, ...]
    error: float
    replaced_error: float
    export_seconds: float
    package_seconds: float


def make(base: Any, deltas: Mapping[str, Delta], file: Path) -> tuple[float, float]:
    """Export a base with each delta, merge the programs and package the result.

    Args:
        base: an encoder that returns tuples.
        deltas: by tenant.
        file: the package to write; ends in `.pt2`.

    Returns:
        Seconds of exporting and merging, and of packaging.
    """
    from ..programs.export import export
    from ..programs.merge import merge
    from ..programs.package import package

    positions = base.config.max_position_embeddings
    sizes = {0: torch.export.Dim("batch", min=1, max=MAX_BATCH), 1: torch.export.Dim("tokens", min=1, max=positions)}
    ids = torch.arange(2 * 3).reshape(2, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = dict.fromkeys(inputs, sizes)
    start = time.perf_counter()
    with torch.no_grad():
        program = merge(
            {name: export(base, (), inputs, delta=delta, dynamic_shapes=shapes) for name, delta in deltas.items()}
        )
    exported = time.perf_counter()
    package(program, file)
    return exported - start, time.perf_counter() - exported


def run(
    file: Path,
    seconds: tuple[float, float],
    deltas: Mapping[str, Delta],
    tenants: Sequence[str | None],
    found: Tensor,
    scale: Scale,
) -> Packaged:
    """Run a package in a process without this package, and with a tenant replaced in this one.

    Args:
        file, seconds: the package, and what `make` said of it.
        deltas: two or more, by tenant; the first gets the delta of the second.
        tenants, found: tenants of the scale's batch, one per row, and what the attached model gave: [B, S, H].
        scale: of that batch.

    Raises:
        DemoFailedError: the package needs this package, or gives other numbers.
    """
    from ..programs.packaged import load_package

    loaded = load_package(file)
    index = loaded.row_index(tenants, len(tenants))
    batches = (len(tenants), len(tenants) - 1, 1)
    calls = [{name: tensor[:count] for name, tensor in scale.batch.items()} for count in batches]
    calls = [call | {"tenant": index[:count]} for call, count in zip(calls, batches, strict=True)]
    results = run_in_fresh_process(file, calls)
    error = max(scale.worst(each, found, tenants[:count]) for each, count in zip(results, batches, strict=True))
    _check("without this package", error)

    name, other = [*deltas][:2]
    loaded.replace(name, deltas[other])
    replaced = [other if tenant == name else tenant for tenant in tenants]
    expected = torch.stack([scale.dense[tenant][at] for at, tenant in enumerate(replaced)])
    replaced_error = scale.worst(hidden(loaded, scale.batch, tenants=tenants), expected, replaced)
    _check(f"with {name} replaced", replaced_error)
    return Packaged(str(file), file.stat().st_size, batches, error, replaced_error, *seconds)


def run_in_fresh_process(package: Path, calls: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """The first output of a package for each of some calls, from a new process that cannot import this package.

    Raises:
        DemoFailedError: the process failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "inputs.pt", Path(scratch) / "outputs.pt"
        torch.save([dict(call) for call in calls], inputs)
        command = [sys.executable, "-I", "-c", _FRESH_PROCESS, *map(str, (package.resolve(), inputs, outputs))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and it said nothing"])[-1]
            raise DemoFailedError(f"{package} does not run without this package: {reason}")
        found: list[Tensor] = torch.load(outputs)
    return found


def _check(how: str, error: float) -> None:
    if not error <= EXACT:
        raise DemoFailedError(f"the package {how} is {error:.1e} of a row's gap off, more than {EXACT}")
