"""Random numbers as a function of where a run stands, so that resuming needs no generator state."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*key: int) -> int:
    """One 32-bit seed from (seed, epoch, step, …)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def derived_generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*key))


@contextmanager
def numpy_seeded(*key: int) -> Iterator[None]:
    """timm's Mixup draws from numpy's global generator: seeded inside, as it was after."""
    state = np.random.get_state()
    np.random.seed(derived_seed(*key))
    try:
        yield
    finally:
        np.random.set_state(state)
