"""What each PTX instruction does; of the instruction set, what Triton makes of this project's kernels.

A step is a function of the machine and of the threads that execute. Sizes and rounding are those of the PTX ISA, but
that `div.full` and the approximate functions are exact to rounding, and matrix products as `matrix` says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import matrix
from .machine import Machine, Mask, Step, width
from .memory import Fault
from .text import Instruction, Operand

Array = np.ndarray


def step(instruction: Instruction) -> Step:
    """The instruction as a step.

    Raises:
        NotImplementedError: it is not known here; only when it is executed.
    """
    name = instruction.parts[0]
    known = _SPECIAL.get(name)
    if known is not None:
        return known(instruction)
    if name in _PLAIN:
        return _plain(instruction)

    def unknown(machine: Machine, mask: Mask) -> None:
        raise NotImplementedError(f"the PTX machine does not know {instruction.text}")

    return unknown


def _saturated_shift(a: Array, b: Array, operation: Callable[[Array, Array], Array]) -> Array:
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":  # to the right: the sign fills
        return operation(a, np.minimum(b, bits - 1).astype(a.dtype))
    inside = b < bits
    return np.where(inside, operation(a, np.where(inside, b, 0).astype(a.dtype)), np.zeros((), a.dtype))


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    wide_a, wide_b = a.astype(np.int64), np.where(b == 0, 1, b).astype(np.int64)
    quotient = np.abs(wide_a) // np.abs(wide_b) * np.sign(wide_a) * np.sign(wide_b)
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divide(a, b) * b).astype(a.dtype)


def _fused(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _times(a: Array, b: Array) -> Array:
    return np.multiply(a, b)


_PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": _times,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fused,
    "div": _divide,
    "rem": _remainder,
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "abs": np.abs,
    "neg": np.negative,
    "not": np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": lambda a, b: _saturated_shift(a, b, np.left_shift),
    "shr": lambda a, b: _saturated_shift(a, b, np.right_shift),
    "mov": lambda a: a,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "sqrt": np.sqrt,
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32),
    "rcp": lambda a: (1 / a.astype(np.float64)).astype(np.float32),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
}


def _plain(instruction: Instruction) -> Step:
    """Every operand and the result of one type, which comes last in the name."""
    name, *modes = instruction.parts
    kind = modes[-1]
    operation = _PLAIN[name]
    target, *sources = instruction.operands
    if name == "mov" and any(isinstance(each, tuple) for each in instruction.operands):
        return _moved(instruction)
    kinds = [kind] * len(sources)
    if name in ("shl", "shr"):
        kinds[1] = "u32"
    widened = "wide" in modes
    wide = {"s16": "i4", "u16": "u4", "s32": "i8", "u32": "u8"}[kind] if widened else ""
    if widened and name == "mad":
        kinds[2] = {"s32": "s64", "u32": "u64", "s16": "s32", "u16": "u32"}[kind]
    high = "hi" in modes
    if kind in ("bf16", "bf16x2", "f16x2", "f32x2"):
        return _several_floats(instruction, kind)

    def run(machine: Machine, mask: Mask) -> None:
        values = [machine.read(source, each) for source, each in zip(sources, kinds, strict=True)]
        if widened:
            values = [value.astype(wide) for value in values]
        if high:
            product = values[0].astype(object) * values[1].astype(object) >> 8 * values[0].dtype.itemsize
            machine.write(target, np.array(product, values[0].dtype), mask)
            return
        with np.errstate(all="ignore"):
            machine.write(target, np.asarray(operation(*values)), mask)

    return run


def _several_floats(instruction: Instruction, kind: str) -> Step:
    """Floats that share a register, or that numpy has no type for."""
    operation = _PLAIN[instruction.parts[0]]
    target, *sources = instruction.operands
    if instruction.parts[0] not in ("add", "sub", "mul", "fma", "min", "max", "abs", "neg"):
        raise NotImplementedError(instruction.text)
    part = kind.removesuffix("x2")

    def run(machine: Machine, mask: Mask) -> None:
        values = [np.array(np.broadcast_to(machine.read(source, kind), machine.count)) for source in sources]
        words = [value[:, None].view(_FLOATS[part]) for value in values]
        with np.errstate(all="ignore"):
            if part == "bf16":
                words = [matrix.to_float(word) for word in words]
            found = operation(*words)
            if part == "bf16":
                found = matrix.from_float(found)
        machine.write(target, np.ascontiguousarray(found).view(values[0].dtype).ravel(), mask)

    return run


_FLOATS = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}


def _moved(instruction: Instruction) -> Step:
    """Registers into one of their common size, or out of it: the first holds the lowest bits."""
    target, source = instruction.operands
    size = _size(instruction.parts[-1])

    def run(machine: Machine, mask: Mask) -> None:
        if isinstance(source, tuple):
            kind = f"b{8 * size // len(source)}"
            parts = [np.broadcast_to(machine.read(each, kind), machine.count) for each in source]
            machine.write(target, np.stack(parts, -1).view(f"u{size}").ravel(), mask)
            return
        assert isinstance(target, tuple)
        whole = np.array(np.broadcast_to(machine.read(source, f"b{8 * size}"), machine.count))
        pieces = whole[:, None].view(f"u{size // len(target)}")
        for place, register in enumerate(target):
            machine.write(register, pieces[:, place].copy(), mask)

    return run


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _setp(instruction: Instruction) -> Step:
    condition, kind = instruction.parts[1], instruction.parts[-1]
    if len(instruction.parts) not in (3, 4) or condition in ("lo", "ls", "hi", "hs"):
        raise NotImplementedError(instruction.text)
    target, first, second = instruction.operands

    def run(machine: Machine, mask: Mask) -> None:
        a, b = machine.read(first, kind), machine.read(second, kind)
        if kind[0] != "f":
            result = _ORDERED[condition](a, b)
        else:
            unordered = np.isnan(a) | np.isnan(b)
            if condition in ("num", "nan"):
                result = unordered == (condition == "nan")
            elif condition in _ORDERED:
                result = _ORDERED[condition](a, b) & ~unordered
            else:
                result = _ORDERED[condition[:-1]](a, b) | unordered
        machine.write(target, np.asarray(result), mask)

    return run


def _selp(instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    target, first, second, chosen = instruction.operands

    def run(machine: Machine, mask: Mask) -> None:
        values = machine.read(first, kind), machine.read(second, kind)
        machine.write(target, np.where(machine.read(chosen, "pred"), *values), mask)

    return run


def _bfe(instruction: Instruction) -> Step:
    kind = instruction.parts[-1]
    target, source, start, length = instruction.operands
    if kind not in ("u32", "s32") or not isinstance(start, int) or not isinstance(length, int):
        raise NotImplementedError(instruction.text)
    left = np.uint32(32 - start - length)

    def run(machine: Machine, mask: Mask) -> None:
        upper = (machine.read(source, "b32") << left).view(np.dtype("i4" if kind == "s32" else "u4"))
        machine.write(target, upper >> (32 - length), mask)

    return run


def _lop3(instruction: Instruction) -> Step:
    target, *sources, table = instruction.operands
    assert isinstance(table, int)

    def run(machine: Machine, mask: Mask) -> None:
        a, b, c = (machine.read(source, "b32") for source in sources)
        out = np.zeros(machine.count, np.uint32)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        machine.write(target, out, mask)

    return run


def _prmt(instruction: Instruction) -> Step:
    target, first, second, selector = instruction.operands
    if instruction.parts != ("prmt", "b32"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Mask) -> None:
        a, b, chosen = (machine.read(each, "b32") for each in (first, second, selector))
        both = np.broadcast_to(a, machine.count).astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        out = np.zeros(machine.count, np.uint32)
        for byte in range(4):
            pick = chosen >> np.uint32(4 * byte)
            value = both >> (8 * (pick & 7)).astype(np.uint64) & np.uint64(0xFF)
            value = np.where(pick & 8, np.where(value & np.uint64(0x80), 0xFF, 0), value)
            out |= value.astype(np.uint32) << np.uint32(8 * byte)
        machine.write(target, out, mask)

    return run


def _cvt(instruction: Instruction) -> Step:
    *modes, to, of = instruction.parts[1:]
    target, *sources = instruction.operands

    def number(machine: Machine, source: Operand) -> Array:
        if of in ("s8", "u8"):  # the lower half of a register of 16 bits
            return machine.read(source, "b16").astype({"s8": np.int8, "u8": np.uint8}[of])
        values = machine.read(source, of)
        return matrix.to_float(values) if of == "bf16" else values

    def run(machine: Machine, mask: Mask) -> None:
        values = [number(machine, source) for source in sources]
        with np.errstate(all="ignore"):
            if to.endswith("x2"):  # the first goes up
                upper, lower = (
                    matrix.from_float(value) if to == "bf16x2" else value.astype(np.float16).view(np.uint16)
                    for value in values
                )
                result = upper.astype(np.uint32) << np.uint32(16) | lower
            else:
                (value,) = values
                result = _extended(_converted(value, to, modes), to, target)
        machine.write(target, np.asarray(result), mask)

    return run


def _converted(value: Array, to: str, modes: list[str]) -> Array:
    if value.dtype.kind == "f":
        for mode, rounded in (("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc), ("rni", np.rint)):
            if mode in modes:
                value = rounded(value)
    if to == "bf16":
        return matrix.from_float(value)
    dtype = np.dtype({"f": "f", "s": "i", "u": "u", "b": "u"}[to[0]] + str(int(to[1:]) // 8))
    if value.dtype.kind == "f" and dtype.kind != "f":
        limits = np.iinfo(dtype)
        inside = np.clip(np.where(np.isnan(value), 0, value).astype(np.float64), float(limits.min), float(limits.max))
        return inside.astype(dtype)
    return value.astype(dtype)


def _vector(operand: object) -> tuple:  # type: ignore[type-arg]
    return operand if isinstance(operand, tuple) else (operand,)


def _size(kind: str) -> int:
    return int(kind.lstrip("busf")) // 8


def _load(instruction: Instruction) -> Step:
    space, kind = instruction.parts[1], instruction.parts[-1]
    size = _size(kind)
    target, source, *_ = instruction.operands  # a third is a hint to the caches
    registers = _vector(target)
    if space == "param":

        def of_argument(machine: Machine, mask: Mask) -> None:
            value = machine.arguments[source.base]  # type: ignore[union-attr]
            machine.write(target, _extended(value, kind, target), mask)

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
            machine.write(register, _extended(whole, kind, register), mask)

    return run


def _extended(values: Array, kind: str, register: object) -> Array:
    """A number of `kind`, as a register holds it, which may be wider."""
    if values.dtype.kind == "f":
        return values
    if kind[0] == "s":
        values = values.view(f"i{values.dtype.itemsize}")
    return values.astype(width(str(register)).replace("u", values.dtype.kind))


def _store(instruction: Instruction) -> Step:
    space, kind = instruction.parts[1], instruction.parts[-1]
    target, source, *_ = instruction.operands
    kind = f"b{_size(kind) * 8}"
    if space not in ("global", "shared"):
        raise NotImplementedError(instruction.text)

    def run(machine: Machine, mask: Mask) -> None:
        threads = machine.active(mask)
        columns = [np.broadcast_to(machine.read(each, kind), machine.count)[threads] for each in _vector(source)]
        values = np.stack(columns, -1)
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
    if mode in ("wait_group", "wait_all"):
        (left,) = instruction.operands or (0,)
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
    if instruction.parts[1] == "warp":
        return lambda machine, mask: None
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
            machine.shared.reads.wait(machine.active(mask), left)

        return wait
    if mode != "mma_async":  # a fence
        return lambda machine, mask: None
    target, a, b, adds, *scales = instruction.operands
    columns = int(instruction.parts[4].partition("n")[2].partition("k")[0])
    if any(scales[2:]) or instruction.parts[5:] != ("f32", "bf16", "bf16"):
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


_SPECIAL: dict[str, Callable[[Instruction], Step]] = {
    "setp": _setp, "selp": _selp, "bfe": _bfe, "lop3": _lop3, "prmt": _prmt, "cvt": _cvt, "ld": _load, "st": _store,
    "atom": _atom, "cp": _copy, "bar": _bar, "barrier": _bar, "shfl": _shfl, "redux": _redux, "mma": _mma,
    "wgmma": _wgmma, "ldmatrix": _matrices, "stmatrix": _matrices, "fence": _nothing,
    "createpolicy": _nothing,
}  # fmt: skip
