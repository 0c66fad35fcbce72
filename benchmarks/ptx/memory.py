"""What a kernel can reach: tensors in host memory, and the shared memory of its blocks.

An access outside, a misaligned one, two warps that meet in shared memory without a barrier in between, and touching
what a copy or a matrix instruction under way needs are errors. Not looked for: races in global memory, registers that a
matrix instruction under way has not written yet, and fences.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
SECTOR = 32  # bytes that global memory moves at least


class Fault(Exception):
    """The kernel did what a GPU would not allow, or would answer differently from one time to the next."""


class GlobalMemory:
    """The storages of some tensors, at their own addresses.

    Attributes:
        sectors: 32-byte sectors moved, counted once for each instruction of a warp, by the address of the storage.
    """

    def __init__(self, tensors: list[Tensor], count: bool) -> None:
        self._count = count
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        starts = [start for start in sorted(storages) if storages[start].nbytes()]
        self._starts = np.array(starts, np.uint64)
        self._bytes = [torch.empty(0, dtype=torch.uint8).set_(storages[start]).numpy() for start in starts]
        self.sectors = dict.fromkeys(starts, 0)

    def load(self, addresses: Array, threads: Array, size: int, count: int) -> Array:
        """`count` words of `size` bytes at each address [k]: unsigned [k, count]."""
        out = np.empty((len(addresses), count), f"u{size}")
        for chosen, words, first in self._places(addresses, threads, size, count):
            out[chosen] = words[first[:, None] + np.arange(count)]
        return out

    def store(self, addresses: Array, threads: Array, values: Array) -> None:
        """`values`, unsigned [k, count], to each address [k]."""
        size, count = values.dtype.itemsize, values.shape[1]
        for chosen, words, first in self._places(addresses, threads, size, count):
            places = first[:, None] + np.arange(count)
            words[places] = values[chosen]
            if not np.array_equal(words[places], values[chosen]):
                raise Fault("threads store different values at one address at the same time")

    def add(self, address: int, value: int) -> int:
        """uint32 there before `value` was added."""
        before = self.load(np.array([address], np.uint64), np.zeros(1, np.int64), 4, 1)
        self.store(np.array([address], np.uint64), np.zeros(1, np.int64), before + np.uint32(value))
        return int(before[0, 0])

    def _places(self, addresses: Array, threads: Array, size: int, count: int):  # type: ignore[no-untyped-def]
        if (addresses % np.uint64(size * count)).any():
            raise Fault(f"an address is not a multiple of the {size * count} bytes at it")
        region = np.searchsorted(self._starts, addresses, side="right") - 1
        for each in np.unique(region):
            chosen = region == each if len(region) and (region != each).any() else slice(None)
            at = addresses[chosen] - self._starts[max(each, 0)]
            held = self._bytes[max(each, 0)]
            if each < 0 or int(at.max()) + size * count > len(held):
                raise Fault("an address is in none of the tensors that the kernel was given")
            start = int(self._starts[each])
            if self._count:
                lines = (threads[chosen] // 32).astype(np.uint64) << np.uint64(40) | at // np.uint64(SECTOR)
                self.sectors[start] += len(np.unique(lines)) * max(1, size * count // SECTOR)
            yield chosen, held[: len(held) // size * size].view(f"u{size}"), (at // np.uint64(size)).astype(np.int64)


@dataclasses.dataclass
class _Access:
    """What goes on beside the instructions: `size` bytes at each of `places` [k], for these threads.

    Attributes:
        group: [k], how many groups its thread had committed before.
        data: what is written, bytes [k, size]; None for a read.
    """

    places: Array
    threads: Array
    size: int
    group: Array
    data: Array | None = None

    def some(self, chosen: Array) -> _Access:
        data = None if self.data is None else self.data[chosen]
        return _Access(self.places[chosen], self.threads[chosen], self.size, self.group[chosen], data)


class _UnderWay:
    """Accesses that go on until their thread waits for the group that it committed them in."""

    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int64)
        self.accesses: list[_Access] = []

    def begin(self, places: Array, threads: Array, size: int, data: Array | None = None) -> None:
        self.accesses.append(_Access(places, threads, size, self._committed[threads], data))

    def commit(self, threads: Array) -> None:
        self._committed[threads] += 1

    def wait(self, threads: Array, left: int) -> list[_Access]:
        """What is over once each of the threads has at most `left` groups under way."""
        over = np.zeros(len(self._committed), np.int64)
        over[threads] = self._committed[threads] - left
        ended = [(each, each.group < over[each.threads]) for each in self.accesses]
        self.accesses = [each.some(~done) for each, done in ended if not done.all()]
        return [each.some(done) for each, done in ended if done.any()]


class SharedMemory:
    """Shared memory of all blocks that run, one after the other; filled with what nobody wants to see.

    Attributes:
        copies: from global memory, under way.
        reads: of matrix instructions, under way.
        conflicts: passes over the 32 banks beyond those that the number of bytes needs.
    """

    GRANULE = 2

    def __init__(self, size: int, blocks: int, threads: int, count: bool) -> None:
        """
        Args:
            size: bytes of a block.  threads: of all blocks.  count: count conflicts.
        """
        self.size = size
        self._count = count
        self._bytes = np.full(size * blocks, 0xA7, np.uint8)
        granules = size * blocks // self.GRANULE
        self._writer = np.zeros(granules, np.int32)  # 0: nobody since the last barrier, else warp + 1
        self._readers = np.zeros(granules, np.uint32)  # a bit for each warp of the block
        self._copied = np.zeros(granules, bool)  # a copy that is under way writes there
        self._multiplied = np.zeros(granules, np.int16)  # matrix instructions under way that read there
        self.copies, self.reads = _UnderWay(threads), _UnderWay(threads)
        self.conflicts = 0

    def load(self, places: Array, threads: Array, size: int, count: int) -> Array:
        """`count` words of `size` bytes at each place [k], block and offset in one: unsigned [k, count]."""
        first = self._checked(places, size, count)
        self._read(places, threads, size * count)
        self._count_conflicts(places, threads, size * count)
        return self._bytes.view(f"u{size}")[first]

    def store(self, places: Array, threads: Array, values: Array) -> None:
        """`values`, unsigned [k, count], to each place [k]."""
        size, count = values.dtype.itemsize, values.shape[1]
        first = self._checked(places, size, count)
        words = self._bytes.view(f"u{size}")
        same = (words[first] == values).all(1)
        self._write(places[~same], threads[~same], size * count)
        words[first] = values
        if not np.array_equal(words[first], values):
            raise Fault("threads store different values at one place of shared memory at the same time")
        self._count_conflicts(places, threads, size * count)

    def copy_later(self, places: Array, threads: Array, data: Array) -> None:
        """`data`, bytes [k, width], for each place [k], there once its group has been waited for.

        Until then nobody may touch the place: the copy may have happened, or not.
        """
        width = data.shape[1]
        self._checked(places, width, 1)
        self._write(places, threads, width)
        self._copied[self._granules(places, threads, width)[0]] = True
        self.copies.begin(places, threads, width, data)

    def wait_for_copies(self, threads: Array, left: int) -> None:
        for copy in self.copies.wait(threads, left):
            assert copy.data is not None
            self._copied[self._granules(copy.places, copy.threads, copy.size)[0]] = False
            self._write(copy.places, copy.threads, copy.size)
            at = copy.places[:, None] + np.arange(copy.size)
            self._bytes[at] = copy.data
            if not np.array_equal(self._bytes[at], copy.data):
                raise Fault("threads copy different values to one place of shared memory at the same time")

    def read_until_waited_for(self, places: Array, threads: Array, size: int) -> Array:
        """`size` bytes at each place, by a matrix instruction that runs on: uint8 [k, size].

        It is no warp's: what any has written needs a barrier before it, and nobody may write until it was waited for.
        """
        nobody = np.full_like(threads, -32)
        self._read(places, nobody, size)
        np.add.at(self._multiplied, self._granules(places, nobody, size)[0], 1)
        self.reads.begin(places, threads, size)
        return self._bytes[self._checked(places, 1, size)]

    def wait_for_reads(self, threads: Array, left: int) -> None:
        for read in self.reads.wait(threads, left):
            np.subtract.at(self._multiplied, self._granules(read.places, read.threads, read.size)[0], 1)

    def barrier(self, blocks: Array | None) -> None:
        """All threads of `blocks` (None: of all) have met."""
        if blocks is None:
            self._writer[:] = 0
            self._readers[:] = 0
        else:
            for block in blocks:
                part = slice(block * self.size // self.GRANULE, (block + 1) * self.size // self.GRANULE)
                self._writer[part] = 0
                self._readers[part] = 0

    def _checked(self, places: Array, size: int, count: int) -> Array:
        """Where the `count` words of `size` bytes at each place are: [k, count]."""
        if len(places) and int((places % self.size).max()) + size * count > self.size:
            raise Fault("a place is outside of the block's shared memory")
        if (places % (size * count)).any():
            raise Fault(f"a place in shared memory is not a multiple of the {size * count} bytes at it")
        return places[:, None] // size + np.arange(count)

    def _granules(self, places: Array, threads: Array, size: int) -> tuple[Array, Array]:
        """Granules that threads touch, and by which warp."""
        if size % self.GRANULE:
            raise NotImplementedError("single bytes of shared memory")
        each = places[:, None] // self.GRANULE + np.arange(size // self.GRANULE)
        return each.ravel(), np.repeat(threads // 32, each.shape[1])

    def _read(self, places: Array, threads: Array, size: int) -> None:
        granule, warp = self._granules(places, threads, size)
        self._not_copied(granule)
        writer = self._writer[granule]
        if ((writer != 0) & (writer != warp + 1)).any():
            raise Fault("a warp reads from shared memory what another wrote, without a barrier in between")
        np.bitwise_or.at(self._readers, granule, _bit(warp))

    def _write(self, places: Array, threads: Array, size: int) -> None:
        granule, warp = self._granules(places, threads, size)
        self._not_copied(granule)
        if self._multiplied[granule].any():
            raise Fault("a thread writes to shared memory what a matrix instruction under way reads")
        writer, readers = self._writer[granule], self._readers[granule]
        if ((writer != 0) & (writer != warp + 1)).any() or (readers & ~_bit(warp)).any():
            raise Fault("a warp writes to shared memory what another wrote or read, without a barrier in between")
        self._writer[granule] = warp + 1

    def _not_copied(self, granule: Array) -> None:
        if self._copied[granule].any():
            raise Fault("a thread touches shared memory that a copy under way writes to")

    def _count_conflicts(self, places: Array, threads: Array, size: int) -> None:
        """A pass serves 32 banks of four bytes; a wide access takes 16 or 8 lanes at a time."""
        if not self._count:
            return
        words = (places // 4)[:, None] + np.arange(max(1, size // 4))
        turn = np.repeat(threads // (32 // max(1, size // 4)), words.shape[1])
        each = np.unique(np.stack([turn, words.ravel()]), axis=1)
        turns, turn = np.unique(each[0], return_inverse=True)
        passes = np.bincount(turn * 32 + each[1] % 32, minlength=32 * len(turns)).reshape(-1, 32).max(1)
        self.conflicts += int(passes.sum()) - len(turns)


def _bit(warp: Array) -> Array:
    """The bit of a warp among those of its block, of which there are at most 32."""
    return np.uint32(1) << (warp % 32).astype(np.uint32)
