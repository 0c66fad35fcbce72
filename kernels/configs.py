"""The only table of kernel shapes, and the only place that picks a kernel: by static facts, never by a tensor's data.

Needs no triton. Which entry is fastest has not been measured on a device: the order within a list is a guess from
instruction counts and occupancy, and autotuning takes any entry of the list for an architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import torch

from .layout import CANONICAL, FRAGMENTS

DECODE_ROWS = 64
BINARY_FEATURES = 32768  # up to which its int32 sums are exact
MOST_ROWS_EACH = 4  # rows of an entry of the row index, up to which a graph for any number of rows is one for decoding


@dataclasses.dataclass(frozen=True)
class Binary:
    """Binary products of WN R tiles of 16 outputs and G rows of a slot, with WN WK warps and U blocks each per step."""

    R: int
    G: int
    WN: int
    WK: int
    U: int

    @property
    def warps(self) -> int:
        return self.WN * self.WK

    @property
    def tiles(self) -> int:
        return self.WN * self.R


@dataclasses.dataclass(frozen=True)
class Exact:
    """Exact products of W R tiles of 16 outputs and BM rows of a slot, with W warps and U blocks per step, of which D
    bits of every word are multiplied at once: two at most where there are several planes, for want of registers.

    In the table BM is the rows of x in one part; of x in several parts fewer rows take the same place.
    """

    R: int
    W: int
    U: int
    BM: int
    D: int
    STAGES: int

    @property
    def warps(self) -> int:
        return self.W

    @property
    def tiles(self) -> int:
        return self.W * self.R

    def of_parts(self, splits: int) -> Exact:
        """The entry for x in that many parts; three take the place of four."""
        return dataclasses.replace(self, BM=self.BM // (4 if splits == 3 else splits))


@dataclasses.dataclass(frozen=True)
class Fused:
    """Base and binary delta in one launch: the delta's part as `delta` says, the base's in steps of BK features and
    `SPLIT` parts of K, with STAGES of loads under way. One tile of outputs for both."""

    delta: Binary
    BK: int
    SPLIT: int
    STAGES: int

    def part(self, features: int) -> int:
        """Features of a part of K, whole steps; the last parts may have fewer or none."""
        return -(-features // (self.SPLIT * self.BK)) * self.BK

    @property
    def warps(self) -> int:
        return self.delta.warps

    @property
    def tiles(self) -> int:
        return self.delta.tiles


# One row of each slot; the second for grids too small to fill a GPU; the third where several rows share a slot.
BINARY_DECODE = (Binary(4, 1, 1, 4, 1), Binary(2, 1, 1, 8, 1), Binary(2, 4, 1, 4, 1))
# With three stages a step's loads are under way while the step before is multiplied; with two, Triton waits for all.
EXACT_DECODE = (Exact(2, 4, 2, 8, 1, 3),)
EXACT_DECODE_SM120 = (Exact(2, 2, 2, 8, 1, 3),)  # with more warps fp32 x spills
# Its matrix instructions have 16 columns or more, and two stages load ahead.
EXACT_DECODE_AMD = (Exact(2, 4, 2, 16, 1, 2),)
FUSED_DECODE = (Fused(BINARY_DECODE[0], 64, 4, 4), Fused(BINARY_DECODE[2], 64, 4, 4))
# Signs are a sixteenth of x's bytes: many outputs ask least of the caches. What is larger spills. Of two entries the
# first is for many rows of each slot.
PREFILL = (Exact(2, 8, 1, 64, 1, 3), Exact(2, 8, 1, 32, 1, 3))
# A warpgroup's products are begun one after the other and waited for once: the deeper, the less there is around them.
# Elsewhere Triton would load x in other pieces than the instructions want, and move it from register to register.
PREFILL_SM90 = (Exact(2, 8, 1, 64, 8, 3), Exact(2, 8, 1, 32, 8, 3))
# Tiles that four warps can share Triton would multiply in tensor memory, of which the bits, one at a time, need twice
# what there is; with two warps larger tiles spill.
PREFILL_SM100 = (Exact(2, 2, 1, 32, 1, 3),)
PREFILL_SMALL = PREFILL[1:]  # sm_120, where the first may spill, and AMD, which has less shared memory
SEGMENT_ITEMS = 8  # that a program of the sort by slot places
SEGMENT_SPAN = 512  # items that it looks at together, a multiple of those
FIT_COLUMNS = 16  # columns of weights that a fit's kernel holds in registers; with 32 they spill


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one delta_linear runs: an entry of the table, and how x is represented.

    Attributes:
        config: the entry.
        wide: binary only: 24 bits of x instead of 16.
        splits: exact only: bf16 parts of x.
        sorted: rows are sorted into segments first (prefill); otherwise each group is led by one of its rows.
        form: how bits become numbers, see `tile.bit_operand`; in a fused kernel, how the base is multiplied.
        others: entries that may take the place of `config`, for autotuning.
    """

    config: Binary | Exact | Fused
    wide: bool = False
    splits: int = 1
    sorted: bool = False
    form: str = "asm"
    others: tuple[Binary | Exact | Fused, ...] = dataclasses.field(default=(), compare=False)

    @property
    def entries(self) -> tuple[Binary | Exact | Fused, ...]:
        """`config`, and then the others."""
        return tuple(dict.fromkeys((self.config, *self.others)))


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """A number of rows that may be any in a later call of the same graph: M is one that is likely.

    Attributes:
        indexed: whether there is a row index.
        each: rows that share an entry of it, None where that is no fixed number either.
    """

    indexed: bool
    each: int | None

    @property
    def decodes(self) -> bool:
        """Whether few rows stay few: as many as there are sequences, not tokens of prompts."""
        return not self.indexed or (self.each is not None and self.each <= MOST_ROWS_EACH)


