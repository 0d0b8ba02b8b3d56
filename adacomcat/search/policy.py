"""When to search: at the start of which epochs, counted from 1."""

from typing import Any

from adacomcat.errors import UserError


class EveryEpoch:
    """ComCAT: every epoch."""

    def due(self, epoch: int) -> bool:
        return epoch >= 1

    def record(self, epoch: int, ranks: list[int]) -> None:
        """Take note of the ranks (per site, 'dense' as the full rank) that a search found."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Off(EveryEpoch):
    def due(self, epoch: int) -> bool:
        return False


class Doubling(EveryEpoch):
    """Adaptive-ComCAT: search iff epoch mod F = 0; F ← 2F while the ranks stay, else 1."""

    def __init__(self) -> None:
        self.frequency = 1
        self.ranks: list[int] | None = None

    def due(self, epoch: int) -> bool:
        return epoch >= 1 and epoch % self.frequency == 0

    def record(self, epoch: int, ranks: list[int]) -> None:
        if epoch > 1:
            self.frequency = 2 * self.frequency if ranks == self.ranks else 1
        self.ranks = list(ranks)


class Graded(EveryEpoch):
    """F ← max(1, F · 2^(1 - d/0.05)), d = Σ|r - r'| / Σ r' the relative movement of all ranks.

    Ranks that stay double F as above; a rank list that moved by a step or two still lets F grow.
    The next search is F epochs after the last.
    """

    TOLERANCE = 0.05
    FASTEST = 2.0  # doublings that one search may take back

    def __init__(self) -> None:
        self.frequency = 1.0
        self.ranks: list[int] | None = None
        self.last = 0

    def due(self, epoch: int) -> bool:
        return epoch >= self.last + round(self.frequency)

    def record(self, epoch: int, ranks: list[int]) -> None:
        if self.ranks is not None:
            moved = sum(abs(a - b) for a, b in zip(ranks, self.ranks, strict=True))
            doublings = 1 - moved / sum(self.ranks) / self.TOLERANCE
            self.frequency = max(1.0, self.frequency * 2 ** max(doublings, -self.FASTEST))
        self.ranks, self.last = list(ranks), epoch


POLICIES = {"adaptive": Doubling, "every": EveryEpoch, "graded": Graded, "off": Off}


def make_policy(name: str) -> EveryEpoch:
    if name not in POLICIES:
        raise UserError(f"unknown search policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
