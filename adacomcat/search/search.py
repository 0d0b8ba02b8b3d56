"""Searching the ranks: gradient steps on the architecture parameters, weights at rest."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.plan import RankPlan
from adacomcat.search.gates import RankGates, numeric_rank
from adacomcat.search.policy import EveryEpoch, make_policy
from adacomcat.search.published import decompose_anew_
from adacomcat.search.supernet import mixture, set_ranks_
from adacomcat.sites import Site
from adacomcat.utils.distributed import Processes
from adacomcat.utils.model import evaluating
from adacomcat.utils.random import derived_generator


@dataclass(frozen=True)
class SearchConfig:
    """How the ranks are searched.

    Args:
        policy: when to search, one of ``POLICIES``.
        alpha_lr: learning rate of α.
        beta: exponent of the budget in the loss.
        tau_start, tau_end: the temperature τ at the first and the last search.
        tau_per: whether τ anneals over every 'epoch', or by the E-th root of τ_end / τ_start with
            every 'search', E epochs, as in ComCAT's code.
        confirm: a plan is adopted only where held-out images lose less with it.
        alpha_weight_decay: of α; it pulls every distribution towards the uniform one.
        choose: the likeliest plan within the 'budget', or the 'argmax' at every site as in
            ComCAT's code, where the loss alone knows the budget.
        decompose_anew: before a search the factors in force are multiplied out and decomposed
            again, as in ComCAT's code: what was cut does not come back.
        first: the epoch of the first search; the policy counts from it.
    """

    policy: str = "adaptive"
    alpha_lr: float = 1e-2
    beta: float = 1.5
    tau_start: float = 5.0
    tau_end: float = 0.1
    tau_per: str = "epoch"
    confirm: bool = True
    alpha_weight_decay: float = 0.0
    choose: str = "budget"
    decompose_anew: bool = False
    first: int = 1


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


# Held-out batches that decide whether a plan that the search proposes is adopted.
CONFIRMING_BATCHES = 8


class RankSearch:
    """The search's whole state: α and its optimiser, the policy, the plan in force.

    Every search takes gradient steps on α, one for each batch, with the loss CE · (P / target)^β
    where the expected parameters P exceed the target, and CE elsewhere. It then proposes the most
    likely plan within the budget. After ComCAT (Xiao et al., ICML 2023, arXiv 2305.17235).

    Args:
        supernet: a model that holds every rank at once, from ``build_supernet``.
        sites: the decisions to take, as the supernet has them.
        gates: the architecture parameters α over the candidates of ``sites``.
        plan: the ranks in force at the start; it names every site.
        config: how to search, and when.
        target: parameters that the whole compressed model may have.
        fixed: parameters of the model that belong to no site.

    Raises:
        UserError: ``config.policy`` is unknown.
    """

    def __init__(self, supernet: nn.Module, sites: list[Site], gates: RankGates, plan: RankPlan,
                 config: SearchConfig, *, target: float, fixed: float) -> None:
        self.supernet, self.sites, self.gates = supernet, sites, gates
        self.config, self.target, self.fixed = config, target, fixed
        self.optimizer = torch.optim.AdamW([gates.logits], lr=config.alpha_lr,
                                           weight_decay=config.alpha_weight_decay)
        self.policy: EveryEpoch = make_policy(config.policy)
        self.count, self.seconds = 0, 0.0
        self.refinement: dict[str, Any] | None = None  # what made the plan that it starts from
        # The steps of a search that has begun: their losses, and the generator's state after them.
        self.begun: dict[str, Any] | None = None
        self.adopt(plan)

    def adopt(self, plan: RankPlan) -> None:
        """Put ``plan`` in force, in the supernet too."""
        self.plan = plan
        set_ranks_(self.supernet, plan)

    def due(self, epoch: int) -> bool:
        """Whether ``epoch``, counted from 1, begins with a search."""
        return self.policy.due(self._turn(epoch))

    def _turn(self, epoch: int) -> int:
        """The number of ``epoch`` where the first one that may search is 1."""
        return epoch - self.config.first + 1

    def temperature(self, epoch: int, epochs: int) -> float:
        """Geometric from tau_start to tau_end, over epochs (counted from 1) or over searches."""
        if self.config.tau_per == "search":
            fraction = min(1.0, self.count / max(1, epochs))
        else:
            fraction = min(1.0, (epoch - 1) / max(1, epochs - 1))
        start, end = self.config.tau_start, self.config.tau_end
        return start * (end / start) ** fraction

    def step(self, images: Tensor, labels: Tensor, temperature: float,
             generator: torch.Generator, processes: Processes, share: float = 1.0) -> float:
        """One step on α by one pass of the gated supernet, averaged over processes; the loss.

        share: the weight of these images' mean in the mean over all.
        """
        mixed = self.gates.sample(temperature, generator)
        with mixture(self.supernet, self.gates.gates(mixed)):
            loss = share * F.cross_entropy(self.supernet(images), labels)
        params = self.fixed + self.gates.expected_params(mixed)
        loss = budget_loss(loss, params, self.target, self.config.beta)
        self.optimizer.zero_grad()
        loss.backward()
        processes.average_gradients_([self.gates.logits])
        self.optimizer.step()
        return processes.mean(loss)

    def run(self, batches: Iterable[tuple[Tensor, Tensor]], *, epoch: int, epochs: int, seed: int,
            processes: Processes, after_step: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Search at the start of ``epoch`` and adopt the plan that it finds, if it is better.

        A search whose state was loaded in its midst goes on behind its last step.

        Args:
            batches: (images, labels) of this process, one for each step.
            epoch: the epoch that is about to begin, counted from 1.
            epochs: how many the temperature anneals over.
            seed: decides the Gumbel noise.
            processes: who shares the search.
            after_step: called after each step, when the state can be saved.

        Returns:
            What it did, in plain numbers, lists and dicts.
        """
        start = time.perf_counter()
        temperature, generator = self.temperature(epoch, epochs), derived_generator(
            seed, epoch, self.count)
        if self.config.decompose_anew and self.begun is None:
            decompose_anew_(self.supernet)
            processes.broadcast_(self.supernet)
        losses, held_out, share = self._goes_on(generator), [], 0.0
        behind = len(losses)
        with frozen(self.supernet), evaluating(self.supernet):
            for number, (images, labels) in enumerate(batches):
                batch = images.to(processes.device), labels.to(processes.device)
                held_out.extend([batch] if len(held_out) < CONFIRMING_BATCHES else [])
                share = share or _share(processes, len(images))
                if number < behind:
                    continue
                losses.append(self.step(*batch, temperature, generator, processes, share))
                self.begun = {"losses": losses, "generator": generator.get_state()}
                after_step()
            before = self.numeric(self.plan)
            rejected = not self._propose(self._found(), held_out, processes, share)
        self.begun = None
        ranks = self.numeric(self.plan)
        self.policy.record(self._turn(epoch), ranks)
        self.count += 1
        seconds = time.perf_counter() - start
        self.seconds += seconds
        return {"epoch": epoch, "temperature": temperature, "seconds": seconds,
                "loss": sum(losses) / max(1, len(losses)),
                "rejected": rejected, "entropy": self.gates.entropy(),
                "frequency": getattr(self.policy, "frequency", 1),
                "changed": sum(a != b for a, b in zip(before, ranks, strict=True)),
                "params": int(self.fixed) + self.plan.params(self.sites),
                "ranks": dict(self.plan.ranks)}

    def _goes_on(self, generator: torch.Generator) -> list[float]:
        """The losses of the steps that this search has behind it; ``generator`` is set behind."""
        if self.begun is None:
            return []
        generator.set_state(self.begun["generator"])
        return list(self.begun["losses"])

    def _found(self) -> RankPlan:
        """The plan that α stands for now."""
        if self.config.choose == "argmax":
            return self.gates.likeliest()
        return self.gates.plan(self.target - self.fixed)

    def _propose(self, plan: RankPlan, held_out: list[tuple[Tensor, Tensor]],
                 processes: Processes, share: float) -> bool:
        """Adopt ``plan`` unless the plan in force does better on the held-out batches."""
        current = self.plan
        if plan == current or not (self.config.confirm and held_out):
            self.adopt(plan)
            return True
        loss = self._loss(held_out, processes, share)
        self.adopt(plan)
        better = self._loss(held_out, processes, share) < loss
        if not better:
            self.adopt(current)
        return better

    @torch.no_grad()
    def _loss(self, batches: list[tuple[Tensor, Tensor]], processes: Processes,
              share: float) -> float:
        losses = [F.cross_entropy(self.supernet(images), labels) for images, labels in batches]
        return processes.mean(share * torch.stack(losses).mean())

    def numeric(self, plan: RankPlan) -> list[int]:
        """The rank of every site as a number, 'dense' as the full rank."""
        return [numeric_rank(site, plan[site.name]) for site in self.sites]

    def state_dict(self) -> dict[str, Any]:
        return {"gates": self.gates.state_dict(), "optimizer": self.optimizer.state_dict(),
                "policy": self.policy.state_dict(), "plan": dict(self.plan.ranks),
                "count": self.count, "seconds": self.seconds, "refinement": self.refinement,
                "begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gates.load_state_dict(state["gates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.count, self.seconds = state["count"], state["seconds"]
        self.refinement, self.begun = state["refinement"], state["begun"]
        self.adopt(RankPlan(dict(state["plan"])))


def _share(processes: Processes, rows: int) -> float:
    """The weight of this process's images in a batch of which it has ``rows``."""
    total = processes.sum(torch.tensor(rows, device=processes.device))
    return processes.share(rows, int(total))
