"""`python -m benchmarks [CASE ...]`: run cases, print their tables, write JSONL and plots."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from . import (  # noqa: F401  each registers its cases
    compile_overhead,
    compress_memory,
    compress_resume,
    delta_op,
    delta_sums,
    fidelity,
    generation,
    gpu_agree,
    gpu_ceilings,
    gpu_decode,
    gpu_fit,
    gpu_generate,
    gpu_prefill,
    ledger,
    quantized,
    tenants,
    tenants_memory,
    tenants_op,
    traffic,
)
from .registry import CASES, Record, Run, SkippedError, machine, write_records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which to run (default: all): {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), help="folder for JSONL and plots")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bitdelta_compile", help="materials")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions: no figures to quote")
    args = parser.parse_args()
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        parser.error(f"no case named {unknown[0]}: there are {', '.join(CASES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.quick, args.cache)
    for name in args.cases or CASES:
        case = CASES[name]
        print(f"{name}: {case.help}")
        start = time.perf_counter()
        records: list[Record] = []
        path = args.out / f"{name}.jsonl"
        try:
            for record in case.measure(run):
                records.append({"case": name, "quick": args.quick, **machine(), **record})
                write_records(path, records)
        except SkippedError as reason:
            print(f"skipped: {reason}\n")
            continue
        print(table(case.columns, records))
        if case.plot is not None:
            case.plot(records, path.with_suffix(".png"))
        print(f"{path} ({time.perf_counter() - start:.0f} s)\n")


def table(columns: tuple[str, ...], records: list[Record]) -> str:
    """The chosen columns, aligned."""
    rows = [columns, *(tuple(_show(record.get(column)) for column in columns) for record in records)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
