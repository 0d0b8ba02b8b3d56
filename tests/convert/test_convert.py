"""Full rank changes nothing, whatever the architecture; less rank keeps its promises."""

import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, find_sites
from adacomcat.convert.install import build_skeleton
from adacomcat.cost import model_macs, model_params, plan_macs, plan_params
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.utils.model import input_size

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
# Attention of every tier, behind every signature that timm calls it with.
ARCHITECTURES = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "qk_norm": ("vit_tiny_patch16_224", TINY | {"qk_norm": True}),
    "no_bias": ("vit_tiny_patch16_224", TINY | {"qkv_bias": False, "proj_bias": False}),
    "dinov2": ("vit_small_patch14_dinov2", TINY | {"img_size": 28}),
    "deit3": ("deit3_small_patch16_224", TINY),
    "rope": ("vit_small_patch16_rope_224", TINY),
    "dinov3": ("vit_small_patch16_dinov3", TINY),
    "eva02": ("eva02_tiny_patch14_224", TINY | {"img_size": 28}),
    "beit": ("beit_base_patch16_224", TINY),
    "swin": ("swin_tiny_patch4_window7_224",
             {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2),
              "num_heads": (2, 4)}),
    "swinv2": ("swinv2_tiny_window8_256",
               {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2),
                "num_heads": (2, 4)}),
    "siglip": ("vit_base_patch16_siglip_224", TINY),
}


def randomised(name: str, arguments: dict) -> nn.Module:
    """Every bias and table away from zero: none of them may get lost."""
    model = timm.create_model(name, num_classes=7, **arguments)
    for key, parameter in model.named_parameters():
        if "bias" in key or "table" in key:
            nn.init.normal_(parameter, std=0.3)
        elif "gamma" in key:
            nn.init.uniform_(parameter, 0.2, 0.8)
    return model.eval()


def images(model: nn.Module, count: int = 3) -> Tensor:
    return torch.randn(count, *input_size(model))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_full_rank_is_the_same_function(architecture: str) -> None:
    model = randomised(*ARCHITECTURES[architecture])
    x = images(model)
    plan = RankPlan.full(model)
    compressed = compress(model, plan=plan)
    assert relative(model(x), compressed(x)) < 1e-4
    left = [n for n, m in compressed.named_modules()
            if type(m) is nn.Linear and "cpb_mlp" not in n]
    assert not left, f"still dense: {left}"
    assert model_params(compressed) == plan_params(model, plan)
    assert model_macs(compressed) == plan_macs(model, plan)


