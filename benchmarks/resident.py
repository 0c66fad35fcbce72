"""What a fresh process holds in memory with tenants attached: `python -m benchmarks.resident WAY BASE DELTA...`.

Prints JSON: bytes at five stages, by kind of page. A small model is attached and called before the first stage, so that
the compiler's own code and data do not count as the tenants'; freed memory is given back to the system before each.

Pages are counted as resident in this process (RSS), not shared out among the processes that map them (PSS): torch's
libraries are mapped by every Python process of the machine, and their share would depend on what else is running.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

import bitdelta_compile as bdc

from .fleet import Fleet, batch, random_pair

WAYS = ("attached", "separate")
TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of resident memory.

    Attributes:
        anonymous: heap and anonymous mappings: tensors that were made or copied, Python objects, compiled graphs' data.
        weights: pages of checkpoints and delta files that are mapped and not copied.
        code: pages of any other file: libraries, the kernels that Inductor has built.
    """

    anonymous: int
    weights: int
    code: int


def parse(smaps: Iterable[str]) -> Resident:
    """The lines of /proc/PID/smaps, summed up."""
    sums = {"anonymous": 0, "weights": 0, "code": 0}
    path, resident = "", 0
    for line in smaps:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = [*line.split(maxsplit=5), ""][5].strip()
        elif line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
        elif line.startswith("Anonymous:"):
            anonymous = int(line.split()[1]) << 10
            sums["anonymous"] += anonymous
            sums["weights" if path.endswith(".safetensors") else "code"] += resident - anonymous
    return Resident(**sums)


def resident() -> Resident:
    """Of this process, once everything that can be freed is. Linux with glibc only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps") as file:
        return parse(file)


def _warm_up() -> None:
    """Load what attaching and compiling load once in a process."""
    base, tuned = random_pair(layers=1)
    model = bdc.attach(base, {"a": bdc.compress(base, tuned, method="mean_abs")}, slots=2)
    model(**batch(4, TOKENS), tenants=["a", None, "a", None])
    with torch.no_grad():
        base(**batch(2, TOKENS))
    torch._dynamo.reset()


def _touch(model: nn.Module) -> None:
    """Read every weight once: what is mapped is resident from then on, as after some time of serving."""
    for parameter in model.parameters():
        parameter.detach().sum()


def stages(way: str, fleet: Fleet) -> dict[str, Resident]:
    """Read with no model, with the base, with it compiled and called, with all tenants, after a batch with all of them.

    "separate" is dense models: the first tenant's takes the base's place, and they are called as they are.
    """
    _warm_up()
    found = {"before": resident()}
    names = (list(fleet.named) * 2)[: max(2, len(fleet.files))]
    inputs = batch(len(names), TOKENS)
    models = [fleet.dense(fleet.files[0]) if way == "separate" else fleet.load()]
    _touch(models[0])
    found["loaded"] = resident()
    with torch.no_grad():
        torch.compile(models[0], dynamic=True)(**inputs)
        found["compiled"] = resident()
        if way == "attached":
            model = bdc.attach(models[0], fleet.named, slots=len(fleet.files))
            found["tenants"] = resident()
            model(**inputs, tenants=names)
        else:
            models += [fleet.dense(file) for file in fleet.files[1:]]
            found["tenants"] = resident()
            for dense in models:
                dense(**inputs)
    found["serving"] = resident()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("base", type=Path, help="checkpoint folder")
    parser.add_argument("deltas", type=Path, nargs="+", help="delta files")
    args = parser.parse_args()
    found = stages(args.way, Fleet(args.base, tuple(args.deltas)))
    print(json.dumps({stage: dataclasses.asdict(value) for stage, value in found.items()}))


if __name__ == "__main__":
    main()
