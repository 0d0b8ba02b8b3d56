"""Milliseconds as the budget; a model of cost stands for the clock."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers.latency import ARCHITECTURE, TINY, CostModel, Int8Cost, make
from helpers.plans import choose_plan_for_latency
from torch import nn

import adacomcat
from adacomcat import RankPlan, UserError, cli, find_sites
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.refine import refined_allocation
from adacomcat.allocation.sensitivity import error_weights, relative_sensitivities, weighted_error
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import build_skeleton
from adacomcat.latency import timing
from adacomcat.sites import DENSE


def chosen(model: nn.Module, measure: CostModel, milliseconds: float, **settings) -> RankPlan:
    return choose_plan_for_latency(model, factorize_model(model), find_sites(model), milliseconds,
                                   measure, **settings)


def latency_of(plan: RankPlan, measure: CostModel) -> float:
    return measure.of(build_skeleton(make(), plan))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_the_model_lands_within_3_percent_below_the_budget(factor, share) -> None:
    """However wrong the sum of the parts is."""
    model, measure = make(), CostModel(factor)
    budget = share * measure.of(model)
    plan = chosen(model, measure, budget, multiple=1)
    assert 0.97 * budget <= latency_of(plan, measure) <= budget


def test_every_plan_that_a_refinement_tries_stays_below_the_budget() -> None:
    model, measure, tried = make(), CostModel(1.5), []
    budget, sites, factors = 0.7 * measure.of(model), find_sites(model), factorize_model(model)
    allocator = LatencyAllocator(model, factors, sites, max_latency_ms=budget, multiple=2,
                                 measure=measure)

    def loss(plan: RankPlan) -> float:
        tried.append(latency_of(plan, measure))
        return tried[-1]

    weights = relative_sensitivities(sites, factors)
    found = refined_allocation(allocator.plan, weights, sites, loss, 6)
    assert found.tried == 6 == len(tried) - 1 and max(tried) <= budget


@pytest.mark.parametrize("share", [0.75, 0.8, 0.9, 0.95])
def test_coarse_ranks_stay_below_the_budget(share) -> None:
    model, measure = make(), CostModel(1.5)
    budget = share * measure.of(model)
    assert latency_of(chosen(model, measure, budget, multiple=16), measure) <= budget


def test_a_budget_beyond_the_dense_model_keeps_it_dense() -> None:
    model, measure = make(), CostModel()
    plan = chosen(model, measure, 1.1 * measure.of(model))
    assert set(plan.ranks.values()) == {DENSE}


def test_the_least_that_the_error_names_is_reachable() -> None:
    model, measure = make(), CostModel()
    with pytest.raises(UserError, match="is below what is reachable here; the least is") as caught:
        chosen(model, measure, 0.01)
    least = float(str(caught.value).partition("the least is ")[2].split()[0]) + 0.01
    assert latency_of(chosen(model, measure, least), measure) <= least


def in_attention(name: str) -> bool:
    """By the names of weights in fused and plain modules, in timed blocks and whole models."""
    return re.search(r"(^|\.)(w[qkvo]|qkv\.weight|proj\.weight)$", name) \
        is not None and "patch" not in name


def in_mlp(name: str) -> bool:
    return re.search(r"(^|\.)(w[12]|[uv][12]|fc[12]\.\w+)$", name) is not None


def test_what_costs_more_time_loses_more_rank(tmp_path, monkeypatch) -> None:
    model = make()

    def left(slow: Callable[[str], bool]) -> tuple[int, int]:
        """Weights of attentions and of MLPs, where one kind takes ten times as long."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / slow.__name__))
        measure = CostModel(weigh=lambda name: 10.0 if slow(name) else 1.0)
        plan = chosen(model, measure, 0.6 * measure.of(model))
        sites = find_sites(model)
        return tuple(sum(site.params(plan[site.name]) for site in sites if kind in site.name)
                     for kind in ("attn", "mlp"))

    (slow_attention, mlps), (attention, slow_mlps) = left(in_attention), left(in_mlp)
    assert slow_attention < attention and slow_mlps < mlps