@pytest.mark.parametrize("name", [
    "deit_small_patch16_224", "vit_small_patch14_dinov2", "deit3_small_patch16_224",
    "vit_small_patch16_rope_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_full_rank_of_whole_architectures(name: str) -> None:
    model = randomised(name, {"img_size": 224} if "dinov2" in name else {})
    x = images(model, 1)
    compressed = compress(model, plan=RankPlan.full(model))
    assert relative(model.forward_features(x), compressed.forward_features(x)) < 1e-4
    assert relative(model(x), compressed(x)) < 1e-4


@pytest.mark.parametrize("architecture", ["vit", "eva02", "swin", "qk_norm", "swinv2"])
@torch.no_grad()
def test_calibrated_full_rank_is_the_same_function(architecture: str) -> None:
    model = randomised(*ARCHITECTURES[architecture])
    x = images(model, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compressed = compress(model, plan=RankPlan.full(model), calibration=x)
    assert relative(model(x), compressed(x)) < 1e-3  # regressions on few tokens, in fp32


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.4])
@pytest.mark.parametrize("architecture", ["vit", "swin", "rope"])
def test_a_budget_in_parameters_is_kept(architecture: str, keep: float) -> None:
    model = randomised(*ARCHITECTURES[architecture])
    compressed = compress(model, keep_params=keep)
    kept = model_params(compressed) / model_params(model)
    assert keep - 0.1 < kept <= keep
    assert compressed.rank_plan.ranks.keys() == {site.name for site in find_sites(model)}


def test_a_budget_in_macs_is_kept() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    compressed = compress(model, keep_macs=0.6)
    assert 0.5 < model_macs(compressed) / model_macs(model) <= 0.6


@torch.no_grad()
def test_calibration_beats_plain_svd_on_images_it_has_not_seen() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    basis = torch.randn(12, *input_size(model))  # images of few degrees of freedom, as photos are
    x = torch.einsum("bk,kchw->bchw", torch.randn(96, 12), basis)
    plan = RankPlan.uniform(model, 0.4)
    plain, calibrated = compress(model, plan=plan), compress(model, plan=plan, calibration=x[:64])
    unseen = x[64:]
    dense = model.forward_features(unseen)
    assert relative(dense, calibrated.forward_features(unseen)) < 0.7 * relative(
        dense, plain.forward_features(unseen))


def test_compress_leaves_the_model_alone_and_compress_in_place_does_not() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compress(model, keep_params=0.5, calibration=images(model, 16))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert adacomcat.compress_(model, keep_params=0.5) is model
    assert any(isinstance(m, LowRankLinear | LowRankAttention) for m in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_skeleton_takes_the_state_of_the_compressed_model(architecture: str) -> None:
    name, arguments = ARCHITECTURES[architecture]
    model = randomised(name, arguments)
    compressed = compress(model, plan=RankPlan.uniform(model, 0.6))
    empty = build_skeleton(timm.create_model(name, num_classes=7, **arguments).eval(),
                           compressed.rank_plan)
    empty.load_state_dict(compressed.state_dict())
    x = images(model)
    torch.testing.assert_close(empty(x), compressed(x))


def test_iterables_of_batches_calibrate_like_one_tensor() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    x, plan = images(model, 32), RankPlan.uniform(model, 0.5)
    whole = compress(model, plan=plan, calibration=x)
    batches = compress(model, plan=plan, calibration=((b, None) for b in x.split(16)))
    for a, b in zip(whole.parameters(), batches.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_mode_and_gradients_survive() -> None:
    model = randomised(*ARCHITECTURES["vit"]).train()
    compressed = compress(model, keep_params=0.5)
    assert compressed.training and all(m.training for m in compressed.modules())
    compressed(images(model)).square().sum().backward()
    assert all(p.grad is not None for p in compressed.parameters())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"keep_params": 0.0}, "keep"), ({"keep_params": 1.5}, "keep"), ({}, "exactly one"),
    ({"keep_params": 0.5, "keep_macs": 0.5}, "exactly one"),
    ({"keep_params": 0.001}, "the least is 0"),
    ({"plan": RankPlan({"blocks.9.mlp.fc1": 4})}, "blocks.9.mlp.fc1"),
    ({"plan": RankPlan({"blocks.0.mlp.fc1": 0})}, "from 1 to 64"),
    ({"plan": RankPlan({"blocks.0.mlp.fc1": True})}, "from 1 to 64"),
    ({"keep_params": 0.5, "calibration": torch.zeros(0, 3, 32, 32)}, "no image"),
    ({"keep_params": 0.5, "calibration": torch.zeros(3, 32)}, r"\(N, C, H, W\)"),
    ({"keep_params": 0.5, "calibration": torch.full((1, 3, 32, 32), torch.nan)}, "calibration"),
])
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compress(randomised(*ARCHITECTURES["vit"]), **arguments)


def test_weights_that_are_not_finite_name_their_layer() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    model.blocks[1].mlp.fc2.weight.data[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc2"):
        compress(model, keep_params=0.5)


def test_thin_calibration_warns_and_works() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    with pytest.warns(UserWarning, match="fewer tokens than dimensions"):
        compressed = compress(model, keep_params=0.5, calibration=images(model, 2))
    assert torch.isfinite(compressed(images(model))).all()


def test_enough_images_do_not_warn() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, keep_params=0.5, calibration=images(model, 256))


def test_budgets_below_the_default_steps_use_smaller_ranks() -> None:
    model = randomised(*ARCHITECTURES["vit"])
    fine = compress(model, keep_params=0.4)
    assert model_params(fine) <= 0.4 * model_params(model)
    assert any(rank != "dense" and rank % 8 for rank in fine.rank_plan.ranks.values())
