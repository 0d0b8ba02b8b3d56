"""The architecture parameters: a distribution over the candidate ranks of every site."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.allocation.knapsack import Choice, fill, knapsack
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site

# The logit of a candidate falls by this for every step away from the allocation's, at most so many
# times: small enough for a few steps on α to overcome.
STEP_DOWN = 0.03
MOST_STEPS = 6


def candidates(site: Site, multiple: int) -> tuple[Rank, ...]:
    """The site's candidates; a folded site's 'dense' is its full rank per head."""
    ranks = site.candidates(multiple)
    return (*ranks[:-1], site.full_rank) if site.folded else ranks


def numeric_rank(site: Site, rank: Rank) -> int:
    """``rank`` as a number: 'dense' is the full rank."""
    return site.full_rank if rank == DENSE else rank


def reachable_multiple(sites: list[Site], budget: float, multiple: int = MULTIPLE) -> int:
    """The coarsest step of ranks at which all sites together can have ``budget`` parameters.

    Raises:
        UserError: not even a step of 1 can; the message names the least.
    """
    while True:
        least = sum(min(site.params(rank) for rank in candidates(site, multiple))
                    for site in sites)
        if least <= budget:
            return multiple
        if multiple == 1:
            raise UserError(f"the budget leaves {budget:.0f} parameters for {len(sites)} "
                            f"projections; they need at least {least}: keep more")
        multiple //= 2


class RankGates(nn.Module):
    """Logits α (sites, K) over candidate ranks; m = softmax((α + Gumbel noise) / τ).

    Sites with fewer than K candidates are padded with candidates of probability zero.

    Args:
        sites: the decisions to take.
        multiple: the step of candidate ranks.
        menu: site → its candidate ranks, ascending, in place of the steps.
    """

    valid: Tensor  # (sites, K) which candidates are no padding
    costs: Tensor  # (sites, K) parameters of each candidate

    def __init__(self, sites: list[Site], multiple: int = MULTIPLE,
                 menu: Callable[[Site], tuple[Rank, ...]] | None = None) -> None:
        super().__init__()
        self.sites = sites
        self.candidates = [menu(site) if menu else candidates(site, multiple) for site in sites]
        width = max(len(ranks) for ranks in self.candidates)
        valid = torch.zeros(len(sites), width, dtype=torch.bool)
        costs = torch.zeros(len(sites), width)
        for row, (site, ranks) in enumerate(zip(sites, self.candidates, strict=True)):
            valid[row, :len(ranks)] = True
            costs[row, :len(ranks)] = torch.tensor([float(site.params(rank)) for rank in ranks])
        self.logits = nn.Parameter(torch.zeros(len(sites), width))
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("costs", costs, persistent=False)
        for row, site in enumerate(sites):
            self.register_buffer(f"first_{row}", self._first(site, self.candidates[row]),
                                 persistent=False)

    @staticmethod
    def _first(site: Site, ranks: tuple[Rank, ...]) -> Tensor:
        """(R,) the first candidate that keeps column j; K, the width, where none does."""
        columns = torch.arange(1, site.full_rank + 1)
        return torch.searchsorted(torch.tensor([numeric_rank(site, rank) for rank in ranks]),
                                  columns)

    @torch.no_grad()
    def start_at_(self, plan: RankPlan) -> None:
        """α falls off linearly around the plan's candidates."""
        for row, (site, ranks) in enumerate(zip(self.sites, self.candidates, strict=True)):
            here = ranks.index(plan[site.name])
            distance = (torch.arange(len(ranks)) - here).abs().clamp(max=MOST_STEPS)
            self.logits[row, :len(ranks)] = -STEP_DOWN * distance.to(self.logits)

    def _masked(self) -> Tensor:
        return self.logits.masked_fill(~self.valid, -torch.inf)

    def sample(self, temperature: float, generator: torch.Generator) -> Tensor:
        """m (sites, K): equal on all processes whose generators are in the same state."""
        noise = -torch.empty(self.logits.shape).exponential_(generator=generator).log()
        return ((self._masked() + noise.to(self.logits)) / temperature).softmax(-1)

    def gates(self, mixture: Tensor) -> dict[str, Tensor]:
        """Site name → g (R,), g_j = Σ_{i: r_i ≥ j} m_i."""
        tails = F.pad(mixture.flip(1).cumsum(1).flip(1), (0, 1))  # no candidate keeps the rest
        return {site.name: tails[row][self.get_buffer(f"first_{row}")]
                for row, site in enumerate(self.sites)}

    def expected_params(self, mixture: Tensor) -> Tensor:
        """Σ_sites Σ_i m_i params(r_i)."""
        return (mixture * self.costs).sum()

    @torch.no_grad()
    def entropy(self) -> float:
        """The mean over sites of the entropy of softmax(α), as a part of the uniform one's."""
        logs = self._masked().double().log_softmax(-1)
        entropies = -(logs.exp() * logs.masked_fill(~self.valid, 0.0)).sum(-1)
        most = self.valid.sum(-1).double().log()
        return (entropies / most.clamp_min(1e-30)).mean().item()

    @torch.no_grad()
    def plan(self, budget: float) -> RankPlan:
        """The most likely plan of at most ``budget`` parameters in all sites together.

        What the plan leaves of the budget buys more rank where that is least unlikely.

        Raises:
            UserError: no plan has so few parameters.
        """
        log_probabilities = self._masked().double().log_softmax(-1).tolist()
        items = [[Choice(site.params(rank), -log_probability) for rank, log_probability
                  in zip(ranks, row, strict=False)]
                 for site, ranks, row in zip(self.sites, self.candidates, log_probabilities,
                                             strict=True)]
        chosen = knapsack(items, budget)
        if chosen is None:
            raise UserError(f"no plan has at most {budget:.0f} parameters in its projections")
        fill(items, chosen, budget)
        return _plan_of(self.sites, self.candidates, chosen)

    @torch.no_grad()
    def likeliest(self) -> RankPlan:
        """The most likely rank of every site, whatever they cost together."""
        chosen = self._masked().argmax(-1).tolist()
        return _plan_of(self.sites, self.candidates, chosen)

    def largest(self) -> RankPlan:
        """The last candidate of every site."""
        return _plan_of(self.sites, self.candidates, [-1] * len(self.sites))


def _plan_of(sites: list[Site], ranks: list[tuple[Rank, ...]], chosen: list[int]) -> RankPlan:
    return RankPlan({site.name: candidates[index] for site, candidates, index
                     in zip(sites, ranks, chosen, strict=True)})


def uniform_plan(sites: list[Site], budget: float, multiple: int) -> RankPlan:
    """About the same fraction of the break-even rank everywhere, as large as ``budget`` allows."""
    ranks = [candidates(site, multiple) for site in sites]
    items = [[Choice(site.params(rank), _fraction(site, rank) ** 2) for rank in choices]
             for site, choices in zip(sites, ranks, strict=True)]
    chosen = [min(range(len(item)), key=lambda i, item=item: item[i].cost) for item in items]
    fill(items, chosen, budget)
    return _plan_of(sites, ranks, chosen)


def _fraction(site: Site, rank: Rank) -> float:
    return numeric_rank(site, rank) / site.break_even
