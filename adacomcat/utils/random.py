"""Seeds derived from the position of a run, so that resuming needs no generator's state."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*key: int) -> int:
    """One 32-bit seed from (seed, epoch, step, …)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def derived_generator(*key: int) -> torch.Generator:
    """A generator with the seed of ``key``."""
    return torch.Generator().manual_seed(derived_seed(*key))


@contextmanager
def numpy_seeded(*key: int) -> Iterator[None]:
    """Inside, numpy's global generator, which timm's Mixup uses, has the seed of ``key``.

    Afterwards it has its former state.
    """
    state = np.random.get_state()
    np.random.seed(derived_seed(*key))
    try:
        yield
    finally:
        np.random.set_state(state)
