"""The only table of kernel shapes, and the only place that picks a kernel: by static facts, never by a tensor's data.

Needs no triton. Which entry is fastest has not been measured on a device: the order within a list is a guess from
instruction counts and occupancy, and autotuning takes any entry of the list.
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
    """Exact products of W R tiles of 16 outputs and BM rows of a slot, with W warps and U blocks per step.

    In the table BM is the rows of x in one part; of x in several parts fewer rows take the same place.
    """

    R: int
    W: int
    U: int
    BM: int
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
EXACT_DECODE = (Exact(2, 4, 2, 8, 3),)
FUSED_DECODE = (Fused(BINARY_DECODE[0], 64, 4, 4), Fused(BINARY_DECODE[2], 64, 4, 4))
# Signs are a sixteenth of x's bytes: many outputs ask least of the caches. What is larger spills. The second is for few
# rows of each slot, for sm_120, where the first may spill, and for AMD, which has less shared memory. The third is for
# sm_100: with four warps Triton keeps the signs of all 16 bits in tensor memory, twice what there is.
PREFILL = (Exact(2, 8, 1, 64, 3), Exact(2, 8, 1, 32, 3), Exact(2, 2, 2, 32, 3))
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
    """

    config: Binary | Exact | Fused
    wide: bool = False
    splits: int = 1
    sorted: bool = False
    form: str = "asm"


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
    form = "asm" if isinstance(arch, int) else "plain"
    many = PREFILL[1]
    if isinstance(arch, int) and 100 <= arch < 120:
        many = PREFILL[2]
    elif isinstance(arch, int) and arch < 100 and rows >= slots * PREFILL[0].BM:
        many = PREFILL[0]
    if rows > DECODE_ROWS:
        parts = splits(dtype, column, exact)
        return Plan(many.of_parts(parts), splits=parts, sorted=True, form=form)
    # From sm_100 on there is no binary MMA: it would be emulated.
    binary = not exact and isinstance(arch, int) and arch < 100 and features <= BINARY_FEATURES
    parts = splits(dtype, column, True)
    if unbounded is not None and not (binary and unbounded.decodes):
        return Plan(many.of_parts(parts), splits=parts, sorted=True, form=form)
    if not binary:
        config = EXACT_DECODE[0].of_parts(parts)
        if rows > slots * config.BM:
            config = many.of_parts(parts)
        return Plan(config, splits=parts, form=form)
    wide = column or dtype == torch.float32  # x that has more than 16 bits
    if rows > slots and _may_group(unbounded):
        return Plan(BINARY_DECODE[2], wide=wide)
    few = -(-outputs // (16 * BINARY_DECODE[0].tiles)) * rows < 256
    return Plan(BINARY_DECODE[1 if few else 0], wide=wide)


def alternatives(plan: Plan, unbounded: Unbounded | None = None) -> tuple[Binary | Exact | Fused, ...]:
    """The plan's entry and the others of its list that may take its place, for autotuning."""
    exact = (tuple(entry.of_parts(plan.splits) for entry in entries) for entries in (EXACT_DECODE, PREFILL))
    lists: tuple[tuple[Binary | Exact | Fused, ...], ...] = (BINARY_DECODE, FUSED_DECODE, *exact)
    others = next((entries for entries in lists if plan.config in entries), ())
    grouped = _may_group(unbounded)
    allowed = [entry for entry in others if grouped or _rows_together(entry) == 1]
    return tuple(dict.fromkeys([plan.config, *allowed]))


def _rows_together(entry: Binary | Exact | Fused) -> int:
    """Rows of a slot that must find each other; those of an `Exact` entry can be sorted."""
    binary = entry.delta if isinstance(entry, Fused) else entry
    return binary.G if isinstance(binary, Binary) else 1


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
    return dataclasses.replace(plan, config=FUSED_DECODE[1 if plan.config.G > 1 else 0])


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
