"""Compression killed again and again and resumed from its work folder: the same file as of a run that nobody killed?

Ten places are drawn among the matrices. A run dies by SIGKILL a random moment after it has reached its place, the next
goes on from the work folder; the eleventh may finish. The files must be equal byte for byte.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitdelta_compile.materials import BASE, TENANTS, fetch

from .registry import Record, Run, case, require

KILLS = 10
CHILD = """
import sys
from bitdelta_compile.compress import compress
base, tuned, work, out = sys.argv[1:]
report = lambda stage, done, total: print(done, total, flush=True)
compress(base, tuned, work_dir=work, tokens=4096, progress=report).save(out)
"""


@case(
    "compress-resume",
    f"MiniLM: {KILLS} SIGKILLs at random points of one compression, then its file against an uninterrupted run's",
    columns=("place", "reached", "moment", "kept_before", "kept_after", "matrices", "identical"),
)
def measure(run: Run) -> list[Record]:
    folders = fetch([BASE, *TENANTS.values()], run.cache / "demo")
    pair = [folders[BASE.package], next(folders[material.package] for material in TENANTS.values())]
    draw = random.Random(0)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as scratch:
        work, whole, resumed = (Path(scratch) / name for name in ("work", "whole", "resumed"))

        def start(folder: Path, out: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", CHILD, *map(str, (*pair, folder, out))]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        def finish(folder: Path, out: Path) -> int:
            """How many matrices there are."""
            told, _ = (child := start(folder, out)).communicate()
            require(child.returncode == 0, "a run that nobody killed failed")
            return int(told.split()[-1])

        matrices = finish(Path(scratch) / "other", whole)
        for place in sorted(draw.randrange(matrices) for _ in range(2 if run.quick else KILLS)):
            before, child = _kept(work), start(work, resumed)
            assert child.stdout is not None
            reached = next((int(line.split()[0]) for line in child.stdout if int(line.split()[0]) >= place), matrices)
            time.sleep(moment := draw.uniform(0, 0.5))
            child.kill()
            child.communicate()
            require(child.returncode < 0, f"the run ended before matrix {place} of {matrices}")
            record = {"place": place, "reached": reached, "moment": moment, "kept_before": before}
            records.append({**record, "kept_after": _kept(work), "matrices": matrices})
        finish(work, resumed)
        identical = _digest(whole) == _digest(resumed)
        require(identical, "the resumed run's file differs from the uninterrupted one's")
    return [{**record, "identical": identical} for record in records]


def _kept(work: Path) -> int:
    return len(list(work.glob("*.safetensors")))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
