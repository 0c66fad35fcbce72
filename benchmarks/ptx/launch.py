"""Triton's launches, on tensors in host memory: compiled for a GPU as there, and run by the PTX machine."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .machine import Machine
from .memory import GlobalMemory, SharedMemory
from .text import parse

Watch = Callable[[Any, list[Machine]], None]


class _Driver:
    """What Triton asks before it launches."""

    def __init__(self, target: int) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._target, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches(target: int, together: int | None = None, watch: Watch | None = None) -> Iterator[None]:
    """Launches of Triton's kernels run here, compiled for sm_`target`.

    Args:
        together: see `execute`.
        watch: called after each, with traffic counted: the compiled kernel, and the machines.
    """
    run_on_gpu = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run_on_gpu(self, *args, grid=grid, warmup=True, **kwargs)
        bound = dict(zip(self.arg_names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in self.arg_names}
        if not warmup:
            sizes = grid(bound) if callable(grid) else grid
            arguments = [bound[name] for name in self.arg_names]
            machines = execute(compiled, arguments, sizes, together=together, count=watch is not None)
            if watch is not None:
                watch(compiled, machines)
        return compiled

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(target))
    try:
        with mock.patch.object(triton.JITFunction, "run", run):
            yield
    finally:
        triton.runtime.driver._active = before


def execute(
    compiled: Any, arguments: Sequence[Any], grid: Sequence[int], *, together: int | None = None, count: bool = False
) -> list[Machine]:
    """Run a compiled kernel over a grid.

    Args:
        compiled: Triton's compiled kernel.
        arguments: every argument of the function, constants included.
        grid: one to three sizes.
        together: how many blocks run at once, from the last of the grid on; None: all.
        count: traffic too.
    """
    program = parse(compiled.asm["ptx"])
    constants = {place[0] for place in compiled.src.constants}
    given = [value for place, value in enumerate(arguments) if place not in constants]
    tensors = [value for value in given if isinstance(value, Tensor)]
    bits = [_bits(value) for value in given]
    bits += [0] * (len(program.parameters) - len(bits))  # Triton's scratch memory, which none of these kernels has
    sizes: Any = (*map(int, grid), 1, 1)[:3]
    blocks = np.stack(np.meshgrid(*(np.arange(size) for size in sizes), indexing="ij"), -1)
    blocks = blocks.transpose(2, 1, 0, 3).reshape(-1, 3)[::-1]  # x runs fastest
    memory = GlobalMemory(tensors, count)
    size = -(-compiled.metadata.shared // 16) * 16 or 16
    machines = []
    for at in range(0, len(blocks), together or len(blocks)):
        part = blocks[at : at + together] if together else blocks
        shared = SharedMemory(size, len(part), len(part) * program.threads, count)
        machines.append(Machine(program, bits, sizes, part, memory, shared))
        machines[-1].run()
    return machines


def _bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value)
