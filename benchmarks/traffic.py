"""What every kernel of a layer executes and moves, without a GPU: its PTX run instruction by instruction.

Where the ledger counts the hot loop, this counts all that is around it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitdelta_compile.kernels import configs, layout, reference
from bitdelta_compile.kernels.configs import Plan
from bitdelta_compile.kernels.testing import random_bank
from torch import Tensor

from .registry import Record, Run, SkippedError, case, require

TARGET = 90
FREE = ("mov", "ld.param", "cvt.u64.u32", "cvt.s64.s32", "bra", "ret")  # mostly gone once registers are assigned
_Call = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def ways() -> Iterator[tuple[str, int, _Call]]:
    """Name of each way, rows per tenant, and a call on x, the base's weight, the bank's signs and scales, the index."""
    from bitdelta_compile.kernels import delta_linear, fused

    def apart(plan: Plan) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, signs: Tensor, scale: Tensor, tenant: Tensor) -> Tensor:
            return delta_linear.delta_linear(x, signs, scale, None, None, None, tenant, plan, dtype=torch.float32)

        return call

    def together(plan: Plan) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, signs: Tensor, scale: Tensor, tenant: Tensor) -> Tensor:
            return fused.base_delta_linear(x, weight, None, signs, scale, None, None, None, tenant, plan)

        return call

    binary = configs.BINARY_DECODE
    yield "binary", 1, apart(Plan(binary[0]))
    yield "binary, small grid", 1, apart(Plan(binary[1]))
    yield "binary, groups", 4, apart(Plan(binary[2]))
    yield "base and binary", 1, together(Plan(configs.FUSED_DECODE[0]))
    yield "exact", 1, apart(Plan(configs.EXACT_DECODE[0]))
    yield "prefill", 64, apart(Plan(configs.PREFILL_SM90[0], sorted=True))


@case(
    "traffic",
    "instructions, barriers, bank conflicts and bytes of the GPU kernels of a layer, their PTX run without a GPU",
    columns=("way", "kernel", "blocks", "per_thread", "per_weight", "barriers", "conflicts", "signs_moved", "moved_mb"),
)
def measure(run: Run) -> Iterator[Record]:
    try:
        from .ptx import launch
    except ImportError as missing:
        raise SkippedError(f"skipped: {missing}") from missing
    outputs, features, tenants = (256, 512, 2) if run.quick else (1024, 4096, 4)
    signs, scale, *_ = random_bank(tenants, 1, outputs, features)
    packed = layout.to_layout(signs, features, layout.FRAGMENTS)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, features, generator=generator).bfloat16()
    for way, each, call in ways():
        index = torch.arange(tenants).repeat_interleave(each).int()
        x = torch.randn(len(index), features, generator=generator).bfloat16()
        found: list[Record] = []

        def watch(compiled: Any, machines: list[Any], found: list[Record] = found) -> None:
            found.append(_counted(compiled, machines[0], packed))

        with launch.launches(TARGET, watch=watch):
            y = call(x, weight, packed, scale, index)
        expected = reference.delta_linear(x, signs, scale, None, None, None, index)
        if way == "base and binary":
            expected = expected + x.double() @ weight.double().T
        error = float((y.double() - expected).norm() / expected.norm())
        require(error < 5e-3, f"{way} is off by {error:.2g}")
        for record in found:
            record["per_weight"] = record["instructions"] / (outputs * features * len(index))
            yield {"way": way, "outputs": outputs, "features": features, "rows": len(index), **record}


def _counted(compiled: Any, machine: Any, signs: Tensor) -> Record:
    """One launch: thread-instructions in all and of a thread, barriers of a block, passes of shared memory lost to bank
    conflicts, how often the signs were moved, and 32-byte sectors moved in all."""
    instructions = zip(machine.program.instructions, machine.executed, strict=True)
    counted = [(".".join(each.parts), count) for each, count in instructions]
    executed = sum(count for name, count in counted if not name.startswith(FREE))
    moved = machine.memory.sectors
    return {
        "kernel": compiled.metadata.name,
        "blocks": machine.count // machine.threads,
        "instructions": executed,
        "per_thread": executed / machine.count,
        "barriers": sum(count for name, count in counted if name == "bar.sync") / machine.count,
        "conflicts": machine.shared.conflicts,
        "signs_moved": moved.get(signs.untyped_storage().data_ptr(), 0) * 32 / signs.nbytes,
        "moved_mb": sum(moved.values()) * 32 / 1e6,
    }
