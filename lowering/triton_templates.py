"""`bitdelta::delta_linear` on a GPU: Inductor Triton templates around the device functions of kernels/.

x is first turned into an operand by the small kernels of `kernels.operands`, once for all linears that read it; the
template multiplies and ends in whatever pointwise consumers Inductor fuses. Which kernel runs follows from
`kernels.configs.choose`; under max-autotune every entry of its list is timed. Imports triton; `inductor` asks only
where there is one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitdelta_compile.kernels import configs, operands, segments
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.lowering import empty
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max

from bitdelta_compile import kernels

from .device_source import device_source

DYNAMIC_DECODE_TILE = 16  # rows of a slot together where the number of rows is not known but expected to be small
_TEMPLATES = {
    "binary_delta": ("slot_of_row", "led_rows", "binary_delta"),
    "exact_delta": ("slot_of_row", "led_rows", "rows_of_segment", "exact_delta"),
}


@SymbolicGridFn
def delta_grid(programs: Any, outputs: Any, meta: Any, *, cdiv: Any) -> tuple[Any, Any, int]:
    """Programs along rows come first: those that read the same signs follow each other."""
    return programs, cdiv(outputs, meta["TILE"]), 1


@functools.cache
def _template(name: str) -> TritonTemplate:
    text = (Path(kernels.__file__ or "").parent / f"{name}.py.jinja").read_text(encoding="utf-8")
    functions = device_source(*_TEMPLATES[name])
    return TritonTemplate(
        name=f"bitdelta_{name}", grid=delta_grid, source=f"{text}\n\n{{% raw %}}\n{functions}\n{{% endraw %}}\n"
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """One op: realized contiguous nodes, and what is static about it.

    Attributes:
        x: [M, K]; M may be symbolic.  tenant: int32 [R] or None.
        rows: M as a number, its hint where it is symbolic.  dynamic: whether it is symbolic, or R is.
    """

    x: Any
    signs: Any
    row_scale: Any
    col_scale: Any
    left: Any
    right: Any
    tenant: Any
    rows: int
    dynamic: bool

    @property
    def slots(self) -> int:
        return int(self.row_scale.get_size()[0])

    @property
    def planes(self) -> int:
        return int(self.row_scale.get_size()[1])

    @property
    def outputs(self) -> int:
        return int(self.row_scale.get_size()[2])

    @property
    def features(self) -> int:
        return int(self.x.get_size()[1])

    @property
    def x_planes(self) -> int:
        """XP: rows of an operand for each row of x."""
        return 1 if self.col_scale is None else self.planes

    @property
    def rank(self) -> int:
        return 0 if self.left is None else int(self.left.get_size()[2])

    @property
    def index(self) -> dict[str, Any]:
        """What the kernels of `operands` and `segments` take of the row index."""
        rows = self.x.get_size()[0]
        entries = 1 if self.tenant is None else self.tenant.get_size()[0]
        return {
            "tenant_ptr": self.x if self.tenant is None else self.tenant,
            "entries": entries,
            "rows_per_entry": Max(1, FloorDiv(rows, entries)),
            "SLOTS": self.slots,
            "INDEXED": self.tenant is not None,
        }


def delta_linear(problem: Problem, layout_name: str, exact: bool = False) -> Any | None:
    """The op as a template buffer [M, N]; None where no kernel applies."""
    device, dtype = problem.x.get_device(), problem.x.get_dtype()
    plan = configs.choose(
        configs.architecture(device), problem.rows, problem.slots, problem.outputs, problem.features, dtype,
        column=problem.col_scale is not None, exact=exact, layout=layout_name,
    )  # fmt: skip
    if plan is None:
        return None
    if problem.dynamic and not isinstance(plan.config, configs.Exact):
        splits = configs.splits(dtype, problem.col_scale is not None, exact=True)
        plan = configs.Plan(configs.EXACT_DECODE[0], splits=splits, form=plan.form)
    if isinstance(plan.config, configs.Binary):
        nodes, constants, programs = _binary(problem, plan)
        name = "binary_delta"
    else:
        nodes, constants, programs = _exact(problem, plan)
        name = "exact_delta"
    rows = problem.x.get_size()[0]
    result = ir.FixedLayout(device, dtype, [rows, problem.outputs])
    choices: list[Any] = []
    for each in _candidates(plan, problem):
        error = _template(name).maybe_append_choice(
            choices,
            input_nodes=tuple(nodes),
            layout=result,
            call_sizes=[programs(each), problem.outputs],
            num_warps=each.warps,
            num_stages=each.STAGES if isinstance(each, configs.Exact) else 1,
            **constants,
            **_shape_constants(each, problem),
        )
        if error is not None:
            raise error
    generators = {}
    if problem.tenant in nodes:
        generators[nodes.index(problem.tenant)] = functools.partial(_spread_index, slots=problem.slots)
    chosen: Any = autotune_select_algorithm(
        f"bitdelta_{name}", choices, nodes, result, input_gen_fns=generators or None
    )
    return chosen[0] if isinstance(chosen, tuple) else chosen


def _candidates(plan: configs.Plan, problem: Problem) -> Sequence[Any]:
    """The plan's entry, or under autotuning its list, the entry first."""
    first = plan.config
    if problem.dynamic and problem.rows <= configs.DECODE_ROWS and isinstance(first, configs.Exact):
        first = dataclasses.replace(first, BM=DYNAMIC_DECODE_TILE)
    if not (inductor_config.max_autotune or inductor_config.max_autotune_gemm):
        return [first]
    lists = (configs.BINARY_DECODE, configs.EXACT_DECODE, configs.PREFILL)
    others = next((entries for entries in lists if plan.config in entries), ())
    return list(dict.fromkeys([first, *others]))


