"""The knapsack against exhaustive search, and plans against their budgets."""

import itertools
import random

import numpy as np
import pytest
import timm
import torch
from helpers.plans import choose_plan

from adacomcat import RankPlan, UserError, find_sites
from adacomcat.allocation.knapsack import Choice, knapsack
from adacomcat.allocation.sensitivity import sensitivities
from adacomcat.convert.factors import factorize_model
from adacomcat.cost import plan_macs, plan_params

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def exhaustive(items: list[list[Choice]], budget: float) -> float:
    """Least total error of all combinations that fit."""
    return min(sum(c.error for c in pick) for pick in itertools.product(*items)
               if sum(c.cost for c in pick) <= budget)


def convex_item(generator: random.Random) -> list[Choice]:
    """Error falls ever more slowly with cost, as the tail of a spectrum does."""
    drops = sorted((generator.random() for _ in range(4)), reverse=True)
    errors = [sum(drops[i:]) for i in range(5)]
    return [Choice(10.0 * (i + 1), error) for i, error in enumerate(errors)]


@pytest.mark.parametrize("seed", range(12))
def test_convex_items_of_one_step_are_solved_exactly(seed: int) -> None:
    generator = random.Random(seed)
    items = [convex_item(generator) for _ in range(5)]
    budget = 10.0 * generator.randint(5, 24)
    chosen = knapsack(items, budget)
    assert sum(item[i].cost for item, i in zip(items, chosen, strict=True)) <= budget
    total = sum(item[i].error for item, i in zip(items, chosen, strict=True))
    assert total == pytest.approx(exhaustive(items, budget))


@pytest.mark.parametrize("seed", range(60))
def test_uneven_items_are_solved_exactly(seed: int) -> None:
    """Errors that need not fall with cost, in whole numbers and in fractions, at every budget."""
    generator = random.Random(100 + seed)
    unit = generator.choice([1.0, 0.37])
    items = [[Choice(unit * generator.randint(1, 40), generator.random() ** 4)
              for _ in range(generator.randint(1, 6))] for _ in range(6)]
    cheapest = sum(min(c.cost for c in item) for item in items)
    dearest = sum(max(c.cost for c in item) for item in items)
    for share in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0):
        budget = cheapest + share * (dearest - cheapest)
        chosen = knapsack(items, budget)
        assert sum(item[i].cost for item, i in zip(items, chosen, strict=True)) <= budget
        total = sum(item[i].error for item, i in zip(items, chosen, strict=True))
        assert total == pytest.approx(exhaustive(items, budget), rel=1e-9, abs=1e-12)


def programme_over_budgets(items: list[list[Choice]], budget: int) -> float:
    """Least total error by the table over all whole budgets, which needs no bound."""
    table = np.zeros(budget + 1)
    for item in items:
        following = np.full(budget + 1, np.inf)
        for choice in item:
            cost = int(choice.cost)
            following[cost:] = np.minimum(following[cost:],
                                          table[:budget + 1 - cost] + choice.error)
        table = following
    return float(table[budget])


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_as_many_items_as_a_model_has_are_solved_exactly(seed: int, keep: float) -> None:
    """Spectra of several shapes with tails of their own, as DeiT-S has 48 of them."""
    generator = random.Random(seed)
    items = []
    for index in range(48):
        width, price = [(8, 3), (8, 3), (24, 5), (24, 5)][index % 4]
        tail = sorted((generator.expovariate(1) ** 2 for _ in range(width)), reverse=True)
        scale = 10 ** generator.uniform(-1, 1)
        items.append([Choice(price * (rank + 1), scale * sum(tail[rank + 1:]))
                      for rank in range(width - 1)] + [Choice(price * width + 7, 0.0)])
    whole = sum(item[-1].cost for item in items)
    budget = int(keep * whole)
    chosen = knapsack(items, budget)
    total = sum(item[i].error for item, i in zip(items, chosen, strict=True))
    assert total == pytest.approx(programme_over_budgets(items, budget), rel=1e-9)


def test_a_budget_below_the_cheapest_fits_nothing() -> None:
    assert knapsack([[Choice(3, 1.0)], [Choice(4, 1.0)]], 6.9) is None
    assert knapsack([[Choice(3, 1.0)], [Choice(4, 1.0)]], 7.0) == [0, 0]


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5])
def test_plans_meet_their_budget_in_parameters_and_macs(keep: float) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    factors = factorize_model(model)
    by_params = choose_plan(model, factors, "params", keep)
    by_macs = choose_plan(model, factors, "macs", keep)
    whole = plan_params(model, RankPlan()), plan_macs(model, RankPlan())
    assert plan_params(model, by_params) <= keep * whole[0]
    assert plan_macs(model, by_macs) <= keep * whole[1]
    if keep == 1.0:
        assert set(by_params.ranks.values()) == {"dense"}


def test_the_least_reachable_budget_that_the_error_names_is_reachable() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    factors = factorize_model(model)
    with pytest.raises(UserError) as caught:
        choose_plan(model, factors, "params", 0.01)
    least = float(str(caught.value).rpartition(" ")[2])
    plan = choose_plan(model, factors, "params", least + 1e-3)
    assert plan_params(model, plan) <= (least + 1e-3) * plan_params(model, RankPlan())


@torch.no_grad()
def test_a_site_that_matters_less_is_measured_as_less_sensitive() -> None:
    model = timm.create_model("vit_small_patch14_dinov2", **TINY | {"img_size": 28}).eval()
    for block, strength in zip(model.blocks, (1.0, 0.01), strict=True):
        block.ls1.gamma.fill_(strength)
        block.ls2.gamma.fill_(strength)
    before = [parameter.clone() for parameter in model.parameters()]
    measured = sensitivities(model, factorize_model(model), torch.randn(4, 3, 28, 28),
                             find_sites(model))
    assert measured.keys() == {site.name for site in find_sites(model)}
    for kind in ("attn.vo", "mlp.fc2"):
        assert measured[f"blocks.1.{kind}"] < 0.1 * measured[f"blocks.0.{kind}"]
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_plans_survive_json_and_files(tmp_path) -> None:
    plan = RankPlan({"blocks.0.attn.qk": 8, "head": "dense"})
    assert RankPlan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"rank": {}}', '{"ranks": 3}', "\x00"])
def test_text_that_is_no_plan_is_refused(text: str, tmp_path) -> None:
    with pytest.raises(UserError, match="not a rank plan"):
        RankPlan.from_json(text)
    with pytest.raises(UserError, match="cannot read"):
        RankPlan.load(tmp_path / "missing.json")