def architecture(device: torch.device) -> str | int | None:
    """Compute capability of a CUDA device as an int (90 for 9.0), the name of an AMD one, None for anything else."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def has_kernels(arch: str | int | None) -> bool:
    """Whether kernels of ours are compiled for it: NVIDIA from compute capability 8.0 on, and AMD."""
    return arch is not None and not (isinstance(arch, int) and arch < 80)


@functools.cache
def device_layout(device: torch.device) -> str:
    """The layout that signs have on a device: that of its kernels where it has some."""
    kernels = has_kernels(architecture(device)) and importlib.util.find_spec("triton") is not None
    return FRAGMENTS if kernels else CANONICAL


def exact_decode(arch: str | int | None) -> tuple[Exact, ...]:
    """The exact entries for few rows of each slot."""
    if not isinstance(arch, int):
        return EXACT_DECODE_AMD
    return EXACT_DECODE if arch < 120 else EXACT_DECODE_SM120


def prefill(arch: str | int | None) -> tuple[Exact, ...]:
    """The entries for many rows of each slot, the one for most of them first."""
    if not isinstance(arch, int) or arch >= 120:
        return PREFILL_SMALL
    return PREFILL if arch < 90 else PREFILL_SM90 if arch < 100 else PREFILL_SM100


def splits(dtype: torch.dtype, column: bool, exact: bool) -> int:
    """bf16 parts that hold x: all its bits, or with column scales and no call for exactness its own precision."""
    own = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}[dtype]
    return 3 if column and exact else own


def choose(
    arch: str | int | None,
    rows: int,
    slots: int,
    outputs: int,
    features: int,
    dtype: torch.dtype,
    *,
    column: bool,
    exact: bool = False,
    layout: str = FRAGMENTS,
    unbounded: Unbounded | None = None,
) -> Plan | None:
    """The kernel for M rows of x and N x K signs of T slots; None where only PyTorch will do.

    Args:
        arch: see `architecture`.  rows: M.  slots: T.  outputs: N.  features: K.  dtype: of x.
        column: whether there is a `col_scale`.
        exact: whether x may not be rounded.
        layout: of the signs.
        unbounded: what is known where M is only a likely number of rows; the kernel is right for any.
    """
    if layout != FRAGMENTS or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if not has_kernels(arch) or not (rows and outputs and features):
        return None
    many = rows > DECODE_ROWS
    # From sm_100 on there is no binary MMA: it would be emulated.
    binary = not exact and isinstance(arch, int) and arch < 100 and features <= BINARY_FEATURES
    if many or not binary or (unbounded is not None and not unbounded.decodes):
        table, is_sorted = prefill(arch), many or unbounded is not None
        entry = table[0 if rows >= slots * table[0].BM else -1]
        parts = splits(dtype, column, exact or not many)
        if not is_sorted and rows <= slots * exact_decode(arch)[0].of_parts(parts).BM:
            table, entry = exact_decode(arch), exact_decode(arch)[0]
        form = "asm" if isinstance(arch, int) else "plain"
        others = _of_parts(table, parts)
        return Plan(others[table.index(entry)], splits=parts, sorted=is_sorted, form=form, others=others)
    wide = column or dtype == torch.float32  # x that has more than 16 bits
    grouped = _may_group(unbounded)
    few = -(-outputs // (16 * BINARY_DECODE[0].tiles)) * rows < 256
    config = BINARY_DECODE[2 if rows > slots and grouped else 1 if few else 0]
    return Plan(config, wide=wide, others=tuple(each for each in BINARY_DECODE if grouped or each.G == 1))


@functools.cache
def _of_parts(table: tuple[Exact, ...], parts: int) -> tuple[Exact, ...]:
    return tuple(entry.of_parts(parts) for entry in table)


def _may_group(unbounded: Unbounded | None) -> bool:
    """Whether a row can find the others of its slot: all rows have one, or there are few enough to look at each."""
    return unbounded is None or not unbounded.indexed


def choose_fused(
    arch: str | int | None,
    rows: int,
    slots: int,
    outputs: int,
    features: int,
    dtype: torch.dtype,
    *,
    column: bool,
    exact: bool = False,
    layout: str = FRAGMENTS,
    unbounded: Unbounded | None = None,
) -> Plan | None:
    """The kernel for base and delta in one launch, where there is one; arguments as in `choose`.

    It keeps partial results of every row: too much memory where the rows may be those of prompts.
    """
    plan = choose(
        arch, rows, slots, outputs, features, dtype, column=column, exact=exact, layout=layout, unbounded=unbounded
    )
    if plan is None or not isinstance(plan.config, Binary) or (unbounded is not None and not unbounded.indexed):
        return None
    others = tuple(each for each in FUSED_DECODE if _may_group(unbounded) or each.delta.G == 1)
    return dataclasses.replace(plan, config=FUSED_DECODE[1 if plan.config.G > 1 else 0], others=others)


def fused_pays(plan: Plan, rows: int, slots: int, outputs: int, features: int, dtype: torch.dtype) -> bool:
    """Whether base and delta in one launch are likely to take less time than one after the other.

    They do if what the parts of K write and read in between is little beside what is read anyway; fp32 is left to
    libraries, which need not multiply it exactly. A guess: it has not been measured on a device, and autotuning does
    not ask it.

    Args:
        plan: from `choose_fused`; the rest as there.
    """
    config = plan.config
    assert isinstance(config, Fused)
    between = 8 * (config.SPLIT + 1) * rows * outputs
    read = outputs * features * (dtype.itemsize + min(rows, slots) / 8)
    return dtype.itemsize == 2 and 8 * between <= read
