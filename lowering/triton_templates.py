"""`bitdelta::delta_linear` on a GPU: Inductor Triton templates around the device functions of kernels/.

x is first turned into an operand, see `triton_operands`; the template multiplies and ends in whatever pointwise
consumers Inductor fuses. Which kernel runs follows from `kernels.configs.choose`; under max-autotune every entry of its
list is timed. Imports triton; `inductor` asks only where there is one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.kernels import configs
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv

from bitdelta_compile import kernels

from .device_source import device_source
from .rows import is_static
from .triton_operands import Problem, bits_of, inner_of, items_of, power_of_2, segments_of, words_of

_TEMPLATES = {
    "binary_delta": ("slot_of_row", "led_rows", "binary_delta"),
    "exact_delta": ("slot_of_row", "led_rows", "rows_of_segment", "exact_delta", "with_base"),
    "base_delta": ("base_delta_part", "base_delta_total"),
}


@SymbolicGridFn
def delta_grid(programs: Any, outputs: Any, meta: Any, *, cdiv: Any) -> tuple[Any, Any, int]:
    """Programs along rows come first: those that read the same signs follow each other."""
    return programs, cdiv(outputs, meta["TILE"]), 1


@SymbolicGridFn
def base_delta_grid(programs: Any, outputs: Any, meta: Any, *, cdiv: Any) -> tuple[Any, int, int]:
    """`programs` for every tile of outputs, in one dimension."""
    return programs * cdiv(outputs, meta["TILE"]), 1, 1


@functools.cache
def template(name: str) -> TritonTemplate:
    text = (Path(kernels.__file__ or "").parent / f"{name}.py.jinja").read_text(encoding="utf-8")
    functions = device_source(*_TEMPLATES[name])
    grid = base_delta_grid if name == "base_delta" else delta_grid
    return TritonTemplate(
        name=f"bitdelta_{name}", grid=grid, source=f"{text}\n\n{{% raw %}}\n{functions}\n{{% endraw %}}\n"
    )


@dataclasses.dataclass(frozen=True)
class Launch:
    """What all entries of a list share of one kernel.

    Attributes:
        name: of the template.  nodes: its inputs, in order.  constants: of the template.
        programs: for an entry, what the grid takes as its number of programs.
        values: place among `nodes` -> what makes its values for autotuning, where any will not do.
    """

    name: str
    nodes: list[Any]
    constants: dict[str, Any]
    programs: Callable[[Any], Any]
    values: Mapping[int, Callable[[Any], torch.Tensor]] = dataclasses.field(default_factory=dict)

    def choices(self, problem: Problem, entries: tuple[Any, ...]) -> list[Any]:
        """A caller for every entry of the tuning table."""
        found: list[Any] = []
        for entry in entries:
            error = template(self.name).maybe_append_choice(
                found,
                input_nodes=tuple(self.nodes),
                layout=result_layout(problem),
                call_sizes=[self.programs(entry), problem.outputs],
                num_warps=entry.warps,
                num_stages=1 if isinstance(entry, configs.Binary) else entry.STAGES,
                **self.constants,
                **_shape_constants(entry, problem),
            )
            if error is not None:
                raise error
        return found


def delta_linear(problem: Problem, layout_name: str, exact: bool = False) -> Any | None:
    """The op as a template buffer [M, N]; None where no kernel applies."""
    plan = plan_of(problem, layout_name, exact)
    if plan is None:
        return None
    launch = delta_launch(problem, plan)
    entries = plan.entries if autotuned() else (plan.config,)
    return selected(f"bitdelta_{launch.name}", launch.choices(problem, entries), launch.nodes, problem, launch.values)


def plan_of(problem: Problem, layout_name: str, exact: bool) -> configs.Plan | None:
    """`configs.choose` for the problem."""
    rows = problem.rows
    return configs.choose(
        configs.architecture(problem.x.get_device()), rows.likely, problem.slots, problem.outputs, problem.features,
        problem.x.get_dtype(), column=problem.col_scale is not None, exact=exact, layout=layout_name,
        unbounded=rows.unbounded,
    )  # fmt: skip


def autotuned() -> bool:
    """Whether choices are timed."""
    return bool(inductor_config.max_autotune or inductor_config.max_autotune_gemm)


def selected(name: str, choices: list[Any], nodes: list[Any], problem: Problem, values: Mapping[int, Any]) -> Any:
    """The only choice, or the one that autotuning finds fastest, as a buffer [M, N].

    Args:
        values: as in `Launch`; the row index is known.
    """
    generators = dict(values)
    if problem.tenant in nodes:
        generators[nodes.index(problem.tenant)] = functools.partial(_spread_index, slots=problem.slots)
    chosen: Any = autotune_select_algorithm(
        name, choices, nodes, result_layout(problem), input_gen_fns=generators or None
    )
    return chosen[0] if isinstance(chosen, tuple) else chosen


def result_layout(problem: Problem) -> Any:
    x = problem.x
    return ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], problem.outputs])


def delta_launch(problem: Problem, plan: configs.Plan) -> Launch:
    """The kernel of a plan from `configs.choose`."""
    return _binary(problem, plan) if isinstance(plan.config, configs.Binary) else exact_launch(problem, plan)


def binary_operands(problem: Problem, plan: configs.Plan) -> tuple[list[Any], dict[str, Any]]:
    """What the binary path reads, but for signs and row scales, and its constants but for an entry's."""
    chunks = -(-problem.features // 512)
    constants = {
        **_shared_constants(problem),
        "WIDE": int(plan.wide),
        "CHUNKS": chunks,
        "CP": power_of_2(chunks),
        "MP": power_of_2(problem.rows.most or 1),
    }
    return bits_of(problem, plan.wide), constants


def index_nodes(problem: Problem) -> list[Any]:
    return [] if problem.tenant is None else [problem.tenant]


def low_rank_nodes(problem: Problem) -> list[Any]:
    return [problem.left, inner_of(problem)] if problem.rank else []


def _binary(problem: Problem, plan: configs.Plan) -> Launch:
    made, constants = binary_operands(problem, plan)
    nodes = [problem.signs, problem.row_scale, *made, *index_nodes(problem), *low_rank_nodes(problem)]
    return Launch("binary_delta", nodes, constants, lambda entry: problem.x.get_size()[0])


def exact_launch(problem: Problem, plan: configs.Plan, weight: Any = None) -> Launch:
    """The exact kernel of a plan; with a weight [N, K], x @ weight.T too."""
    words, halves = words_of(problem, plan.splits)
    constants = {
        **_shared_constants(problem),
        "SPLITS": plan.splits,
        "FORM": f'"{plan.form}"',
        "SORTED": plan.sorted,
        "BASE": weight is not None,
        "K": problem.features,
        "MP": 1 if plan.sorted else power_of_2(problem.rows.most or 1),
        "SP": power_of_2(problem.slots + 2),
    }
    rows = problem.x.get_size()[0]
    items = items_of(problem)
    nodes = [problem.signs, problem.row_scale, words, halves]
    values: dict[int, Any] = {}
    if plan.sorted:
        values = {len(nodes): _in_order, len(nodes) + 1: functools.partial(_even_starts, items=items)}
        nodes += segments_of(problem, items)
    else:
        nodes += index_nodes(problem)
    nodes += low_rank_nodes(problem)
    if weight is not None:
        nodes += [problem.x, weight]

    def programs(entry: Any) -> Any:
        if not plan.sorted:
            return rows
        most = problem.slots + 1
        return CeilDiv(rows, entry.BM) + (min(most, int(items)) if is_static(items) else most)

    return Launch("exact_delta", nodes, constants, programs, values)


def _in_order(node: Any) -> torch.Tensor:
    """An order of items for autotuning: their own."""
    size = V.graph.sizevars.optimization_hints(node.get_size(), fallback=1)[0]
    return torch.arange(size, device=node.get_device(), dtype=torch.int32)


def _even_starts(node: Any, *, items: Any) -> torch.Tensor:
    """Starts of segments for autotuning: every slot has as many items, the base none."""
    (many,) = V.graph.sizevars.optimization_hints([items], fallback=1)
    slots = int(node.get_size()[0]) - 2
    bounds = torch.arange(slots + 2, device=node.get_device()).clamp(max=slots) * many // slots
    return bounds.to(torch.int32)


def _spread_index(node: Any, *, slots: int) -> torch.Tensor:
    """A row index for autotuning: the slots in turn."""
    size = V.graph.sizevars.optimization_hints(node.get_size(), fallback=1)[0]
    return (torch.arange(size, device=node.get_device()) % slots).to(torch.int32)


def _shape_constants(entry: Any, problem: Problem) -> dict[str, Any]:
    """An entry of the table as the template's constants, with what follows from it."""
    blocks = -(-problem.features // 128) // 2
    shapes = dataclasses.asdict(entry)
    if isinstance(entry, configs.Fused):
        shapes |= {**shapes.pop("delta"), "PART": entry.part(problem.features)}
    unit = shapes["WK"] * shapes["U"] if "WK" in shapes else shapes["U"]
    return {**shapes, "TILE": 16 * entry.tiles, "EVEN": blocks % unit == 0}


def _shared_constants(problem: Problem) -> dict[str, Any]:
    halves = -(-problem.features // 128)
    return {
        "N": problem.outputs,
        "P": problem.planes,
        "XP": problem.x_planes,
        "SLOTS": problem.slots,
        "RANK": problem.rank,
        "INDEXED": problem.tenant is not None,
        "BLOCKS": halves // 2,
        "HALF": halves % 2,
    }
