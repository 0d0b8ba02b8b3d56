"""Neurons that an MLP can spare: losses against least squares, models that go without them."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress
from adacomcat.cost import model_macs, model_params, plan_macs, plan_params
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.neurons import eliminate, exchange, factorize_neurons

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


def samples(seed: int, rows: int = 400, hidden: int = 12) -> Tensor:
    """Correlated activations, some of them nearly copies of others."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    mixing = torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)
    return base @ mixing * torch.logspace(0, -2, hidden, dtype=torch.float64)


def least_squares_loss(h: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Mean squared error of the best map from the kept columns, by numpy."""
    centred = (h - h.mean(0)).numpy()
    target = centred @ weight.numpy().T
    if not kept:
        return float((target ** 2).sum() / len(h))
    solution = np.linalg.lstsq(centred[:, kept], target, rcond=None)[0]
    return float(((target - centred[:, kept] @ solution) ** 2).sum() / len(h))


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_least_squares(seed: int) -> None:
    h = samples(seed)
    weight = torch.randn(5, 12, dtype=torch.float64)
    order, errors = eliminate(weight, torch.cov(h.mT, correction=0))
    assert sorted(order.tolist()) == list(range(12))
    for width in range(13):
        expected = least_squares_loss(h, weight, order[:width].tolist())
        assert errors[width].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_round_of_several_neurons_ends_at_the_exact_loss() -> None:
    h = samples(7, rows=900, hidden=100)  # rounds of three
    weight = torch.randn(9, 100, dtype=torch.float64)
    order, errors = eliminate(weight, torch.cov(h.mT, correction=0))
    assert (errors.diff() <= 0).all()
    for width in (97, 49, 1):
        expected = least_squares_loss(h, weight, order[:width].tolist())
        assert errors[width].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("width", [1, 40, 97])
def test_an_elimination_that_stops_keeps_the_same_neurons(width: int) -> None:
    h = samples(5, rows=900, hidden=100)
    weight, covariance = torch.randn(9, 100, dtype=torch.float64), torch.cov(h.mT, correction=0)
    whole, errors = eliminate(weight, covariance)
    order, found = eliminate(weight, covariance, width)
    assert sorted(order.tolist()) == list(range(100))
    gone = 100 - -(-(100 - width) // 3) * 3  # rounds of three; the last one is cut
    assert set(whole[:max(gone, 0)].tolist()) <= set(order[:width].tolist())
    assert found[width].item() == pytest.approx(
        least_squares_loss(h, weight, order[:width].tolist()), rel=1e-5)
    torch.testing.assert_close(found[width + 3:], errors[width + 3:])


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_near_the_best_of_all(seed: int) -> None:
    h = samples(seed, hidden=9)
    weight = torch.randn(4, 9, dtype=torch.float64)
    _, errors = eliminate(weight, torch.cov(h.mT, correction=0))
    best = min(least_squares_loss(h, weight, list(kept)) for kept in combinations(range(9), 5))
    typical = np.median([least_squares_loss(h, weight, list(kept))
                         for kept in combinations(range(9), 5)])
    assert errors[5].item() < best + 0.1 * (typical - best)


@pytest.mark.parametrize("seed", range(12))
def test_exchanges_come_nearly_to_the_best_choice_of_all(seed: int) -> None:
    """Elimination alone was up to a half above the best choice here."""
    h = samples(seed, hidden=11)
    weight = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    covariance = torch.cov(h.mT, correction=0)
    order, errors = eliminate(weight, covariance)
    for width in (3, 5, 8):
        kept = exchange(weight, covariance, order[:width])
        assert len(set(kept.tolist())) == width
        loss = least_squares_loss(h, weight, kept.tolist())
        best = min(least_squares_loss(h, weight, list(choice))
                   for choice in combinations(range(11), width))
        assert best * (1 - 1e-9) <= loss <= errors[width].item() * (1 + 1e-9)
        assert loss <= 1.1 * best


def test_copies_of_neurons_go_without_loss() -> None:
    h = samples(3, hidden=8)
    h = torch.cat([h, h], 1)
    weight = torch.randn(6, 16, dtype=torch.float64)
    statistics = LinearStatistics(h.mean(0), torch.cov(h.mT, correction=0), len(h))
    factors = factorize_neurons(weight, None, statistics)
    kept, refit, bias = factors.pruned(8)
    dense = h @ weight.mT
    assert (h[:, kept] @ refit.mT + bias - dense).norm() < 0.02 * dense.norm()


def mlps(model: nn.Module) -> list[nn.Module]:
    return [block.mlp for block in model.blocks]


@pytest.mark.parametrize("budget", ["keep_params", "keep_macs"])
def test_calibrated_models_have_pruned_mlps_within_the_budget(budget: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    x = torch.randn(32, 3, 32, 32)
    small = compress(model, calibration=x, **{budget: 0.5})
    assert min(mlp.fc1.out_features for mlp in mlps(small)) < 256
    assert all(name.rpartition(".")[2] in ("qk", "vo", "hidden", "head")
               for name in small.rank_plan.ranks)
    assert plan_params(model, small.rank_plan) == model_params(small)
    assert plan_macs(model, small.rank_plan) == model_macs(small)
    measure = model_params if budget == "keep_params" else model_macs
    assert 0.4 * measure(model) < measure(small) <= 0.5 * measure(model)


def test_images_of_the_calibration_come_out_nearly_the_same() -> None:
    """Each neuron twice: half of them are enough, in every block."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    with torch.no_grad():
        for mlp in mlps(model):
            mlp.fc1.weight[128:] = mlp.fc1.weight[:128]
            mlp.fc1.bias[128:] = mlp.fc1.bias[:128]
    x = torch.randn(64, 3, 32, 32)
    plan = RankPlan({f"blocks.{i}.mlp.hidden": 128 for i in range(2)})
    out, dense = compress(model, plan=plan, calibration=x[:48])(x[48:]), model(x[48:])
    assert (out - dense).norm() < 0.05 * dense.norm()


def test_saved_and_reloaded(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    x = torch.randn(24, 3, 32, 32)
    small = compress(model, keep_params=0.4, calibration=x)
    adacomcat.save(small, tmp_path / "small")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert loaded.blocks[0].mlp.fc1.out_features == small.blocks[0].mlp.fc1.out_features
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize(("ranks", "message"), [
    ({"blocks.0.mlp.hidden": 64, "blocks.0.mlp.fc1": 16}, "blocks.0.mlp.fc1"),
    ({"blocks.0.mlp.hidden": 257}, "from 1 to 256"),
    ({"blocks.0.attn.hidden": 4}, "blocks.0.attn.hidden"),
])
def test_plans_that_do_not_fit_are_refused(ranks: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankPlan(ranks).validate(timm.create_model("vit_tiny_patch16_224", **TINY))


def test_a_width_needs_activations() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.hidden.*calibration"):
        compress(model, plan=RankPlan({"blocks.0.mlp.hidden": 64}))
