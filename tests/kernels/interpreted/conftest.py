"""Kernels on a CPU: see test_interpreted.py.

Either in Triton's interpreter, which has to be chosen before triton is imported. It has no inline assembly; what the
kernels use of it is emulated here, after the PTX ISA. Or compiled for a GPU, and their PTX run instruction by
instruction (benchmarks/ptx), where RUN_PTX names its compute capability.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from bitdelta_compile.kernels import layout
from bitdelta_compile.kernels.testing import Bank, random_bank

COMPILED_FOR = os.environ.get("RUN_PTX")

if os.environ.get("TRITON_INTERPRET") != "1" and COMPILED_FOR is None:
    collect_ignore_glob = ["*"]

_BINARY = re.compile(r"mma\.sync\.aligned\.m16n8k256\S*\.and\.popc " + ", ".join([r"\{([^}]*)\}"] * 4) + ";")


def _numbers(text: str) -> list[int]:
    return [int(name) for name in re.findall(r"\$(\d+)", text)]


def _binary_mma(signs: np.ndarray, planes: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Registers of all lanes, [..., 32, 4], [..., 32, 2] and [..., 32, 4], after the fragment tables of the PTX ISA."""
    a = np.zeros((*signs.shape[:-2], 16, 8), np.uint32)
    b = np.zeros((*planes.shape[:-2], 8, 8), np.uint32)
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for register in range(4):
            a[..., group + 8 * (register % 2), thread + 4 * (register // 2)] = signs[..., lane, register]
        for register in range(2):
            b[..., thread + 4 * register, group] = planes[..., lane, register]
    product = np.bitwise_count(a[..., :, :, None] & b[..., None, :, :]).sum(-2).astype(np.int32)  # [..., 16, 8]
    out = sums.copy()
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for register in range(4):
            out[..., lane, register] += product[..., group + 8 * (register // 2), 2 * thread + register % 2]
    return out


def _emulate(builder: Any, asm: str, constraints: str, values: list[Any], types: Any, pure: bool, pack: int) -> Any:
    import triton.runtime.interpreter as interpreter
    from triton import language as tl

    data = [np.ascontiguousarray(value.data) for value in values]
    if found := _BINARY.fullmatch(asm):
        assert pack == 4
        lanes = [array.reshape(*array.shape[:-1], 32, 4).view(np.uint32) for array in data]
        outputs = constraints.split(",").count("=r")
        register = {outputs + 4 * i + r: array[..., r] for i, array in enumerate(lanes) for r in range(4)}
        d, a, b, c = (_numbers(group) for group in found.groups())
        assert d == list(range(outputs))
        signs, planes, sums = (np.stack([register[name] for name in names], -1) for names in (a, b, c))
        out = _binary_mma(signs, planes, sums.view(np.int32)).reshape(data[0].shape)
        result = interpreter.TensorHandle(out, tl.int32)
    else:
        assert pack == 2
        words = [array.reshape(-1, 2).view(np.uint16).astype(np.uint32) for array in data]
        pairs = [low | high << 16 for low, high in (word.T for word in words)]
        out = _logic(asm, pairs)
        halves = np.stack([out & 0xFFFF, out >> 16], -1).astype(np.uint16).reshape(data[0].shape)
        result = interpreter.TensorHandle(halves, tl.bfloat16)

    class Results:
        def get_result(self, index: int) -> Any:
            assert index == 0
            return result

    return Results()


def _logic(asm: str, pairs: list[np.ndarray]) -> np.ndarray:
    """The few 32-bit instructions of `tile.bit_operand`, one register after the other."""
    register: dict[str, Any] = {f"${index + 1}": pair for index, pair in enumerate(pairs)}
    for statement in filter(None, (part.strip(" {}") for part in asm.split(";"))):
        name, _, operands = statement.partition(" ")
        if name == ".reg":
            continue
        target, *sources = (part.strip() for part in operands.split(","))
        a, *rest = (register[source] if source in register else np.uint32(int(source, 0)) for source in sources)
        if name == "and.b32":
            register[target] = a & rest[0]
        elif name == "shl.b32":
            register[target] = a << rest[0]
        else:
            assert name == "lop3.b32"
            b, c, table = rest
            out = np.zeros_like(a)
            for index in range(8):
                if int(table) >> index & 1:
                    chosen = [value if index >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
                    out |= chosen[0] & chosen[1] & chosen[2]
            register[target] = out
    return register["$0"]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if COMPILED_FOR is not None:
        with importlib.import_module("measured.ptx.launch").launches(int(COMPILED_FOR)):
            yield
        return
    import triton.runtime.interpreter as interpreter

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", _emulate)
    yield


@pytest.fixture
def bank() -> Callable[..., Bank]:
    """`bank(T, P, N, K)`: random stacked tensors of one parameter, canonical; slots in `poisoned` hold NaN."""

    def make(*sizes: int, poisoned: Sequence[int] = (), **options: Any) -> Bank:
        signs, *others = random_bank(*sizes, **options)
        for slot in poisoned:
            for tensor in others:
                if tensor is not None:
                    tensor[slot] = float("nan")
        return signs, *others

    return make


@pytest.fixture
def packed() -> Callable[[Bank, int], Bank]:
    """The same tensors with the signs as the kernels read them."""
    return lambda tensors, features: (layout.to_layout(tensors[0], features, layout.FRAGMENTS), *tensors[1:])
