"""Gated hidden neurons: against pruned MLPs one by one, in training, on the command line."""

import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from adacomcat import cli, compress, train
from adacomcat.data import datasets
from adacomcat.distill import TrainConfig
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.factorize.neurons import REFIT_SHRINKAGE, NeuronFactors, factorize_neurons
from adacomcat.plan import RankPlan
from adacomcat.search import RankGates
from adacomcat.search.supernet import GatedMlp
from adacomcat.sites import DENSE, Site

IN, HIDDEN, OUT = 6, 40, 5
SIZE = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2,
        "num_heads": 2, "num_classes": 10}


def make_mlp(bias: bool = True) -> tuple[Mlp, NeuronFactors, Tensor]:
    """(MLP in float64, its factors, the hidden activations they were made of)."""
    mlp = Mlp(IN, HIDDEN, OUT, bias=bias).double()
    h = mlp.act(mlp.fc1(torch.randn(300, IN, dtype=torch.float64))).detach()
    statistics = LinearStatistics(h.mean(0), torch.cov(h.mT, correction=0), len(h))
    return mlp, factorize_neurons(mlp.fc2.weight.detach(), mlp.fc2.bias, statistics), h


def pruned_output(mlp: Mlp, h: Tensor, kept: Tensor, x: Tensor) -> Tensor:
    """The MLP of the kept neurons, fc2 from the normal equations of ridge regression on h."""
    centred = h - h.mean(0)
    covariance = centred.mT @ centred / len(h)
    covariance += REFIT_SHRINKAGE * covariance.trace() / HIDDEN * torch.eye(HIDDEN, dtype=h.dtype)
    weight = torch.linalg.solve(covariance[kept][:, kept],
                                covariance[kept] @ mlp.fc2.weight.mT).mT
    y = mlp.act(mlp.fc1(x))[:, kept] @ weight.mT
    if mlp.fc2.bias is None:
        return y
    return y + mlp.fc2.bias + mlp.fc2.weight @ h.mean(0) - weight @ h.mean(0)[kept]


@pytest.mark.parametrize("bias", [True, False])
def test_gated_is_the_mixture_of_pruned_mlps(bias: bool) -> None:
    mlp, factors, h = make_mlp(bias)
    gated = GatedMlp(mlp, factors)
    site = Site("mlp.hidden", "mlp", "hidden", IN, OUT, hidden=HIDDEN,
                dense_bias=(HIDDEN + OUT) * bias, bias=OUT * bias)
    gates = RankGates([site], multiple=4).double()
    widths = [HIDDEN if width == DENSE else width for width in gates.candidates[0]]
    assert widths == [8, 16, 24, 32, 40]
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x, target = torch.randn(7, IN, dtype=torch.float64), torch.randn(7, OUT, dtype=torch.float64)

    mixed = logits.softmax(0)
    gated.gate = gates.gates(mixed.unsqueeze(0))["mlp.hidden"]
    out = gated(x)
    gradient, = torch.autograd.grad(F.mse_loss(out, target), logits)
    expected = sum(m * pruned_output(mlp, h, factors.order[:width], x)
                   for m, width in zip(logits.softmax(0), widths, strict=True))
    expected_gradient, = torch.autograd.grad(F.mse_loss(expected, target), logits)
    assert expected_gradient.abs().min() > 1e-5
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [1, 17, 39])
def test_a_cut_mlp_is_the_pruned_one(width: int) -> None:
    mlp, factors, h = make_mlp()
    gated = GatedMlp(mlp, factors)
    gated.active = width
    x = torch.randn(7, IN, dtype=torch.float64)
    expected = pruned_output(mlp, h, factors.order[:width], x)
    torch.testing.assert_close(gated(x), expected, rtol=1e-10, atol=1e-10)
    final = gated.finalized()
    assert final.fc1.out_features == final.fc2.in_features == width
    torch.testing.assert_close(final(x), expected, rtol=1e-10, atol=1e-10)


def test_full_width_is_the_dense_mlp() -> None:
    mlp, factors, _ = make_mlp()
    gated = GatedMlp(mlp, factors)
    x = torch.randn(7, IN, dtype=torch.float64)
    torch.testing.assert_close(gated(x), mlp(x), rtol=1e-13, atol=1e-13)
    gated.gate = torch.ones(HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(gated(x), mlp(x), rtol=1e-11, atol=1e-11)


def test_a_cut_mlp_trains_as_the_pruned_one_does() -> None:
    """Under AdamW, whose decay takes from all of fc2 what it would take from the pruned one."""
    mlp, factors, _ = make_mlp(bias=False)
    gated = GatedMlp(mlp, factors)
    gated.active = 12
    alone = gated.finalized()
    x, target = torch.randn(50, IN, dtype=torch.float64), torch.randn(50, OUT, dtype=torch.float64)
    for module in (gated, alone):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3)
        for _ in range(8):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
    assert (gated.full.fc2.weight.grad[:, 12:] == 0).all()
    torch.testing.assert_close(gated.finalized().fc1.weight, alone.fc1.weight)
    torch.testing.assert_close(gated.finalized().fc2.weight, alone.fc2.weight)


