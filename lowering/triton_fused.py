"""`bitdelta::base_delta_linear` on a GPU: base and delta in one launch, where that is faster than one after the other.

Under max-autotune both ways are timed on the device: the fused kernel with every entry of its list, and the library's
product followed by the delta's kernel with every entry of its own. Otherwise the op is only there because
`kernels.configs.fused_pays` said so, and it is fused. Imports triton; `inductor` asks only where there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from bitdelta_compile.kernels import configs
from torch._inductor.kernel.mm import aten_mm
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.benchmarking import benchmarker
from torch._inductor.select_algorithm import ExternKernelCaller
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from .triton_operands import Problem, arrivals_of, boxed, fresh, power_of_2
from .triton_templates import (
    Launch,
    autotuned,
    binary_operands,
    delta_launch,
    exact_launch,
    index_nodes,
    low_rank_nodes,
    plan_of,
    result_layout,
    selected,
)


def base_delta_linear(problem: Problem, weight: Any, layout_name: str, exact: bool) -> Any | None:
    """The op as a buffer [M, N]; None where no fused kernel applies.

    Args:
        weight: [N, K], contiguous and realized.
    """
    apart = plan_of(problem, layout_name, exact)
    if apart is None:
        return None
    rows = problem.rows
    plan = configs.choose_fused(
        configs.architecture(problem.x.get_device()), rows.likely, problem.slots, problem.outputs, problem.features,
        problem.x.get_dtype(), column=problem.col_scale is not None, exact=exact, layout=layout_name,
        unbounded=rows.unbounded,
    )  # fmt: skip
    if plan is not None:
        launch = _fused(problem, weight, plan)
    elif autotuned() and isinstance(apart.config, configs.Exact):
        plan, launch = apart, exact_launch(problem, apart, weight)
    else:
        return None
    choices = launch.choices(problem, plan.entries if autotuned() else (plan.config,))
    if autotuned():
        delta = delta_launch(problem, apart).choices(problem, apart.entries)
        choices += [BaseThenDelta(problem, weight, each, launch.nodes) for each in delta]
    return selected("bitdelta_base_delta", choices, launch.nodes, problem, launch.values)


def _fused(problem: Problem, weight: Any, plan: configs.Plan) -> Launch:
    """The fused kernel."""
    rows, size = problem.rows, problem.x.get_size()[0]
    entries = [entry for entry in plan.entries if isinstance(entry, configs.Fused)]
    made, constants = binary_operands(problem, plan)
    constants |= {
        "K": problem.features,
        "BM": max(16, power_of_2(rows.most or rows.likely)),
        "FORM": f'"{plan.form}"',
    }
    tiles_of_rows = CeilDiv(size, constants["BM"]) if rows.unbounded else 1
    splits = max(entry.SPLIT for entry in entries)
    partial = fresh(problem, [splits + 1, size, problem.outputs], torch.float32)
    tiles = max(-(-problem.outputs // (16 * entry.tiles)) for entry in entries)
    arrived = arrivals_of(problem, tiles, tiles_of_rows)
    nodes = [problem.x, weight, problem.signs, problem.row_scale, *made, partial, arrived]
    nodes += [*index_nodes(problem), *low_rank_nodes(problem)]
    values = {[node is arrived for node in nodes].index(True): _zeros}
    return Launch("base_delta", nodes, constants, lambda entry: entry.SPLIT * tiles_of_rows + size, values)


class BaseThenDelta(ExternKernelCaller):
    """The library's product, then the delta's template, in which Inductor adds the two: the way without a fused kernel.

    To autotuning it is a call of the library, which it falls back to when nothing can be timed.
    """

    def __init__(self, problem: Problem, weight: Any, delta: Any, nodes: list[Any]) -> None:
        """
        Args:
            delta: the caller of the delta's template.
            nodes: what autotuning makes inputs for; those of `delta` are among them.
        """
        super().__init__(aten_mm, [problem.x, weight], result_layout(problem))
        self.x, self.weight, self.delta = problem.x, weight, delta
        names = [node.get_name() for node in nodes]
        self.places = [names.index(name) for name in dict.fromkeys(node.get_name() for node in delta.input_nodes)]
        self.operands = names.index(problem.x.get_name()), names.index(weight.get_name())

    def __str__(self) -> str:
        return f"BaseThenDelta({self.delta})"

    def hash_key(self) -> str:
        return f"base then {self.delta.hash_key()}"

    def precompile(self) -> None:
        self.delta.precompile()

    def benchmark(self, *args: torch.Tensor, out: torch.Tensor) -> float:
        """Milliseconds of both, one after the other; `args` are as the constructor's `nodes`."""
        x, weight = (args[place] for place in self.operands)
        base, turned = torch.empty_like(out), weight.mT
        add_delta = self.delta.bmreq.make_run_fn(*(args[place] for place in self.places), out=out)

        def both() -> None:
            torch.mm(x, turned, out=base)
            add_delta()

        return float(benchmarker.benchmark(both, device=out.device))

    def output_node(self) -> Any:
        turned = lowerings[torch.ops.aten.permute.default](boxed(self.weight), [1, 0])
        base = lowerings[torch.ops.aten.mm.default](boxed(self.x), turned)
        return lowerings[torch.ops.aten.add.Tensor](base, self.delta.output_node())


def _zeros(node: Any) -> torch.Tensor:
    (size,) = V.graph.sizevars.optimization_hints(node.get_size(), fallback=1)
    return torch.zeros(size, dtype=torch.int32, device=node.get_device())
