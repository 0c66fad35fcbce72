"""What Inductor's graph holds around our Triton templates: an op's facts, and the small kernels that make its operands.

An operand is made once for all linears that read the same x. Imports triton; `inductor` asks only where there is one.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from bitdelta_compile.kernels import configs, operands, segments
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import ir
from torch._inductor.lowering import empty, full
from torch._inductor.virtualized import V
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max

from .rows import Rows

ARRIVALS = 4096  # tiles of outputs that the zeros shared by the launches of base and delta are enough for


@dataclasses.dataclass(frozen=True)
class Problem:
    """One op: realized contiguous nodes, and its sizes.

    Attributes:
        x: [M, K]; M may be symbolic.  tenant: int32 [R] or None.
    """

    x: Any
    signs: Any
    row_scale: Any
    col_scale: Any
    left: Any
    right: Any
    tenant: Any

    @functools.cached_property
    def rows(self) -> Rows:
        size = self.x.get_size()[0]
        entries = None if self.tenant is None else self.tenant.get_size()[0]
        (hint,) = V.graph.sizevars.optimization_hints([size], fallback=configs.DECODE_ROWS)
        return Rows.of(size, entries, int(hint), V.graph.sizevars.shape_env)

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


def items_of(problem: Problem) -> Any:
    """What is sorted: the entries of the row index where they divide the rows for certain, else the rows."""
    rows = problem.x.get_size()[0]
    if problem.tenant is None:
        return 1
    entries = problem.tenant.get_size()[0]
    return entries if V.graph.sizevars.statically_known_multiple_of(rows, entries) else rows


def segments_of(problem: Problem, items: Any) -> list[Any]:
    index = problem.index

    def make() -> list[Any]:
        order, starts = fresh(problem, [items], torch.int32), fresh(problem, [problem.slots + 2], torch.int32)
        _launch(
            segments.plan_kernel,
            [CeilDiv(items, configs.SEGMENT_ITEMS) + CeilDiv(problem.slots + 2, configs.SEGMENT_ITEMS), 1, 1],
            {
                **index, "order_ptr": order, "starts_ptr": starts, "items": items,
                "rows_per_item": FloorDiv(problem.x.get_size()[0], items), "BLOCK": configs.SEGMENT_ITEMS,
                "SPAN": configs.SEGMENT_SPAN,
            },
        )  # fmt: skip
        return [order, starts]

    return _once(("segments", _name(problem.tenant), problem.slots, str(items)), make)


def bits_of(problem: Problem, wide: bool) -> list[Any]:
    """`operands.bits` for the graph."""
    rows, features = problem.x.get_size()[0] * problem.x_planes, problem.features
    stored, chunks = -(-features // 256), -(-features // 512)

    def make() -> list[Any]:
        made = [
            fresh(problem, [rows, stored, 1 + wide, 128], torch.int32),
            fresh(problem, [rows], torch.float32),
            fresh(problem, [rows, chunks, 2], torch.int32),
        ]
        outputs = dict(zip(("bits_ptr", "scale_ptr", "sums_ptr"), made, strict=True))
        sizes = {"stored": stored, "chunks": chunks, "WIDE": int(wide), "BK": min(2048, power_of_2(features))}
        _launch(operands.bits_kernel, [rows, chunks, 1], {**_of_x(problem), **outputs, **sizes})
        return made

    return _once(("bits", wide, *_x_key(problem)), make)


def words_of(problem: Problem, splits: int) -> list[Any]:
    """`operands.words` for the graph."""
    rows, stored = problem.x.get_size()[0] * problem.x_planes, -(-problem.features // 256)

    def make() -> list[Any]:
        words = fresh(problem, [rows, stored, splits, 16, 16], torch.bfloat16)
        halves = fresh(problem, [rows, stored], torch.float32)
        sizes = {"words_ptr": words, "halves_ptr": halves, "stored": stored, "SPLITS": splits, "NB": 4}
        _launch(operands.words_kernel, [rows, -(-stored // 4), 1], {**_of_x(problem), **sizes})
        return [words, halves]

    return _once(("words", splits, *_x_key(problem)), make)


def inner_of(problem: Problem) -> Any:
    """`operands.inner` for the graph."""
    rows, rank, features = problem.x.get_size()[0], problem.rank, problem.features

    def make() -> list[Any]:
        inner = fresh(problem, [rows, rank], torch.float32)
        _launch(
            operands.inner_kernel, [rows, 1, 1],
            {
                **problem.index, "x_ptr": problem.x, "right_ptr": problem.right, "inner_ptr": inner,
                "x_stride": features, "K": features, "RANK": rank, "RP": power_of_2(rank),
                "BK": min(512, power_of_2(features)),
            },
        )  # fmt: skip
        return [inner]

    return _once(("inner", _name(problem.x), _name(problem.right), _name(problem.tenant)), make)[0]


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


def fresh(problem: Problem, size: list[Any], dtype: torch.dtype) -> Any:
    """A buffer [*size] that a kernel of the graph will write."""
    made = empty(size, dtype=dtype, device=problem.x.get_device())
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(made))


def arrivals_of(problem: Problem, tiles: int, tiles_of_rows: Any) -> Any:
    """int32 zeros for every tile of a result: a launch that counts in them leaves zeros for the graph's next one."""
    size = max(ARRIVALS, power_of_2(tiles)) * tiles_of_rows
    device = problem.x.get_device()

    def make() -> list[Any]:
        zeros = full([size], 0, dtype=torch.int32, device=device)
        return [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(zeros))]

    return _once(("arrivals", str(device), str(size)), make)[0]


def _launch(kernel: Any, grid: list[Any], arguments: dict[str, Any]) -> None:
    """Call a Triton kernel of kernels/ from the graph; it is copied into the generated code."""
    ir.UserDefinedTritonKernel(
        kernel_idx=kernel_side_table.add_kernel(kernel),
        grid=[tuple(grid)],
        tma_descriptor_metadata={},
        kernel_args={name: boxed(value) for name, value in arguments.items()},
    )


def boxed(value: Any) -> Any:
    """A node as the tensor that Inductor expects of a caller; a number as it is."""
    if not isinstance(value, ir.IRNode) or isinstance(value, ir.TensorBox):
        return value
    return ir.TensorBox(value) if isinstance(value, ir.BaseView | ir.StorageBox) else ir.TensorBox.create(value)


def power_of_2(value: int) -> int:
    return 1 << max(0, int(value) - 1).bit_length()