def make_model(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", **SIZE | changes)


def run(model: nn.Module, plan: RankPlan | None = None, **changes: Any) -> train.TrainResult:
    train_set, test_set = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    settings = {"epochs": 1, "batch_size": 64, "search_steps": 2, "calibration_images": 64,
                "alpha_lr": 0.2, "threads": 1, "device": "cpu"}
    return train.run(model, TrainConfig(**settings | changes),
                     train_set.subset(torch.arange(400)), test_set, plan=plan)


def kinds(plan: dict[str, int | str]) -> set[str]:
    return {name.rpartition(".")[2] for name in plan}


def test_search_and_training_choose_widths_where_they_can() -> None:
    found = run(make_model(), keep_params=0.5).results["plan"]
    assert kinds(found) == {"qk", "vo", "hidden", "head"}
    ranks = {"qk", "vo", "fc1", "fc2", "head"}
    assert kinds(run(make_model(), keep_params=0.5, mlp="ranks").results["plan"]) == ranks
    blind = run(make_model(), keep_params=0.5, calibration_images=0, epochs=0)
    assert kinds(blind.results["plan"]) == ranks


@pytest.mark.parametrize("amp", [False, True])
def test_a_plan_of_widths_is_trained(amp: bool) -> None:
    plan = RankPlan({"blocks.0.mlp.hidden": 48, "blocks.1.mlp.fc1": 8, "blocks.1.attn.vo": 8})
    model = make_model()
    trained, results = run(model, plan, epochs=2, amp=amp)
    assert {name: results["plan"][name] for name in plan.ranks} == plan.ranks
    assert trained.blocks[0].mlp.fc1.out_features == 48
    assert trained.blocks[1].mlp.fc1.rank == 8
    assert results["history"][1]["loss"] < results["history"][0]["loss"]


@pytest.mark.parametrize("qk_norm", [False, True])  # fitted block by block, or site by site
def test_without_epochs_a_model_is_as_compress_makes_it(qk_norm: bool) -> None:
    model = make_model(qk_norm=qk_norm).eval()
    parts = {"mlp.hidden": 48, "attn.vo": 8} | ({} if qk_norm else {"attn.qk": 8})
    plan = RankPlan({f"blocks.{i}.{part}": rank for i in range(2) for part, rank in parts.items()})
    free = run(model, plan, epochs=0).model
    train_set, _ = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    images = train.calibration_images(train_set.subset(torch.arange(400)), 64, 0,
                                      train.Processes())
    expected = compress(model, plan=plan, calibration=images)
    assert torch.equal(free(images), expected(images))


def test_widths_need_images() -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.hidden.*calibration"):
        run(make_model(), RankPlan({"blocks.0.mlp.hidden": 48}), calibration_images=0)


def test_a_compressed_model_is_not_compressed_again() -> None:
    small = compress(make_model().eval(), keep_params=0.5,
                     calibration=torch.randn(32, 1, 16, 16))
    with pytest.raises(UserError, match="compressed already"):
        run(small, keep_params=0.3)
    assert run(small).model.rank_plan == small.rank_plan


def test_command_line(tmp_path, capsys) -> None:
    model = ["-m", "vit_tiny_patch16_224", "--img-size", "16", "--in-chans", "1",
             "--num-classes", "10", "--model-kwargs", "patch_size=8", "embed_dim=32", "depth=1",
             "num_heads=2"]
    common = ["train", *model, "--data", "digits", "--keep-params", "0.5", "--epochs", "0",
              "--calibration-images", "32", "--json", "--no-report"]
    found = {}
    for mlp in ("neurons", "ranks"):
        assert cli.main([*common, "--mlp", mlp, "-o", str(tmp_path / mlp)]) == 0
        found[mlp] = kinds(json.loads(capsys.readouterr().out)["plan"])
    assert "hidden" in found["neurons"] and "hidden" not in found["ranks"]
    assert cli.main([*common, "--mlp", "layers", "-o", str(tmp_path / "x")]) == 2
    assert "layers" in capsys.readouterr().err