def _spread_index(node: Any, *, slots: int) -> torch.Tensor:
    """A row index for autotuning: the slots in turn."""
    size = V.graph.sizevars.optimization_hints(node.get_size(), fallback=1)[0]
    return (torch.arange(size, device=node.get_device()) % slots).to(torch.int32)


def _shape_constants(config: Any, problem: Problem) -> dict[str, Any]:
    """An entry of the table as the template's constants, with what follows from it."""
    blocks = -(-problem.features // 128) // 2
    shapes = dataclasses.asdict(config)
    unit = config.WK * config.U if isinstance(config, configs.Binary) else config.U
    return {**shapes, "TILE": 16 * config.tiles, "EVEN": blocks % unit == 0}


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


def _index_nodes(problem: Problem) -> list[Any]:
    return [] if problem.tenant is None else [problem.tenant]


def _low_rank_nodes(problem: Problem) -> list[Any]:
    return [problem.left, _inner(problem)] if problem.rank else []


def _binary(problem: Problem, plan: configs.Plan) -> tuple[list[Any], dict[str, Any], Any]:
    planes, scale, sums = _bits(problem, plan.wide)
    chunks = -(-problem.features // 512)
    constants = {
        **_shared_constants(problem),
        "WIDE": int(plan.wide),
        "CHUNKS": chunks,
        "CP": _power_of_2(chunks),
        "MP": _power_of_2(problem.rows),
    }
    nodes = [problem.signs, problem.row_scale, planes, scale, sums, *_index_nodes(problem), *_low_rank_nodes(problem)]
    return nodes, constants, lambda config: problem.x.get_size()[0]


def _exact(problem: Problem, plan: configs.Plan) -> tuple[list[Any], dict[str, Any], Any]:
    words, halves = _words(problem, plan.splits)
    segmented = plan.sorted or problem.dynamic
    constants = {
        **_shared_constants(problem),
        "SPLITS": plan.splits,
        "FORM": f'"{plan.form}"',
        "SORTED": segmented,
        "MP": 1 if segmented else _power_of_2(problem.rows),
        "SP": _power_of_2(problem.slots + 2),
    }
    rows = problem.x.get_size()[0]
    items = _items(problem)
    nodes = [problem.signs, problem.row_scale, words, halves]
    nodes += _segments(problem, items) if segmented else _index_nodes(problem)
    nodes += _low_rank_nodes(problem)

    def programs(config: Any) -> Any:
        if not segmented:
            return rows
        most = problem.slots + 1
        return CeilDiv(rows, config.BM) + (
            min(most, int(items)) if isinstance(items, int) or items.is_Integer else most
        )

    return nodes, constants, programs


def _items(problem: Problem) -> Any:
    """What is sorted: the entries of the row index where they divide the rows for certain, else the rows."""
    rows = problem.x.get_size()[0]
    if problem.tenant is None:
        return 1
    entries = problem.tenant.get_size()[0]
    return entries if V.graph.sizevars.statically_known_multiple_of(rows, entries) else rows


def _segments(problem: Problem, items: Any) -> list[Any]:
    index = problem.index

    def make() -> list[Any]:
        order, starts = _fresh(problem, [items], torch.int32), _fresh(problem, [problem.slots + 2], torch.int32)
        _launch(
            segments.plan_kernel, [CeilDiv(items, 64), 1, 1],
            {
                **index, "order_ptr": order, "starts_ptr": starts, "items": items,
                "rows_per_item": FloorDiv(problem.x.get_size()[0], items), "SP": _power_of_2(problem.slots + 2),
                "BLOCK": 64,
            },
        )  # fmt: skip
        return [order, starts]

    return _once(("segments", _name(problem.tenant), problem.slots, str(items)), make)


def _bits(problem: Problem, wide: bool) -> list[Any]:
    """`operands.bits` for the graph."""
    rows, features = problem.x.get_size()[0] * problem.x_planes, problem.features
    stored, chunks = -(-features // 256), -(-features // 512)

    def make() -> list[Any]:
        made = [
            _fresh(problem, [rows, stored, 1 + wide, 128], torch.int32),
            _fresh(problem, [rows], torch.float32),
            _fresh(problem, [rows, chunks, 2], torch.int32),
        ]
        outputs = dict(zip(("bits_ptr", "scale_ptr", "sums_ptr"), made, strict=True))
        sizes = {"stored": stored, "chunks": chunks, "WIDE": int(wide), "BK": min(2048, _power_of_2(features))}
        _launch(operands.bits_kernel, [rows, chunks, 1], {**_of_x(problem), **outputs, **sizes})
        return made

    return _once(("bits", wide, *_x_key(problem)), make)


def _words(problem: Problem, splits: int) -> list[Any]:
    """`operands.words` for the graph."""
    rows, stored = problem.x.get_size()[0] * problem.x_planes, -(-problem.features // 256)

    def make() -> list[Any]:
        words = _fresh(problem, [rows, stored, splits, 16, 16], torch.bfloat16)
        halves = _fresh(problem, [rows, stored], torch.float32)
        sizes = {"words_ptr": words, "halves_ptr": halves, "stored": stored, "SPLITS": splits, "NB": 4}
        _launch(operands.words_kernel, [rows, -(-stored // 4), 1], {**_of_x(problem), **sizes})
        return [words, halves]

    return _once(("words", splits, *_x_key(problem)), make)


def _inner(problem: Problem) -> Any:
    """`operands.inner` for the graph."""
    rows, rank, features = problem.x.get_size()[0], problem.rank, problem.features
    inner = _fresh(problem, [rows, rank], torch.float32)
    _launch(
        operands.inner_kernel, [rows, 1, 1],
        {
            **problem.index, "x_ptr": problem.x, "right_ptr": problem.right, "inner_ptr": inner, "x_stride": features,
            "K": features, "RANK": rank, "RP": _power_of_2(rank), "BK": min(512, _power_of_2(features)),
        },
    )  # fmt: skip
    return inner


def _of_x(problem: Problem) -> dict[str, Any]:
    column = problem.col_scale is not None
    return {
        **problem.index,
        "x_ptr": problem.x,
        "col_ptr": problem.col_scale if column else problem.x,
        "x_stride": problem.features,
        "K": problem.features,
        "XP": problem.x_planes,
        "COL": column,
    }


def _x_key(problem: Problem) -> tuple[Any, ...]:
    """What an operand depends on: without column scales nothing but x."""
    if problem.col_scale is None:
        return (_name(problem.x),)
    return (_name(problem.x), _name(problem.col_scale), _name(problem.tenant), problem.slots)


def _once(key: tuple[Any, ...], make: Any) -> list[Any]:
    """The buffers of `key` in the graph that is being lowered, made when first asked for."""
    made: dict[tuple[Any, ...], list[Any]] = V.graph.__dict__.setdefault("bitdelta_operands", {})
    if key not in made:
        made[key] = make()
    return made[key]


def _name(node: Any) -> str:
    return "" if node is None else f"{node.get_name()} {node.get_size()} {node.get_layout().offset}"


def _fresh(problem: Problem, size: list[Any], dtype: torch.dtype) -> Any:
    made = empty(size, dtype=dtype, device=problem.x.get_device())
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(made))


def _launch(kernel: Any, grid: list[Any], arguments: dict[str, Any]) -> None:
    """Call a Triton kernel of kernels/ from the graph; it is copied into the generated code."""
    ir.UserDefinedTritonKernel(
        kernel_idx=kernel_side_table.add_kernel(kernel),
        grid=[tuple(grid)],
        tma_descriptor_metadata={},
        kernel_args={name: _boxed(value) for name, value in arguments.items()},
    )


def _boxed(value: Any) -> Any:
    """A node as the tensor that Inductor expects of a caller; a number as it is."""
    if not isinstance(value, ir.IRNode) or isinstance(value, ir.TensorBox):
        return value
    return ir.TensorBox(value) if isinstance(value, ir.BaseView | ir.StorageBox) else ir.TensorBox.create(value)


def _power_of_2(value: int) -> int:
    return 1 << max(0, int(value) - 1).bit_length()


def rows_of(x: Any, tenant: Any) -> tuple[int, bool]:
    """M of x [M, K] as a number or its hint, and whether it or the length of the row index is symbolic."""
    sizes = [x.get_size()[0], *([] if tenant is None else tenant.get_size())]
    dynamic = not all(isinstance(size, int) or size.is_Integer for size in sizes)
    return int(V.graph.sizevars.optimization_hints(sizes, fallback=configs.DECODE_ROWS)[0]), dynamic
