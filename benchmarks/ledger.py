"""What every GPU kernel compiles to, without a GPU: instructions per weight, registers, shared memory, spills.

Compiles each kernel of kernels/ with each entry of the tuning table ahead of time, and counts in the machine code.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdelta_compile.kernels import configs

from .registry import Record, Run, case

BINARY_TARGETS: tuple[int | str, ...] = (80, 89, 90)
EXACT_TARGETS: tuple[int | str, ...] = (80, 89, 90, 100, 120, "gfx942")
_ROWS = 16
_POINTERS = {
    "i32": "signs bits sums tenant order starts arrived ids",
    "fp32": "row_scale scale halves inner partial col rest planes slope change upper h",
}
_POINTERS |= {"bf16": "y x weight bias left right words table"}
_TYPES = {f"{name}_ptr": f"*{kind}" for kind, names in _POINTERS.items() for name in names.split()}
_ALIGNED = ("N", "K", "x_stride", "part", "across", "last", *_TYPES)  # sizes of real layers, buffers of torch


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel with one choice of its constants.

    Attributes:
        name: of the entry in the ledger.
        module, kernel: where it is.
        constants: its compile-time arguments.
        warps, stages: of the launch.
        targets: what it is compiled for: compute capabilities, or the name of an AMD architecture.
        config: the entry of the tuning table, None for a kernel that has none.
        splits, wide: how x is represented.
    """

    name: str
    module: str
    kernel: str
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    targets: tuple[int | str, ...] = EXACT_TARGETS
    config: configs.Binary | configs.Exact | configs.Fused | None = None
    splits: int = 1
    wide: bool = False


def entries() -> Iterator[Entry]:
    """Every kernel with every entry of the table; rarer forms (24 bits, parts, planes, a base) for few targets."""
    even: dict[str, Any] = {"HALF": 0, "EVEN": True, "P": 1, "XP": 1, "RANK": 0}
    odd: dict[str, Any] = {"HALF": 1, "EVEN": False, "P": 2, "XP": 2, "RANK": 16}
    indexed = {"INDEXED": True, "MP": _ROWS}
    for config in configs.BINARY_DECODE:
        for form, constants, wide, targets in (
            ("", even, False, BINARY_TARGETS),
            (" 24 bit", even, True, (90,)),
            (" ragged", odd, False, (90,)),
        ):
            constants = {**_sizes(config), **constants, **indexed, "WIDE": int(wide), "CP": 8}
            name = f"binary {_label(config)}{form}"
            yield Entry(name, "delta_linear", "binary_kernel", constants, config.warps, 1, targets, config, wide=wide)
    for fused in configs.FUSED_DECODE:
        constants = {**_sizes(fused.delta), **even, **indexed, "WIDE": 0, "CP": 8, "BIAS": True, "BM": _ROWS}
        constants |= {"BK": fused.BK, "SPLIT": fused.SPLIT, "STAGES": fused.STAGES, "FORM": "asm"}
        name = f"fused {_label(fused.delta)}"
        yield Entry(name, "fused", "fused_kernel", constants, fused.warps, fused.STAGES, BINARY_TARGETS, fused)
    one_plane = odd | {"P": 1, "XP": 1}
    there: dict[tuple[configs.Exact, bool], list[int | str]] = {}
    for target in EXACT_TARGETS:
        for exact in configs.exact_decode(target):
            there.setdefault((exact, False), []).append(target)
        for exact in configs.prefill(target):
            there.setdefault((exact, True), []).append(target)
    for (exact, is_sorted), targets_of in there.items():
        for form, constants, splits, base, wanted in (
            ("", even, 1, False, EXACT_TARGETS),
            (" 3 parts", even, 3, False, (90, 100, 120)),
            (" ragged", odd, 1, False, (80, 90, 100, 120, "gfx942")),
            (" ragged one plane", one_plane, 1, False, (90,)),
            (" with base", even, 1, True, (90,)),
        ):
            constants = {**_sizes(exact.of_parts(splits)), **constants, **indexed, "SPLITS": splits, "BASE": base}
            constants |= {"SORTED": is_sorted, "SP": 32, "FORM": "asm", "EVEN": constants["EVEN"] or exact.U == 1}
            name = f"{'prefill' if is_sorted else 'exact'} {_label(exact)}{form}"
            if targets := tuple(target for target in targets_of if target in wanted):
                yield Entry(
                    name, "delta_linear", "exact_kernel", constants, exact.warps, exact.STAGES, targets, exact, splits
                )
    column = {"XP": 1, "COL": True, "INDEXED": True}
    yield Entry("bits", "operands", "bits_kernel", {**column, "WIDE": 0, "BK": 2048}, targets=BINARY_TARGETS)
    yield Entry("bits 24 bit", "operands", "bits_kernel", {**column, "WIDE": 1, "BK": 2048}, targets=(90,))
    yield Entry("words", "operands", "words_kernel", {**column, "SPLITS": 1, "NB": 4})
    yield Entry("inner", "operands", "inner_kernel", {"RANK": 16, "RP": 16, "INDEXED": True, "BK": 512})
    sort = {"INDEXED": True, "BLOCK": configs.SEGMENT_ITEMS, "SPAN": configs.SEGMENT_SPAN}
    yield Entry("segments", "segments", "plan_kernel", sort)
    lookup = {"P": 1, "COL": True, "RANK": 16, "HALF": 1, "INDEXED": True, "BASE": True, "BK": 1024}
    yield Entry("embedding", "delta_embedding", "embedding_kernel", lookup)
    for name in ("feed", "flip"):
        for planes in (1, 2, 3, 4):
            constants = {"P": planes, "PP": 1 << (planes - 1).bit_length(), "COL": planes > 1, "along": 1}
            constants |= {"LEAF": configs.FIT_COLUMNS, "LANES": 32}
            targets = EXACT_TARGETS if planes == 1 else (90,)
            yield Entry(f"{name} {planes} planes", "columns", f"{name}_kernel", constants, 1, targets=targets)


