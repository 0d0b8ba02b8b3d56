"""Damage of single ranks against models compressed at them; the order against the knapsack."""

import pytest
import torch
from helpers.models import dense_model, images

import adacomcat
from adacomcat.allocation.fraction import FractionAllocator, parameter_cost
from adacomcat.allocation.sensitivity import error_weights
from adacomcat.convert.calibrate import calibration_batches, collect_statistics
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import install_
from adacomcat.evaluation.sensitivity import (
    measured_damage,
    order_taken,
    sensitivity,
    spread_ranks,
)
from adacomcat.plan import RankPlan
from adacomcat.sites import find_sites, prunable_mlps
from adacomcat.utils.model import copied


@pytest.fixture(scope="module")
def ready():
    torch.manual_seed(0)
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=2, num_heads=2,
                        num_classes=7)
    batches = calibration_batches(images(model, 24), model)
    sites = find_sites(model, prunable_mlps(model))
    factors = factorize_model(model, collect_statistics(model, batches[:1]), sites=sites)
    return model, batches, sites, factors


def test_damage_is_that_of_a_model_with_one_site_compressed(ready):
    model, batches, sites, factors = ready
    chosen = [site for site in sites if site.module.startswith("blocks.1") or site.name == "head"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measured_damage(model, factors, batches[1:], chosen, 2)
    assert {site.kind for site in chosen} == {"qk", "vo", "hidden", "linear"} - (
        set() if found["head"] else {"linear"})
    pictures = torch.cat(batches[1:])
    with torch.inference_mode():
        dense = model.forward_features(pictures), model(pictures)
        for site in chosen:
            for rank, damage in found[site.name].items():
                small = install_(copied(model), RankPlan({site.name: rank}), factors)
                expected = sum(((got - want).square().sum() / (want - want.mean(0)).square().sum()
                                ).item() for got, want in
                               zip((small.forward_features(pictures), small(pictures)), dense,
                                   strict=True))
                assert damage == pytest.approx(expected, rel=1e-3, abs=1e-6), (site.name, rank)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_smaller_ranks_hurt_more_on_the_fitting_images(ready):
    model, batches, sites, factors = ready
    found = measured_damage(model, factors, batches[:1], sites, 3)
    for name, damage in found.items():
        values = [damage[rank] for rank in sorted(damage)]
        if len(values) > 1:
            assert values[0] > values[-1], name


def test_ranks_are_spread_over_the_candidates(ready):
    site = next(site for site in ready[2] if site.kind == "hidden")
    ranks = spread_ranks(site, 4)
    every = [rank for rank in site.candidates() if rank != "dense"]
    assert len(ranks) == 4 and set(ranks) <= set(every) and ranks[-1] == every[-1]
    assert spread_ranks(site, 10 ** 6) == every


def test_order_reaches_the_plans_of_the_knapsack(ready):
    """After each step the plan is what the exact allocation gives at just that budget."""
    model, batches, sites, factors = ready
    weights = error_weights(model, factors, batches, sites)
    cost, whole = parameter_cost(model, sites)
    ranks = dict.fromkeys((site.name for site in sites), "dense")
    steps = order_taken(model, sites, factors, weights)
    kept = [step.kept for step in steps]
    assert kept == sorted(kept, reverse=True) and len(steps) > 10
    for number, step in enumerate(steps):
        assert ranks[step.site] == step.before
        ranks[step.site] = step.after
        spent = whole - sum(cost(s, "dense") - cost(s, ranks[s.name]) for s in sites)
        assert step.kept == pytest.approx(spent / whole)
        if number % 5 == 0:
            exact = FractionAllocator(sites, factors, cost, whole, keep=step.kept + 1e-9)
            assert exact.plan(weights).ranks == ranks


def test_summary_names_the_block_that_hurts():
    """A block whose output is scaled down cannot hurt; the other one must lead."""
    torch.manual_seed(1)
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=2, num_heads=2,
                        num_classes=7)
    with torch.no_grad():
        for name in ("attn.proj", "mlp.fc2"):
            model.blocks[0].get_submodule(name).weight.mul_(1e-3)
    found = sensitivity(model, calibration_batches(images(model, 12), model),
                        find_sites(model, prunable_mlps(model)))
    assert found["blocks"]["blocks.1"] > 100 * found["blocks"]["blocks.0"]
    assert (found["calibrating"], found["judging"]) == (6, 6)
    first = min(found["order"], key=lambda step: -step["kept"])
    assert first["site"].startswith("blocks.0")
    row = next(row for row in found["sites"] if row["site"] == first["site"])
    assert row["first_cut"] == pytest.approx(1.0)
    for row in found["sites"]:
        assert all(freed > 0 for freed in row["freed"].values())


def test_one_image_is_too_few(ready):
    model, _, sites, _ = ready
    with pytest.raises(adacomcat.UserError, match="needs two images"):
        sensitivity(model, calibration_batches(images(model, 1), model), sites)
