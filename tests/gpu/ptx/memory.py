"""Device memory that knows what may be touched: allocated, initialised, and by whom."""

import numpy as np

from ptx.trace import SEVERAL

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOBODY = -1
SECTOR = 32  # bytes; the unit in which a GPU moves global memory


class Fault(AssertionError):
    """Something that a kernel may not do."""


class Memory:
    """Bytes, and for each of them whether it is allocated and initialised."""

    def __init__(self, size: int, name: str) -> None:
        size = -(-size // 8) * 8
        self.name = name
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.allocated = np.zeros(size, bool)
        self.initialised = np.zeros(size, bool)
        self.views = {width: self.bytes.view(kind) for width, kind in UNSIGNED.items()}

    def refuse_outside(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Which accesses of `width` bytes touch what is not allocated."""
        outside = (offsets < 0) | (offsets + width > self.bytes.size)
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

    def load(self, granules: np.ndarray, threads: np.ndarray) -> str | None:
        writer = self.writer[granules]
        if ((writer != NOBODY) & (writer != threads)).any():
            return "loads what another thread stored"
        self.loaded[granules] = True
        return None

    def store(self, granules: np.ndarray, threads: np.ndarray) -> str | None:
        writer = self.writer[granules]
        if ((writer != NOBODY) & (writer != threads)).any():
            return "stores what another thread stored"
        if self.loaded[granules].any():
            return "stores over what was loaded"
        self.writer[granules] = threads
        return None


class SharedUse:
    """The last writer and readers of each granule, and when: race detection by barriers passed.

    Two accesses are ordered if one thread made both, or a barrier of the block lies between them,
    or a barrier of the warp if one warp made both. Most kernels have none of the latter, and half
    of this is left out for them.
    """

    def __init__(self, granules: int, warp_barriers: bool = True) -> None:
        self.of_warps = warp_barriers
        self.writer, self.reader, self.reader_warp = (
            np.full(granules, NOBODY, np.int32) for _ in range(3)
        )
        # When: barriers passed by the block, before all of which is -1, and by the warp.
        self.written_block, self.read_block = (np.full(granules, -1, np.int32) for _ in range(2))
        self.written_warp, self.read_warp = (np.zeros(granules, np.int32) for _ in range(2))
        self.written_fence = np.zeros(granules, np.int32)  # proxy fences that the writer had passed

    def load(
        self, granules: np.ndarray, threads: np.ndarray, block: np.ndarray, warp: np.ndarray
    ) -> str | None:
        """`block` and `warp` are the barriers that the threads' block and warp have passed.

        SEVERAL as a thread is none of those that store: it needs a barrier of the block.
        """
        if not self._after_writer(granules, threads, block, warp).all():
            return "loads what another thread stored without a barrier between"
        outdated = self.read_block[granules] < block
        if self.of_warps:
            outdated |= self._warp_has_read(granules, threads, warp)
            self._keep_warp(granules, threads // 32, outdated)
            self.read_warp[granules] = warp
        reader = self.reader[granules]
        self.reader[granules] = np.where(outdated | (reader == threads), threads, SEVERAL)
        # Several lanes may read one granule in this instruction; the last of them was kept.
        shared = self.reader[granules] != threads
        if shared.any():
            self.reader[granules[shared]] = SEVERAL
        self.read_block[granules] = block
        return None

    def store(
        self, granules: np.ndarray, threads: np.ndarray, block: np.ndarray, warp: np.ndarray
    ) -> str | None:
        if not self._after_writer(granules, threads, block, warp).all():
            return "stores over what another thread stored without a barrier between"
        ordered = (self.read_block[granules] < block) | (self.reader[granules] == threads)
        if self.of_warps:
            ordered |= self._warp_has_read(granules, threads, warp)
        if not ordered.all():
            return "stores over what another thread loaded without a barrier between"
        self.writer[granules] = threads
        self.written_block[granules], self.written_warp[granules] = block, warp
        self.read_block[granules] = -1
        return None

    def fenced(
        self, granules: np.ndarray, fences: np.ndarray, last_fence: np.ndarray
    ) -> str | None:
        """What wgmma reads was stored before a proxy fence: the writer's own, or a reader's.

        `fences` counts those of each thread; at the last one the block had passed `last_fence`
        barriers.
        """
        seen = self.written_block[granules] < last_fence
        if not (seen | (fences[self.writer[granules]] > self.written_fence[granules])).all():
            return "by wgmma of what was stored without fence.proxy.async since"
        return None

    def _after_writer(
        self, granules: np.ndarray, threads: np.ndarray, block: np.ndarray, warp: np.ndarray
    ) -> np.ndarray:
        ordered = self.written_block[granules] < block
        if ordered.all():
            return ordered
        writer = self.writer[granules]
        ordered |= writer == threads
        if self.of_warps:
            ordered |= (writer // 32 == threads // 32) & (self.written_warp[granules] < warp)
        return ordered

    def _warp_has_read(
        self, granules: np.ndarray, threads: np.ndarray, warp: np.ndarray
    ) -> np.ndarray:
        """Only the threads' own warp has read, and passed a barrier of its own since."""
        return (self.reader_warp[granules] == threads // 32) & (self.read_warp[granules] < warp)

    def _keep_warp(self, granules: np.ndarray, own: np.ndarray, outdated: np.ndarray) -> None:
        warps = self.reader_warp[granules]
        self.reader_warp[granules] = np.where(outdated | (warps == own), own, SEVERAL)
        across = self.reader_warp[granules] != own
        self.reader_warp[granules[across]] = SEVERAL


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