def test_plans_have_less_error_than_rivals_of_equal_latency() -> None:
    """Than plans with equal ranks in every block, up to one step of one block that did not fit, and
    on average a tenth less."""
    model, measure = make(), CostModel(1.0)
    sites, factors = find_sites(model), factorize_model(model)
    weights = error_weights(model, factors, None, sites)

    def error(plan: RankPlan) -> float:
        return sum(weighted_error(factors, weights, site, plan[site.name]) for site in sites)

    kinds = [site.name.rpartition(".")[2] for site in sites]
    grid = itertools.product((8, 16, DENSE), (8, 16, DENSE), (16, 32, DENSE), (16, 32, DENSE))
    rivals = [RankPlan({site.name: dict(zip(("qk", "vo", "fc1", "fc2"), ranks, strict=True))[kind]
                        for site, kind in zip(sites, kinds, strict=True) if kind != "head"})
              for ranks in list(grid)[1::5]]
    plans = [chosen(model, measure, latency_of(rival, measure) / 0.985) for rival in rivals]
    pairs = [(error(plan), error(rival)) for plan, rival in zip(plans, rivals, strict=True)]
    largest_step = max(weighted_error(factors, weights, site, site.candidates(8)[0])
                       for site in sites)
    assert all(ours <= theirs + largest_step for ours, theirs in pairs)
    assert statistics.fmean(ours / theirs for ours, theirs in pairs) < 0.9


@pytest.fixture
def clockless(monkeypatch) -> CostModel:
    measure = CostModel()
    monkeypatch.setattr(timing, "interleaved", lambda runs, *_: measure(runs))
    return measure


def test_compress_takes_milliseconds_and_only_one_budget(clockless) -> None:
    model = make()
    budget = 0.6 * clockless.of(model)
    for images in (None, torch.randn(16, 3, 32, 32)):
        small = adacomcat.compress(model, max_latency_ms=budget, calibration=images)
        assert 0.9 * budget < clockless.of(small) <= budget
        pruned = [name for name in small.rank_plan.ranks if name.endswith("hidden")]
        assert len(pruned) == (0 if images is None else 3)
    for budgets in ({}, {"max_latency_ms": 1.0, "keep_params": 0.5},
                    {"max_latency_ms": 1.0, "plan": RankPlan()}):
        with pytest.raises(UserError, match="exactly one of keep_params, keep_macs, keep_bytes"):
            adacomcat.compress(model, **budgets)
    for value in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match="max_latency_ms must be above 0"):
            adacomcat.compress(model, max_latency_ms=value)


def command(*flags: object) -> list[str]:
    settings = [f"{key}={value}" for key, value in TINY.items()
                if key not in ("img_size", "num_classes")]
    return [str(word) for word in ("compress", "-m", ARCHITECTURE, "--img-size", 32,
                                   "--num-classes", 5, "--model-kwargs", *settings, *flags)]


def test_command_line(clockless, tmp_path, capsys) -> None:
    budget = 0.6 * clockless.of(make())
    assert cli.main(command("--max-latency-ms", budget, "--output", tmp_path / "small",
                            "--json")) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    small = adacomcat.load(tmp_path / "small")
    assert rows["compressed"]["latency_ms"] == pytest.approx(clockless.of(small))
    assert rows["compressed"]["latency_ms"] <= budget < rows["dense"]["latency_ms"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--max-latency-ms", "0.1"], "0.1 ms is below what is reachable here; the least is"),
    (["--max-latency-ms", "0"], "must be a number in (0, 1e+09]; got '0'"),
    (["--max-latency-ms", "fast"], "must be a number in (0, 1e+09]; got 'fast'"),
    (["--max-latency-ms", "9", "--keep-params", "0.5"], "exclude each other"),
    (["--max-latency-ms", "9", "--latency-batch", "0"], "at least 1"),
    ([], "needs one of --keep-params, --keep-macs, --keep-bytes, --max-latency-ms and --plan"),
])
def test_bad_budgets_are_one_line(flags: Iterable[str], says, clockless, tmp_path, capsys) -> None:
    assert cli.main(command(*flags, "--output", tmp_path / "small")) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "adacomcat: error" in line]
    assert len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_model_that_becomes_int8_lands_within_3_percent_below_the_budget(share) -> None:
    model, measure = make(), Int8Cost(1.3)
    budget = share * measure.of(adacomcat.quantize(model))
    sites = find_sites(model)
    allocator = LatencyAllocator(model, factorize_model(model), sites, max_latency_ms=budget,
                                 multiple=1, measure=measure, int8=True)
    plan = allocator.plan(relative_sensitivities(sites, factorize_model(model)))
    made = measure.of(adacomcat.quantize(build_skeleton(make(), plan)))
    assert 0.97 * budget <= made <= budget
    assert measure.of(build_skeleton(make(), plan)) > 1.1 * budget
