"""A GPU's threads, on a CPU: runs a kernel's PTX for all blocks of a grid at once, an instruction at a time.

Registers are arrays over all threads. Threads that branch apart wait for each other: those that are furthest behind
go on. What could show in shared memory when warps run in another order is looked for in `memory`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .memory import Fault, GlobalMemory, SharedMemory
from .text import Address, Instruction, Operand, Program

Array = np.ndarray
Mask = Array | None  # which threads execute; None: all
_KINDS: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "bf16": np.dtype("u2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "f16x2": np.dtype("u4"),
    "bf16x2": np.dtype("u4"),
    "f32x2": np.dtype("u8"),
}


class Machine:
    """Blocks of one launch.

    Attributes:
        threads, count: of a block, and of all blocks.
        registers: by name, unsigned arrays or arrays of bool over all threads.
        memory, shared: what they reach.
        executed: for each of the program's instructions, how many threads executed it.
    """

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int],
        grid: tuple[int, int, int],
        blocks: Array,
        memory: GlobalMemory,
        shared: SharedMemory,
    ) -> None:
        """
        Args:
            arguments: the bits of each parameter.
            blocks: int [B, 3], which of the grid's blocks run.
        """
        self.program, self.memory, self.shared = program, memory, shared
        self.arguments = {
            name: np.array(value % (1 << 8 * size), f"u{size}")
            for (name, size), value in zip(program.parameters, arguments, strict=True)
        }
        self.threads, self.count = program.threads, program.threads * len(blocks)
        self.index = np.arange(self.count)
        self.block = self.index // self.threads
        self.executed = [0] * len(program.instructions)
        self.registers: dict[str, Array] = {}
        self._left = np.zeros(self.count, bool)
        thread = (self.index % self.threads).astype(np.uint32)
        for place, axis in enumerate("xyz"):
            self.registers[f"%tid.{axis}"] = thread if axis == "x" else np.zeros_like(thread)
            self.registers[f"%ntid.{axis}"] = np.full_like(thread, self.threads if axis == "x" else 1)
            self.registers[f"%ctaid.{axis}"] = blocks[self.block, place].astype(np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full_like(thread, grid[place])
        self.registers["%laneid"], self.registers["%warpid"] = thread % np.uint32(32), thread // np.uint32(32)
        self.registers["global_smem"] = np.zeros_like(thread)

    def run(self) -> None:
        """Until all threads have returned.

        Raises:
            Fault: see `memory`; the message ends with the instruction.
            NotImplementedError: an instruction that is not known here.
        """
        steps = _steps(self.program)
        waiting: dict[int, Mask] = {0: None}
        while waiting:
            place = min(waiting)
            mask = waiting.pop(place)
            after = min(waiting, default=len(steps))
            while True:
                instruction, step = steps[place]
                try:
                    if instruction.parts[0] in ("bra", "ret", "exit"):
                        self._branch(place, mask, instruction, waiting)
                        break
                    chosen = self._guarded(instruction, mask)
                    if chosen is None or chosen.any():
                        step(self, chosen)
                        self.executed[place] += self.count if chosen is None else int(chosen.sum())
                except (Fault, KeyError, ValueError, AssertionError) as error:
                    raise Fault(f"{error}: {instruction.text} ({instruction.source})") from error
                place += 1
                if place >= after:
                    waiting[place] = _either(mask, waiting.get(place), place in waiting)
                    break

    def _guarded(self, instruction: Instruction, mask: Mask) -> Mask:
        if instruction.guard is None:
            return mask
        chosen = self.read(instruction.guard, "pred") == instruction.wanted
        if mask is not None:
            chosen = chosen & mask
        return None if chosen.all() else chosen

    def _branch(self, place: int, mask: Mask, instruction: Instruction, waiting: dict[int, Mask]) -> None:
        here = np.ones(self.count, bool) if mask is None else mask
        taken = self._guarded(instruction, mask)
        taken = here if taken is None else taken
        if instruction.parts[0] == "bra":
            (label,) = instruction.operands
            assert isinstance(label, str)
            self._wait(waiting, self.program.labels[label], taken)
        else:
            self._left |= taken
        self._wait(waiting, place + 1, here & ~taken)

    def _wait(self, waiting: dict[int, Mask], place: int, mask: Array) -> None:
        if mask.any():
            waiting[place] = _either(None if mask.all() else mask, waiting.get(place), place in waiting)

    def read(self, operand: Operand, kind: str) -> Array:
        """An operand's values as `kind`, over all threads or a single one for a constant."""
        dtype = _KINDS[kind]
        if isinstance(operand, int):
            if kind == "pred":
                return np.array(operand != 0)
            return np.array(operand % (1 << 8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)
        assert isinstance(operand, str)
        found = self.registers.get(operand)
        if found is None and not re.fullmatch(r"%(?:p|r|rs|rd)\d+|\w+", operand):
            raise NotImplementedError(f"the PTX machine does not know {operand}")
        if found is None:  # whatever it holds cannot matter; ones are no number and no address
            found = self.registers[operand] = np.full(self.count, -1).astype(width(operand))
        if found.dtype.itemsize != dtype.itemsize:
            raise Fault(f"{operand} is no {kind}")
        return found if found.dtype == dtype else found.view(dtype)

    def write(self, operand: Operand, values: Array, mask: Mask) -> None:
        """Into a register, for the threads of `mask`; `values` are never changed later."""
        assert isinstance(operand, str)
        if operand == "_":
            return
        if values.dtype.kind != "b":
            values = values.view(f"u{values.dtype.itemsize}")
        if values.shape != (self.count,):
            values = np.full(self.count, values)
        if mask is not None:
            before = self.registers.get(operand)
            values = np.where(mask, values, np.full((), -1).astype(values.dtype) if before is None else before)
        self.registers[operand] = values

    def active(self, mask: Mask) -> Array:
        """Threads that execute, in order."""
        return self.index if mask is None else np.flatnonzero(mask)

    def warps(self, mask: Mask) -> Array:
        """Warps that execute.

        Raises:
            Fault: some of a warp's threads do and others do not.
        """
        if mask is None:
            return np.arange(self.count // 32)
        together = mask.reshape(-1, 32)
        if (together.any(1) != together.all(1)).any():
            raise Fault("a warp's threads are not together at an instruction that all of them take part in")
        return np.flatnonzero(together[:, 0])

    def lanes(self, operand: Operand, warps: Array, kind: str = "b32") -> Array:
        """Registers of some warps: [warps, 32], of a vector of them [warps, 32, registers]."""
        if isinstance(operand, tuple):
            return np.stack([self.lanes(each, warps, kind) for each in operand], -1)
        values = np.broadcast_to(self.read(operand, kind), (self.count,))
        return values.reshape(-1, 32)[warps]

    def write_lanes(self, operand: Operand, values: Array, warps: Array) -> None:
        """Registers [warps, 32, registers] of some warps."""
        assert isinstance(operand, tuple)
        mask: Mask = None
        if len(warps) * 32 != self.count:
            mask = np.isin(self.index // 32, warps)
        for place, register in enumerate(operand):
            whole = np.zeros((self.count // 32, 32), values.dtype)
            whole[warps] = values[..., place]
            self.write(register, whole.ravel(), mask)

    def barrier(self, mask: Mask) -> None:
        """All threads of a block that have not returned meet.

        Raises:
            Fault: some are elsewhere.
        """
        if mask is None:
            self.shared.barrier(None)
            return
        here = mask.reshape(-1, self.threads)
        blocks = np.flatnonzero(here.any(1))
        if not (here | self._left.reshape(-1, self.threads))[blocks].all():
            raise Fault("a barrier is reached by some of a block's threads only")
        self.shared.barrier(blocks)

    def address(self, operand: Operand, mask: Mask) -> Array:
        """Global addresses of the threads that execute, uint64."""
        assert isinstance(operand, Address)
        return self.read(operand.base, "b64")[self.active(mask)] + np.uint64(operand.offset % (1 << 64))

    def place(self, operand: Operand, mask: Mask) -> Array:
        """Places in the shared memory of all blocks, int64."""
        assert isinstance(operand, Address)
        threads = self.active(mask)
        offset = self.read(operand.base, "s32")[threads].astype(np.int64) + operand.offset
        if len(offset) and not 0 <= int(offset.min()) <= int(offset.max()) < self.shared.size:
            raise Fault("a place is outside of the block's shared memory")
        return self.block[threads] * self.shared.size + offset


def width(register: str) -> str:
    """The unsigned type of what a register holds, by its name."""
    if register.startswith("%p"):
        return "?"
    return {"%rd": "u8", "%rs": "u2"}.get(register[:3], "u4")


def _either(one: Mask, other: Mask, there: bool) -> Mask:
    """Threads in one of two masks, the second of which may not be there."""
    if not there:
        return one
    if one is None or other is None:
        return None
    both = one | other
    return None if both.all() else both


Step = Callable[[Machine, Mask], None]


@functools.cache
def _steps(program: Program) -> list[tuple[Instruction, Step]]:
    from .instructions import step

    return [(each, step(each)) for each in program.instructions]
