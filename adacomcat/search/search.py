"""Searching the ranks: gradient steps on the architecture parameters, weights at rest."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.plan import RankPlan
from adacomcat.search.gates import RankGates
from adacomcat.search.policy import EveryEpoch, make_policy
from adacomcat.search.supernet import mixture, set_ranks_
from adacomcat.sites import DENSE, Site
from adacomcat.utils.distributed import Processes
from adacomcat.utils.model import evaluating
from adacomcat.utils.random import derived_generator


@dataclass(frozen=True)
class SearchConfig:
    policy: str = "adaptive"
    steps: int = 50
    alpha_lr: float = 1e-2
    beta: float = 1.5
    tau_start: float = 5.0
    tau_end: float = 0.1
    tau_per: str = "epoch"  # 'epoch', or 'search': ComCAT's code anneals when it searches
    confirm: bool = True  # a plan is adopted only where held-out images like it better


def budget_loss(cross_entropy: Tensor, params: Tensor, target: float, beta: float) -> Tensor:
    """CE · (params / target)^β where params > target, else CE."""
    excess = (params / target).clamp(min=1.0)
    return cross_entropy * excess ** beta


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` asks for a gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


# Batches that judge a plan that the search proposes.
JUDGES = 8


class RankSearch:
    """The search's whole state: α and its optimiser, the policy, the plan in force.

    ``target``: parameters of the whole model; ``fixed``: those that belong to no site.
    """

    def __init__(self, supernet: nn.Module, sites: list[Site], gates: RankGates, plan: RankPlan,
                 config: SearchConfig, *, target: float, fixed: float) -> None:
        self.supernet, self.sites, self.gates = supernet, sites, gates
        self.config, self.target, self.fixed = config, target, fixed
        # α has no weight decay: it would pull every distribution towards the uniform one.
        self.optimizer = torch.optim.AdamW([gates.logits], lr=config.alpha_lr, weight_decay=0.0)
        self.policy: EveryEpoch = make_policy(config.policy)
        self.count, self.seconds = 0, 0.0
        self.refinement: dict[str, Any] | None = None  # what made the plan that it starts from
        self.adopt(plan)

    def adopt(self, plan: RankPlan) -> None:
        self.plan = plan
        set_ranks_(self.supernet, plan)

    def temperature(self, epoch: int, epochs: int) -> float:
        """Geometric from tau_start to tau_end, over epochs (counted from 1) or over searches."""
        done = self.count if self.config.tau_per == "search" else epoch - 1
        fraction = min(1.0, done / max(1, epochs - 1))
        start, end = self.config.tau_start, self.config.tau_end
        return start * (end / start) ** fraction

    def step(self, images: Tensor, labels: Tensor, temperature: float,
             generator: torch.Generator, processes: Processes) -> float:
        """One step on α with one pass of the gated supernet; the loss."""
        mixed = self.gates.sample(temperature, generator)
        with mixture(self.supernet, self.gates.gates(mixed)):
            loss = F.cross_entropy(self.supernet(images), labels)
        params = self.fixed + self.gates.expected_params(mixed)
        loss = budget_loss(loss, params, self.target, self.config.beta)
        self.optimizer.zero_grad()
        loss.backward()
        processes.average_gradients_([self.gates.logits])
        self.optimizer.step()
        return processes.mean(loss)

    def run(self, batches: Iterable[tuple[Tensor, Tensor]], *, epoch: int, epochs: int, seed: int,
            processes: Processes) -> dict[str, Any]:
        """Search at the start of ``epoch``, adopt the plan that it finds, and say what it did."""
        start = time.perf_counter()
        temperature, losses = self.temperature(epoch, epochs), []
        judges: list[tuple[Tensor, Tensor]] = []
        generator = derived_generator(seed, epoch, self.count)
        with frozen(self.supernet), evaluating(self.supernet):
            for images, labels in batches:
                batch = images.to(processes.device), labels.to(processes.device)
                judges.extend([batch] if len(judges) < JUDGES else [])
                losses.append(self.step(*batch, temperature, generator, processes))
            before = self.numeric(self.plan)
            rejected = not self._propose(self.gates.plan(self.target - self.fixed), judges,
                                         processes)
        ranks = self.numeric(self.plan)
        self.policy.record(epoch, ranks)
        self.count += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {"epoch": epoch, "temperature": temperature, "seconds": seconds,
                "loss": sum(losses) / max(1, len(losses)),
                "rejected": rejected,
                "changed": sum(a != b for a, b in zip(before, ranks, strict=True)),
                "params": int(self.fixed) + self.plan.params(self.sites),
                "ranks": dict(self.plan.ranks)}

    def _propose(self, plan: RankPlan, judges: list[tuple[Tensor, Tensor]],
                 processes: Processes) -> bool:
        """Adopt ``plan`` unless the plan in force does better on held-out images as things are."""
        current = self.plan
        if plan == current or not (self.config.confirm and judges):
            self.adopt(plan)
            return True
        loss = self._loss(judges, processes)
        self.adopt(plan)
        better = self._loss(judges, processes) < loss
        if not better:
            self.adopt(current)
        return better

    @torch.no_grad()
    def _loss(self, batches: list[tuple[Tensor, Tensor]], processes: Processes) -> float:
        losses = [F.cross_entropy(self.supernet(images), labels) for images, labels in batches]
        return processes.mean(torch.stack(losses).mean())

    def numeric(self, plan: RankPlan) -> list[int]:
        return [site.full_rank if plan[site.name] == DENSE else plan[site.name]
                for site in self.sites]

    def state_dict(self) -> dict[str, Any]:
        return {"gates": self.gates.state_dict(), "optimizer": self.optimizer.state_dict(),
                "policy": self.policy.state_dict(), "plan": dict(self.plan.ranks),
                "count": self.count, "seconds": self.seconds, "refinement": self.refinement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gates.load_state_dict(state["gates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.count, self.seconds = state["count"], state["seconds"]
        self.refinement = state["refinement"]
        self.adopt(RankPlan(dict(state["plan"])))
