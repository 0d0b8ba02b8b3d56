"""All accesses of shared memory in one launch, and which barriers they could do without."""

import numpy as np

SEVERAL = -2  # in place of a thread: what a warp or a warpgroup reads as one


class Trace:
    """Who touched which granules between which barriers.

    A second opinion on barriers: nothing is summed up on the way as in `SharedUse`, which remembers
    the last writer and readers only.
    """

    def __init__(self) -> None:
        self.accesses: list[tuple[np.ndarray, ...]] = []
        self.passed: list[np.ndarray] = []

    def touch(
        self, store: bool, granules: np.ndarray, threads: np.ndarray, blocks: np.ndarray
    ) -> None:
        epoch = np.full(granules.size, len(self.passed))
        flat = (np.broadcast_to(a, granules.shape).reshape(-1) for a in (granules, threads, blocks))
        self.accesses.append((*flat, epoch, np.full(granules.size, store)))

    def barrier(self, places: np.ndarray) -> None:
        """Each block passes the barrier at a place of its own."""
        self.passed.append(places)

    def spare(self, place: int) -> bool:
        """Whether without the barrier at `place` all accesses are as ordered as before.

        Two are not if different threads make them, one stores, and no barrier lies between. Copies
        and products in flight count where they are issued and where they are waited for. Barriers
        of warps are ignored, so that rather too few barriers are called spare.
        """
        granules, threads, blocks, epochs, stores = (
            np.concatenate(column) for column in zip(*self.accesses, strict=True)
        )
        others = np.array(self.passed) != place
        before = np.concatenate([np.zeros((1, others.shape[1]), int), np.cumsum(others, 0)])
        found = _conflicts(granules, threads, before[epochs, blocks], stores)
        return found <= _conflicts(granules, threads, epochs, stores)


def _conflicts(
    granules: np.ndarray, threads: np.ndarray, epochs: np.ndarray, stores: np.ndarray
) -> set[int]:
    """Granules that several threads touch in one epoch, and one of them stores."""
    order = np.lexsort((epochs, granules))
    granules, threads, epochs, stores = (a[order] for a in (granules, threads, epochs, stores))
    new = (np.diff(granules, prepend=-1) != 0) | (np.diff(epochs, prepend=-1) != 0)
    starts = np.flatnonzero(new)
    first, last = (f.reduceat(threads, starts) for f in (np.minimum, np.maximum))
    stored = np.logical_or.reduceat(stores, starts)
    return set(granules[starts[stored & (first != last)]].tolist())
