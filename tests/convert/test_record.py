"""What a compressed model keeps of the dense one, and what it says of itself afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat import (
    LowRankAttention,
    LowRankLinear,
    RankPlan,
    compress,
    compress_,
    load,
    optimize,
    save,
)
from adacomcat.sites import DENSE

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
        "num_classes": 100}
pytestmark = pytest.mark.filterwarnings("ignore:calibration is thin")


def vit(**more: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SIZE | more).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def assert_comes_back(model: nn.Module, folder: Path, classes: int) -> None:
    save(model, folder)
    x = images(2)
    found = load(folder)
    assert found.num_classes == classes and found(x).shape == (2, classes)
    assert torch.equal(found(x), model.eval()(x))


# Frozen parameters and attributes


CALIBRATED = pytest.mark.parametrize("calibrated", [False, True])
KINDS = pytest.mark.parametrize("more", [{}, {"qk_norm": True}], ids=["A", "B"])


@CALIBRATED
@KINDS
def test_a_frozen_backbone_stays_frozen(calibrated: bool, more: dict[str, bool]) -> None:
    model = vit(**more).requires_grad_(False)
    model.head.requires_grad_(True)
    small = compress(model, keep_params=0.5, calibration=images(40) if calibrated else None)
    trains = {name for name, parameter in small.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in small.named_parameters() if name.startswith("head.")}


@CALIBRATED
@KINDS
def test_each_factor_trains_where_its_projection_does(
        calibrated: bool, more: dict[str, bool]) -> None:
    model = vit(**more)
    for block in model.blocks:
        block.attn.qkv.requires_grad_(False)
        block.mlp.fc1.weight.requires_grad_(False)
    small = compress(model, keep_params=0.5, calibration=images(40) if calibrated else None)
    attn, mlp = small.blocks[0].attn, small.blocks[0].mlp
    named = dict(attn.named_parameters())
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    assert frozen and frozen == {name for name in named if not name.startswith((
        "wo", "bo", "q_norm", "k_norm", "proj"))}
    named = dict(mlp.named_parameters())
    frozen = {name for name, parameter in named.items() if not parameter.requires_grad}
    assert frozen == {name for name in named
                      if name.startswith("fc1.") and not name.endswith("bias")}


@CALIBRATED
def test_what_users_wrote_to_parameters_stays(calibrated: bool) -> None:
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.lr_scale = 0.5 if "attn" in name else 2.0
    small = compress(model, keep_params=0.5, calibration=images(40) if calibrated else None)
    for name, parameter in small.named_parameters():
        assert parameter.lr_scale == (0.5 if "attn" in name else 2.0), name


@CALIBRATED
def test_a_model_in_training_mode_stays_in_it(calibrated: bool) -> None:
    model = vit().train()
    model.blocks[1].eval()
    small = compress(model, keep_params=0.5, calibration=images(40) if calibrated else None)
    for name, module in small.named_modules():
        assert module.training == (not name.startswith("blocks.1")), name


# What is saved


@pytest.mark.parametrize("classes", [7, 100])
def test_a_head_replaced_by_hand_is_saved(tmp_path: Path, classes: int) -> None:
    model = vit()
    model.head = nn.Linear(model.num_features, classes)
    small = compress(model, keep_params=0.7, calibration=images(40))
    assert_comes_back(small, tmp_path / "small", classes)
    small.head = nn.Linear(model.num_features, 3)
    assert_comes_back(small, tmp_path / "again", 3)
    save(small, tmp_path / "told", architecture="vit_tiny_patch16_224", model_args=SIZE)
    assert load(tmp_path / "told").num_classes == 3


def test_a_head_removed_by_hand_is_saved(tmp_path: Path) -> None:
    small = compress(vit(), keep_params=0.6)
    small.head = nn.Identity()
    save(small, tmp_path / "small")
    assert load(tmp_path / "small").num_classes == 0


def test_a_classifier_that_was_reset_is_saved(tmp_path: Path) -> None:
    small = compress(vit(), keep_params=0.4, calibration=images(40))
    assert small.rank_plan["head"] != DENSE  # else this test shows nothing
    small.reset_classifier(7)
    assert_comes_back(small, tmp_path / "small", 7)


@pytest.mark.parametrize("second", [None, 40])
@pytest.mark.parametrize("first", [None, 40])
def test_a_model_compressed_twice_is_saved(
        tmp_path: Path, first: int | None, second: int | None) -> None:
    def calibration(count: int | None) -> Tensor | None:
        return None if count is None else images(count)

    once = compress(vit(), keep_params=0.7, calibration=calibration(first))
    # Without images nothing but the head is left to shrink where MLPs lost neurons before.
    keep = 0.95 if first and not second else 0.8
    twice = compress(once, keep_params=keep, calibration=calibration(second))
    assert once.rank_plan.ranks.keys() >= {"blocks.0.attn.qk", "blocks.0.attn.vo"}
    lower = {name for name, rank in once.rank_plan.ranks.items() if rank != DENSE}
    assert lower <= twice.rank_plan.ranks.keys()
    assert_comes_back(twice, tmp_path / "twice", 100)


def test_factors_put_in_by_hand_are_saved(tmp_path: Path) -> None:
    model = vit()
    model.head = LowRankLinear.from_linear(model.head, 12)
    model.blocks[0].attn = LowRankAttention.from_timm(model.blocks[0].attn, 8, 8)
    assert_comes_back(model, tmp_path / "small", 100)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_is_wrapped_is_compressed_and_saved(
        tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = vit()
    small = compress(wrap(model), keep_params=0.6)
    assert type(small) is type(model) is type(optimize(wrap(model))).__mro__[1]
    assert_comes_back(small, tmp_path / "small", 100)
    assert compress_(wrap(model), keep_params=0.6) is model


@pytest.mark.parametrize(("more", "site"), [({}, "qk"), ({}, "vo"), ({"qk_norm": True}, "q"),
                                            ({"qk_norm": True}, "vo")])
def test_ranks_of_one_half_are_told_as_they_were_planned(
        tmp_path: Path, more: dict[str, bool], site: str) -> None:
    plan = RankPlan({f"blocks.0.attn.{site}": 8, "blocks.1.mlp.fc1": 16})
    small = compress(vit(**more), plan=plan)
    assert_comes_back(small, tmp_path / "small", 100)
    assert load(tmp_path / "small").rank_plan == plan
