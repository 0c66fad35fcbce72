"""Arithmetic of one thread, as steps over all of them: see `instructions`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import matrix
from .machine import Machine, Mask, Step, width
from .text import Instruction, Operand

Array = np.ndarray


def size_of(kind: str) -> int:
    """Bytes of a type."""
    return int(kind.lstrip("busf")) // 8


def extended(values: Array, kind: str, register: object) -> Array:
    """A number of `kind`, as a register holds it, which may be wider."""
    if values.dtype.kind == "f":
        return values
    if kind[0] == "s":
        values = values.view(f"i{values.dtype.itemsize}")
    return values.astype(width(str(register)).replace("u", values.dtype.kind))


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


PLAIN: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
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


# What else may stand in a name: how to round, in the one way there is here; which half of a product.
_MODES = {"lo", "wide", "hi", "rn", "ftz", "full", "approx", "NaN", "rmi", "rpi", "rzi", "rni"}


def plain(instruction: Instruction) -> Step:
    """Every operand and the result of one type, which comes last in the name."""
    name, *modes = instruction.parts
    kind = modes[-1]
    operation = PLAIN[name]
    if not _MODES.issuperset(modes[:-1]) or ("hi" in modes and name != "mul"):
        raise NotImplementedError(instruction.text)
    if "NaN" in modes:
        operation = {"min": np.minimum, "max": np.maximum}[name]
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
        return _several_floats(instruction, kind, operation)

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


def _several_floats(instruction: Instruction, kind: str, operation: Callable[..., Array]) -> Step:
    """Floats that share a register, or that numpy has no type for."""
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
    size = size_of(instruction.parts[-1])

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
    known = len(instruction.parts) == 3 or instruction.parts[2:-1] == ("ftz",)
    if not known or condition in ("lo", "ls", "hi", "hs") or "16" in kind.lstrip("bus"):
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
    if not _MODES.issuperset(modes):
        raise NotImplementedError(instruction.text)

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
                result = extended(_converted(value, to, modes), to, target)
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


ARITHMETIC: dict[str, Callable[[Instruction], Step]] = {
    **dict.fromkeys(PLAIN, plain),
    "setp": _setp,
    "selp": _selp,
    "bfe": _bfe,
    "lop3": _lop3,
    "prmt": _prmt,
    "cvt": _cvt,
}