def _sizes(config: configs.Binary | configs.Exact) -> dict[str, Any]:
    return dataclasses.asdict(config)


def _label(config: configs.Binary | configs.Exact) -> str:
    return " ".join(f"{name}{value}" for name, value in _sizes(config).items())


def compile_for(entry: Entry, target: int | str) -> Any:
    """The entry compiled for one architecture, as Triton gives it: `.asm`, `.metadata`."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"bitdelta_compile.kernels.{entry.module}")
    kernel = getattr(module, entry.kernel)
    constants = dict(entry.constants)
    if "FORM" in constants and not isinstance(target, int):
        constants["FORM"] = "plain"
    names: list[str] = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _TYPES.get(name, "i32") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED if name in names}
    nvidia = isinstance(target, int)
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=divisible),
        target=GPUTarget("cuda", target, 32) if nvidia else GPUTarget("hip", target, 64),
        options={"num_warps": entry.warps, "num_stages": entry.stages},
    )


def count(entry: Entry, target: int | str, compiled: Any) -> Record:
    """The entry's line of the ledger.

    Fields `per_weight` (thread-instructions of the hot loop per weight, on the binary path also per row of a group;
    only where there is a loop of MMAs), `under_way` (copies to shared memory that its wait leaves under way),
    `registers`, `shared` bytes, `spills` (accesses to local memory), `loop` (its commonest instructions).
    """
    record: Record = {"entry": entry.name, "target": f"sm_{target}" if isinstance(target, int) else target}
    record["shared"] = compiled.metadata.shared
    if not isinstance(target, int):
        text = compiled.asm["amdgcn"]
        record["registers"] = int(_found(r"\.vgpr_count:\s+(\d+)", text))
        record["spills"] = int(_found(r"\.vgpr_spill_count:\s+(\d+)", text))
        return record
    if "trap;" in compiled.asm["ptx"]:
        raise ValueError(f"{entry.name} needs more than {record['target']} has: Triton compiled it to a trap")
    instructions, registers = disassemble(compiled.asm["cubin"])
    record |= {"registers": registers, "spills": sum(_name(text) in ("LDL", "STL") for _, text in instructions)}
    loop = hot_loop(instructions, "BMMA" if isinstance(entry.config, configs.Binary | configs.Fused) else "MMA")
    if entry.config is not None and loop:
        record["per_weight"] = len(loop) * 32 / weights(entry, loop)
        record["loop"] = dict(collections.Counter(_name(text) for text in loop).most_common(8))
        if waits := re.findall(r"DEPBAR\.LE SB\d, (\w+)", "\n".join(loop)):
            record["under_way"] = min(int(count, 16) for count in waits)
    return record


def weights(entry: Entry, loop: list[str]) -> float:
    """Weights (binary: times rows of a group) that a warp multiplies in these instructions, however often unrolled."""
    names = collections.Counter(_name(text) for text in loop)
    if names["BMMA"]:
        return names["BMMA"] * 16 * 256 / (3 if entry.wide else 2)
    assert isinstance(entry.config, configs.Exact)
    if names["HGMMA"]:
        return names["HGMMA"] * 16 * 16
    columns = max(8, entry.constants["BM"] * {1: 1, 2: 2, 3: 4}[entry.splits])
    return names["HMMA"] * 16 * 16 * 8 / columns


def disassemble(cubin: bytes) -> tuple[list[tuple[int, str]], int]:
    """(address, text) of every instruction, and the registers of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        dump = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        text = dump([tool, "-sass", path]).stdout
        usage = dump([tool, "-res-usage", path])
    registers = max(int(found) for found in re.findall(r"REG:(\d+)", usage.stdout + usage.stderr))
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    return [(int(at, 16), text.strip()) for at, text in lines], registers


def hot_loop(instructions: list[tuple[int, str]], contains: str) -> list[str]:
    """The innermost loop with the most instructions of which the name contains `contains`; empty without one."""
    spans = []
    for at, text in instructions:
        found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if found and int(found[1], 16) < at:
            spans.append((int(found[1], 16), at))
    inner = [span for span in spans if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    loops = [[t for at, t in instructions if first <= at <= last and _name(t) != "NOP"] for first, last in inner]
    return max(loops, key=lambda loop: sum(contains in _name(text) for text in loop), default=[])


def _name(text: str) -> str:
    """`@P0 LDG.E.128 R4, ...` -> `LDG`."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern}")
    return match[1]


@case(
    "ledger",
    "instructions per weight, registers and shared memory of every GPU kernel, compiled without a GPU",
    columns=("entry", "target", "per_weight", "registers", "shared", "spills"),
)
def measure(run: Run) -> list[Record]:
    targets = {90} if run.quick else {*EXACT_TARGETS}
    pairs = [(entry, target) for entry in entries() for target in entry.targets if target in targets]
    return [count(entry, target, compile_for(entry, target)) for entry, target in pairs]
