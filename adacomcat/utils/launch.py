"""What the environment says of the processes of one run, as torchrun describes them.

This module does not import torch.
"""

import os
from typing import NamedTuple

from adacomcat.errors import UserError


class Launch(NamedTuple):
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine


def launch() -> Launch:
    """The place of this process; alone where WORLD_SIZE is 1, empty or not set.

    Raises:
        UserError: WORLD_SIZE tells of others, and the other variables do not say where they are.
    """
    world_size = _number("WORLD_SIZE", 1, least=1)
    if world_size == 1:
        return Launch()
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    rank = _number("RANK", 0)
    if lacking or rank >= world_size:
        wrong = f"{' and '.join(lacking)} not set" if lacking else f"RANK {rank}"
        raise UserError(f"the environment has WORLD_SIZE {world_size} and {wrong}; start with "
                        "torchrun, or unset WORLD_SIZE to run alone")
    return Launch(rank, world_size, _number("LOCAL_RANK", 0))


def was_restarted() -> bool:
    """Whether a launcher started the processes anew after some of them failed."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0) > 0


def is_first() -> bool:
    """Whether this process prints and writes for all; so does one that runs alone."""
    try:
        return launch().rank == 0
    except UserError:
        return True


def _number(name: str, default: int, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) < 2**31):
        raise UserError(f"the environment variable {name} must be a whole number of at least "
                        f"{least}; got {text!r}")
    return int(text)
