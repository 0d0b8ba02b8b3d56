"""The architecture parameters: a distribution over the candidate ranks of every site."""

import torch
from torch import Tensor, nn

from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site

# One candidate away from the allocation starts this much less likely, in logits: a few steps on α
# can leave it behind.
STEP_DOWN = 0.03
MOST_STEPS = 6


def candidates(site: Site, multiple: int) -> tuple[Rank, ...]:
    """The site's candidates; a folded site's 'dense' is its full rank per head."""
    ranks = site.candidates(multiple)
    return (*ranks[:-1], site.full_rank) if site.folded else ranks


def reachable_multiple(sites: list[Site], budget: float, multiple: int = MULTIPLE) -> int:
    """The coarsest step of ranks at which ``budget`` parameters in all sites can be met."""
    while multiple:
        least = sum(min(site.params(rank) for rank in candidates(site, multiple))
                    for site in sites)
        if least <= budget:
            return multiple
        multiple //= 2
    raise UserError(f"the budget leaves {budget:.0f} parameters for {len(sites)} projections; "
                    f"they need at least {least}: keep more")


class RankGates(nn.Module):
    """Logits α (sites, K) over candidate ranks; m = softmax((α + Gumbel noise) / τ).

    Sites with fewer than K candidates are padded with candidates of probability zero.
    """

    def __init__(self, sites: list[Site], multiple: int = MULTIPLE) -> None:
        super().__init__()
        self.sites = sites
        self.candidates = [candidates(site, multiple) for site in sites]
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
        """(R,) the first candidate that keeps column j."""
        full = [site.full_rank if rank == DENSE else rank for rank in ranks]
        columns = torch.arange(1, site.full_rank + 1)
        return torch.searchsorted(torch.tensor(full), columns)

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
        """m (sites, K), the same on every process that passes the same generator state."""
        noise = -torch.empty(self.logits.shape).exponential_(generator=generator).log()
        return ((self._masked() + noise.to(self.logits)) / temperature).softmax(-1)

    def gates(self, mixture: Tensor) -> dict[str, Tensor]:
        """Site name → g (R,), g_j = Σ_{i: r_i ≥ j} m_i."""
        tails = mixture.flip(1).cumsum(1).flip(1)
        return {site.name: tails[row][self.get_buffer(f"first_{row}")]
                for row, site in enumerate(self.sites)}

    def expected_params(self, mixture: Tensor) -> Tensor:
        """Σ_sites Σ_i m_i params(r_i)."""
        return (mixture * self.costs).sum()

    @torch.no_grad()
    def plan(self, budget: float) -> RankPlan:
        """The most likely plan of at most ``budget`` parameters in all sites together; what that
        leaves of the budget buys more rank where it is least unlikely."""
        log_probabilities = self._masked().double().log_softmax(-1).tolist()
        items = [[Choice(site.params(rank), -log_probability) for rank, log_probability
                  in zip(ranks, row, strict=False)]
                 for site, ranks, row in zip(self.sites, self.candidates, log_probabilities,
                                             strict=True)]
        chosen = knapsack(items, budget)
        if chosen is None:
            raise UserError(f"no plan has at most {budget:.0f} parameters in its projections")
        _fill(items, chosen, budget)
        return RankPlan({site.name: ranks[index] for site, ranks, index
                         in zip(self.sites, self.candidates, chosen, strict=True)})


def _fill(items: list[list[Choice]], chosen: list[int], budget: float) -> None:
    """Raise single items to dearer candidates while the budget allows one."""
    rest = budget - sum(item[i].cost for item, i in zip(items, chosen, strict=True))
    while True:
        upgrades = [(candidate.error - items[k][i].error, k, j)
                    for k, i in enumerate(chosen) for j, candidate in enumerate(items[k])
                    if 0 < candidate.cost - items[k][i].cost <= rest]
        if not upgrades:
            return
        _, k, j = min(upgrades)
        rest -= items[k][j].cost - items[k][chosen[k]].cost
        chosen[k] = j


def uniform_plan(sites: list[Site], budget: float, multiple: int) -> RankPlan:
    """About the same fraction of the break-even rank everywhere, as large as ``budget`` allows."""
    ranks = [candidates(site, multiple) for site in sites]
    items = [[Choice(site.params(rank), _fraction(site, rank) ** 2) for rank in choices]
             for site, choices in zip(sites, ranks, strict=True)]
    chosen = [min(range(len(item)), key=lambda i, item=item: item[i].cost) for item in items]
    _fill(items, chosen, budget)
    return RankPlan({site.name: choices[index]
                     for site, choices, index in zip(sites, ranks, chosen, strict=True)})


def _fraction(site: Site, rank: Rank) -> float:
    return (site.full_rank if rank == DENSE else rank) / site.break_even
