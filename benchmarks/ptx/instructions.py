"""What each PTX instruction does; of the instruction set, what Triton makes of this project's kernels.

A step is a function of the machine and of the threads that execute. Sizes, signs and special values are those of the
PTX ISA. Not so: subnormals are kept where `.ftz` would drop them, `div.full` and the approximate functions are exact to
rounding, `fma` of fp32 rounds in fp64 first, and matrix products are as `matrix` says. What an instruction could do
besides is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import matrix
from .arithmetic import ARITHMETIC, extended, size_of
from .machine import Machine, Mask, Step, width
from .memory import Fault
from .text import Instruction

Array = np.ndarray


def step(instruction: Instruction) -> Step:
    """The instruction as a step; of one that is not known, a step that raises NotImplementedError."""
    try:
        return _STEPS[instruction.parts[0]](instruction)
    except (NotImplementedError, LookupError, ValueError, AssertionError, OverflowError, StopIteration):

        def unknown(machine: Machine, mask: Mask) -> None:
            raise NotImplementedError(f"the PTX machine does not know {instruction.text}")

        return unknown


def _vector(operand: object) -> tuple:  # type: ignore[type-arg]
    return operand if isinstance(operand, tuple) else (operand,)


def _load(instruction: Instruction) -> Step:
    space, kind = instruction.parts[1], instruction.parts[-1]
    size = size_of(kind)
    target, source, *_ = instruction.operands  # a third is a hint to the caches
    registers = _vector(target)
    if space == "param":

        def of_argument(machine: Machine, mask: Mask) -> None:
            value = machine.arguments[source.base]  # type: ignore[union-attr]
            machine.write(target, extended(value, kind, target), mask)

        return of_argument
    if space not in ("global", "shared"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        if space == "global":
            found = machine.memory.load(machine.address(source, mask), threads, size, len(registers))
        else:
            found = machine.shared.load(machine.place(source, mask), threads, size, len(registers))
        for place, register in enumerate(registers):
            whole = np.zeros(machine.count, found.dtype)
            whole[threads] = found[:, place]
            machine.write(register, extended(whole, kind, register), mask)

    return run


def _held(operand: object, bits: int) -> str:
    """The type of all that a register holds; of a constant, of so many bits."""
    return f"b{8 * int(width(operand)[1:])}" if isinstance(operand, str) else f"b{bits}"


def _store(instruction: Instruction) -> Step:
    space, kind = instruction.parts[1], instruction.parts[-1]
    target, source, *_ = instruction.operands
    bits = 8 * size_of(kind)
    parts = [(each, _held(each, bits)) for each in _vector(source)]  # registers may be wider than what is stored
    if space not in ("global", "shared"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        columns = [np.broadcast_to(machine.read(*part), machine.count)[threads] for part in parts]
        values = np.stack(columns, -1).astype(f"u{bits // 8}")
        if space == "global":
            machine.memory.store(machine.address(target, mask), threads, values)
        else:
            machine.shared.store(machine.place(target, mask), threads, values)

    return run


def _atom(instruction: Instruction) -> Step:
    if instruction.parts[1] != "global" or instruction.parts[-2:] != ("add", "u32"):
        raise NotImplementedError(instruction.text)
    target, place, value = instruction.operands

    def run(machine: Machine, mask: Mask) -> None:
        threads, addresses = machine.active(mask), machine.address(place, mask)
        more = np.broadcast_to(machine.read(value, "b32"), machine.count)
        before = np.zeros(machine.count, np.uint32)
        for thread, address in zip(threads, addresses, strict=True):
            before[thread] = machine.memory.add(int(address), int(more[thread]))
        machine.write(target, before, mask)

    return run


def _copy(instruction: Instruction) -> Step:
    mode = instruction.parts[2]
    if mode == "commit_group":
        return lambda machine, mask: machine.shared.copies.commit(machine.active(mask))
    if mode == "wait_group":
        (left,) = instruction.operands
        assert isinstance(left, int)
        return lambda machine, mask: machine.shared.wait_for_copies(machine.active(mask), left)
    target, source, width, *some = instruction.operands
    assert isinstance(width, int)

    def run(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        given = machine.read(some[0], "b32") if some else np.array(width)
        given = np.broadcast_to(given, machine.count)[threads]
        data = np.zeros((len(threads), width), np.uint8)
        there = given > 0
        if not np.isin(given, (0, width)).all():
            raise NotImplementedError(instruction.text)
        if there.any():
            found = machine.memory.load(machine.address(source, mask)[there], threads[there], 4, width // 4)
            data[there] = found.view(np.uint8)
        machine.shared.copy_later(machine.place(target, mask), threads, data)

    return run


def _bar(instruction: Instruction) -> Step:
    if instruction.parts == ("bar", "warp", "sync"):
        return lambda machine, mask: None
    if instruction.parts != ("bar", "sync") or instruction.operands != (0,):
        raise NotImplementedError(instruction.text)
    return lambda machine, mask: machine.barrier(mask)


def _shfl(instruction: Instruction) -> Step:
    mode = instruction.parts[2]
    target, source, distance, clamp, _ = instruction.operands
    assert isinstance(target, str)
    result, _, found = target.partition("|")

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.warps(mask)
        lane = np.arange(32)
        values = machine.lanes(source, warps)
        by, control = machine.lanes(distance, warps).astype(np.int64) & 31, machine.lanes(clamp, warps).astype(np.int64)
        segment, limit = control >> 8 & 31, control & 31
        most, least = lane & segment | limit & ~segment, lane & segment
        if mode == "up":
            of = lane - by
            there = of >= most
        else:
            of = {"down": lane + by, "bfly": lane ^ by, "idx": least | by & ~segment}[mode]
            there = of <= most
        of = np.where(there, of, lane)
        machine.write_lanes((result,), np.take_along_axis(values, of, 1)[..., None], warps)
        if found:
            machine.write_lanes((found,), there[..., None], warps)

    return run


def _redux(instruction: Instruction) -> Step:
    operation, kind = instruction.parts[2:]
    target, source, _ = instruction.operands
    reduce: Any = {"add": np.sum, "min": np.min, "max": np.max}[operation]

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.warps(mask)
        values = machine.lanes(source, warps, kind)
        found = reduce(values, axis=1, keepdims=True).astype(values.dtype)
        machine.write_lanes((target,), np.broadcast_to(found, values.shape)[..., None], warps)

    return run


def _mma(instruction: Instruction) -> Step:
    shape = instruction.parts[3]
    target, a, b, c = instruction.operands
    kind = instruction.parts[7]

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.warps(mask)
        left, right, sums = (machine.lanes(each, warps) for each in (a, b, c))
        if shape == "m16n8k256":
            if instruction.parts[-2:] != ("and", "popc"):
                raise NotImplementedError(instruction.text)
            found = matrix.multiply_bits(left, right, sums)
        elif shape == "m16n8k16" and kind in ("bf16", "f16") and instruction.parts[6] == "f32":
            product = matrix.multiply(
                matrix.operand_a(left, kind),
                matrix.operand_b(right, kind),
                matrix.accumulator(sums.view(np.float32)),
            )
            found = matrix.from_accumulator(product).view(np.uint32)
        else:
            raise NotImplementedError(instruction.text)
        machine.write_lanes(target, found, warps)

    return run


def _wgmma(instruction: Instruction) -> Step:
    mode = instruction.parts[1]
    if mode == "commit_group":
        return lambda machine, mask: machine.shared.reads.commit(machine.active(mask))
    if mode == "wait_group":
        (left,) = instruction.operands
        assert isinstance(left, int)

        def wait(machine: Machine, mask: Mask) -> None:
            machine.shared.wait_for_reads(machine.active(mask), left)

        return wait
    if mode == "fence":
        return _nothing(instruction)
    target, a, b, adds, *scales = instruction.operands
    columns = int(instruction.parts[4].partition("n")[2].partition("k")[0])
    if scales[:2] != [1, 1] or any(scales[2:]) or instruction.parts[5:] != ("f32", "bf16", "bf16"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.warps(mask)
        groups = warps.reshape(-1, 4)
        if (groups[:, 0] % 4).any():
            raise Fault("the four warps of a matrix instruction are not together")
        if isinstance(a, tuple):
            left = matrix.operand_a(machine.lanes(a, warps), "bf16").reshape(-1, 64, 16)
        else:
            left = _described(machine, a, groups, 64)
        right = _described(machine, b, groups, columns).transpose(0, 2, 1)
        sums = matrix.accumulator(machine.lanes(target, warps).view(np.float32)).reshape(-1, 64, columns)
        kept = machine.lanes(adds, groups[:, 0], "pred")[:, :1, None]
        product = matrix.multiply(left, right, np.where(kept, sums, 0))
        found = matrix.from_accumulator(product.reshape(-1, 16, columns))
        machine.write_lanes(target, np.ascontiguousarray(found).view(np.uint32), warps)

    return run


def _described(machine: Machine, descriptor: object, groups: Array, rows: int) -> Array:
    """An operand in shared memory, for each group of four warps: fp64 [groups, rows, 16]."""
    per_block = machine.threads // 32
    found = []
    for group in groups:
        values = np.unique(machine.lanes(descriptor, group, "b64"))  # type: ignore[arg-type]
        if len(values) > 1:
            raise Fault("lanes do not agree where an operand in shared memory is")
        places = matrix.described(int(values[0]), rows).reshape(-1, 16)[:, 0]
        places = group[0] // per_block * machine.shared.size + places
        threads = np.full(len(places), group[0] * 32)
        data = machine.shared.read_until_waited_for(places, threads, 16)
        found.append(matrix.to_float(np.ascontiguousarray(data).view(np.uint16)).reshape(rows, 16))
    return np.stack(found).astype(np.float64)


def _matrices(instruction: Instruction) -> Step:
    name, parts = instruction.parts[0], instruction.parts
    if "m8n8" not in parts or "b16" not in parts:
        raise NotImplementedError(instruction.text)
    turned, count = "trans" in parts, int(next(part for part in parts if part in ("x1", "x2", "x4"))[1:])
    registers, address = instruction.operands if name == "ldmatrix" else reversed(instruction.operands)

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.warps(mask)
        places = machine.place(address, mask).reshape(len(warps), 32)[:, : 8 * count].ravel()
        threads = np.repeat(warps * 32, 8 * count) + np.tile(np.arange(8 * count), len(warps))
        if name == "ldmatrix":
            rows = np.ascontiguousarray(machine.shared.load(places, threads, 2, 8)).reshape(len(warps), count, 8, 8)
            machine.write_lanes(registers, matrix.from_rows(rows, turned), warps)
        else:
            rows = matrix.to_rows(machine.lanes(registers, warps), turned)
            machine.shared.store(places, threads, np.ascontiguousarray(rows).reshape(-1, 8))

    return run


def _nothing(instruction: Instruction) -> Step:
    return lambda machine, mask: None


_STEPS: dict[str, Callable[[Instruction], Step]] = {
    **ARITHMETIC, "ld": _load, "st": _store,
    "atom": _atom, "cp": _copy, "bar": _bar, "shfl": _shfl, "redux": _redux, "mma": _mma,
    "wgmma": _wgmma, "ldmatrix": _matrices, "stmatrix": _matrices, "fence": _nothing,
    "createpolicy": _nothing,
}  # fmt: skip
