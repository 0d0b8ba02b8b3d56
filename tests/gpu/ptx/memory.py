"""Memory that records which bytes are allocated and initialised, and which threads used them."""

from dataclasses import dataclass

import numpy as np

from ptx.trace import SEVERAL

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# numpy moves one element of 16 bytes by its index far faster than its parts one by one.
ELEMENTS = {**UNSIGNED, 16: np.complex128}
NOBODY = -1
SECTOR = 32  # bytes; the unit in which a GPU moves global memory
# A barrier count and a thread of a block are one number, barriers * EPOCH + thread.
EPOCH = 2048


def _as_large_elements(
    table: np.ndarray, runs: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """A view of the table with few large elements a run, and the indices of a run's elements."""
    size = table.itemsize * count
    if size > 16:
        pieces = size // 16
        return table.view(ELEMENTS[16]), runs[:, None] * pieces + np.arange(pieces)
    return table.view(ELEMENTS[size]), runs


def take(table: np.ndarray, runs: np.ndarray, count: int) -> np.ndarray:
    """(runs, count): the elements from i * count on, for each run i."""
    large, at = _as_large_elements(table, runs, count)
    return large[at].view(table.dtype).reshape(-1, count)


def put(table: np.ndarray, runs: np.ndarray, count: int, values: np.ndarray | int) -> None:
    """Store values at the places that `take` reads; the last one of equal runs stays."""
    large, at = _as_large_elements(table, runs, count)
    if isinstance(values, int):
        large[at] = np.full(count, values, table.dtype).view(large.dtype)
        return
    if values.shape[1] != count:
        values = np.broadcast_to(values, (len(runs), count))
    values = np.ascontiguousarray(values, table.dtype)
    large[at] = values.view(large.dtype).reshape(at.shape)


class Fault(AssertionError):
    """A kernel did something that it may not do."""


class Memory:
    """Bytes, and for each of them whether it is allocated and initialised."""

    def __init__(self, size: int, name: str) -> None:
        size = -(-size // 16) * 16
        self.name = name
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.allocated = np.zeros(size, bool)
        self.initialised = np.zeros(size, bool)
        self.views = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}

    def refuse_outside(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of `width` bytes touch what is not allocated."""
        outside = (offsets < 0) | (offsets > self.bytes.size - width)
        if not outside.any() and take(self.allocated, offsets // width, width).all():
            return outside
        inside = np.where(outside, 0, offsets)
        return outside | ~(self.allocated[inside] & self.allocated[inside + width - 1])


class GlobalUse:
    """Who used each granule of global memory in this launch.

    Stricter than the language: what one thread stores no other thread may load or store, barriers
    or not.
    """

    def __init__(self, granules: int) -> None:
        self.writer = np.full(granules, NOBODY, np.int32)
        self.loaded = np.zeros(granules, bool)

    def load(self, runs: np.ndarray, count: int, threads: np.ndarray) -> str | None:
        """Each thread loads one run of `count` granules."""
        if self._stored_by_others(runs, count, threads):
            return "loads what another thread stored"
        put(self.loaded, runs, count, True)
        return None

    def store(self, runs: np.ndarray, count: int, threads: np.ndarray) -> str | None:
        if self._stored_by_others(runs, count, threads):
            return "stores what another thread stored"
        if take(self.loaded, runs, count).any():
            return "stores over what was loaded"
        put(self.writer, runs, count, threads[:, None])
        return None

    def _stored_by_others(self, runs: np.ndarray, count: int, threads: np.ndarray) -> bool:
        writer = take(self.writer, runs, count)
        stored = writer != NOBODY
        return bool(stored.any() and (stored & (writer != threads[:, None])).any())


@dataclass
class Access:
    """What one instruction does to shared memory: each thread touches one run of `count` granules.

    Threads are numbered in their block, and in ascending order; SEVERAL is none of those that
    store: it needs a barrier of the block. Barriers are counted that all blocks have passed, or
    each thread's warp, where any warp passes one.
    """

    runs: np.ndarray
    count: int
    threads: np.ndarray
    barriers: int
    warp_barriers: np.ndarray | None
    collective: bool = False

    def __post_init__(self) -> None:
        self.start = self.barriers * EPOCH
        if self.collective:
            self.threads = np.full(len(self.runs), SEVERAL)
            self.rising = self.falling = np.full((len(self.runs), 1), self.start + EPOCH - 1)
        else:
            self.rising = self.threads[:, None] + self.start
            self.falling = self.start + EPOCH - 2 - self.threads[:, None]

    @property
    def granules(self) -> np.ndarray:
        return self.runs[:, None] * self.count + np.arange(self.count)


class SharedUse:
    """The last writer and readers of each granule, and when: race detection by barriers passed.

    Two accesses are ordered if one thread made both, or a barrier of the block lies between them,
    or a barrier of the warp if one warp made both. Most kernels have none of the latter, and half
    of this is left out for them.

    When and who are one number, larger for a later one. Of those that have read since the last
    barrier the highest and the lowest are known, the latter by a number that falls with the
    thread's: a thread above neither was the only one.
    """

    def __init__(self, granules: int, warp_barriers: bool = True) -> None:
        self.of_warps = warp_barriers
        self.written, self.highest, self.lowest = (
            np.full(granules, NOBODY, np.int32) for _ in range(3)
        )
        self.written_fence = np.zeros(granules, np.int32)  # proxy fences that the writer had passed
        if warp_barriers:
            self.written_warp, self.read_warp = (np.zeros(granules, np.int32) for _ in range(2))
            self.reader_warp = np.full(granules, NOBODY, np.int32)

    def load(self, access: Access) -> str | None:
        runs, count = access.runs, access.count
        if not self._after_writer(access).all():
            return "loads what another thread stored without a barrier between"
        highest, lowest = take(self.highest, runs, count), take(self.lowest, runs, count)
        if self.of_warps:
            outdated = self._warp_has_read(access)
            highest[outdated] = lowest[outdated] = NOBODY
            self._keep_warp(access, highest < access.start)
        # Several lanes may read one granule in this instruction: the highest comes last.
        put(self.highest, runs, count, np.maximum(highest, access.rising))
        put(self.lowest, runs[::-1], count, np.maximum(lowest, access.falling)[::-1])
        return None

    def store(self, access: Access, fences: np.ndarray) -> str | None:
        """`fences` are the proxy fences that each thread has passed."""
        runs, count = access.runs, access.count
        if not self._after_writer(access).all():
            return "stores over what another thread stored without a barrier between"
        ordered = take(self.highest, runs, count) <= access.rising
        ordered &= take(self.lowest, runs, count) <= access.falling
        if self.of_warps:
            ordered |= self._warp_has_read(access)
        if not ordered.all():
            return "stores over what another thread loaded without a barrier between"
        put(self.written, runs, count, access.rising)
        put(self.written_fence, runs, count, fences[:, None])
        if self.of_warps:
            put(self.written_warp, runs, count, access.warp_barriers[:, None])
        return None

    def fenced(
        self, access: Access, first: np.ndarray, fences: np.ndarray, last_fence: np.ndarray
    ) -> str | None:
        """What wgmma reads was stored before a proxy fence: the writer's own, or a reader's.

        `fences` counts those of each thread of the grid, of which the blocks' `first` ones are
        given; at the last one the block had passed `last_fence` barriers.
        """
        written = take(self.written, access.runs, access.count)
        seen = written < last_fence[:, None] * EPOCH
        if seen.all():
            return None
        passed = fences[written % EPOCH + first[:, None]]
        if not (seen | (passed > take(self.written_fence, access.runs, access.count))).all():
            return "by wgmma of what was stored without fence.proxy.async since"
        return None

    def _after_writer(self, access: Access) -> np.ndarray:
        written = take(self.written, access.runs, access.count)
        ordered = written < access.start
        if ordered.all():
            return ordered
        ordered |= written == access.rising
        if self.of_warps:
            same_warp = written % EPOCH // 32 == access.threads[:, None] // 32
            ordered |= same_warp & (self.written_warp[access.granules]
                                    < access.warp_barriers[:, None])
        return ordered

    def _warp_has_read(self, access: Access) -> np.ndarray:
        """Only the threads' own warp has read, and passed a barrier of its own since."""
        granules, own = access.granules, access.threads[:, None] // 32
        passed = self.read_warp[granules] < access.warp_barriers[:, None]
        return (self.reader_warp[granules] == own) & passed

    def _keep_warp(self, access: Access, outdated: np.ndarray) -> None:
        granules, own = access.granules, access.threads[:, None] // 32
        warps = self.reader_warp[granules]
        self.reader_warp[granules] = np.where(outdated | (warps == own), own, SEVERAL)
        across = self.reader_warp[granules] != own
        self.reader_warp[granules[across]] = SEVERAL
        self.read_warp[granules] = access.warp_barriers[:, None]


class Traffic:
    """Sectors of global memory: asked for by warps, and distinct ones, by buffer and direction."""

    def __init__(self, size: int) -> None:
        self.requested: dict[tuple[int, str], int] = {}
        self.touched = {kind: np.zeros(size // SECTOR + 1, bool) for kind in ("load", "store")}
        self.ideal = {"load": 0, "store": 0}

    def count(
        self, kind: str, offsets: np.ndarray, width: int, warps: np.ndarray, buffers: np.ndarray
    ) -> None:
        first, last = offsets // SECTOR, (offsets + width - 1) // SECTOR
        key = np.unique(np.concatenate([warps * (1 << 40) + first, warps * (1 << 40) + last]))
        sectors = key & ((1 << 40) - 1)
        self.touched[kind][sectors] = True
        self.ideal[kind] += -(-offsets.size * width // SECTOR)
        found, counts = np.unique(np.searchsorted(buffers, sectors * SECTOR + SECTOR - 1, "right"),
                                  return_counts=True)
        for buffer, count in zip(found - 1, counts, strict=True):
            at = (int(buffer), kind)
            self.requested[at] = self.requested.get(at, 0) + int(count)
