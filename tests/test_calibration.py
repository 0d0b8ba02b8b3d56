"""A calibration that is kept: the same models as from images, for other budgets, from a file."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import dense_model
from safetensors.torch import save_file
from torch import Tensor, nn

import adacomcat
from adacomcat import Calibration, RankPlan, UserError, calibrate, compress
from adacomcat.cost import model_params
from adacomcat.factorize.nested import NestedNeurons
from adacomcat.utils.model import tokens_and_outputs

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def distance(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    """|Δ|² / |x|² of the final tokens."""
    (one, *_), (two, *_) = (tokens_and_outputs(model.eval(), images) for model in (first, second))
    return ((two - one).square().sum() / one.square().sum()).item()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return dense_model("vit_tiny_patch16_224")


@pytest.fixture(scope="module")
def kept(model: nn.Module) -> Calibration:
    return calibrate(model, IMAGES)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_budgets_from_a_file_give_the_models_of_fresh_runs(
        architecture: str, tmp_path: Path) -> None:
    """In sequence, and for a model whose blocks are not known."""
    model = dense_model(architecture)
    images = IMAGES if architecture.startswith("vit") else torch.randn(8, 3, 56, 56)
    calibrate(model, images).save(tmp_path / "cal.safetensors")
    loaded = Calibration.load(tmp_path / "cal.safetensors")
    for budget in ({"keep_params": 0.7}, {"keep_macs": 0.5}):
        fresh = compress(model, calibration=images, **budget)
        second = compress(model, calibration=loaded, **budget)
        assert second.rank_plan == fresh.rank_plan
        assert same_weights(second, fresh)


def test_batches_of_the_caller_stay_as_they_are(model: nn.Module, tmp_path: Path) -> None:
    batches = [IMAGES[:7], IMAGES[7:17], IMAGES[17:]]
    calibrate(model, batches).save(tmp_path / "cal.safetensors")
    loaded = Calibration.load(tmp_path / "cal.safetensors")
    assert same_weights(compress(model, keep_params=0.6, calibration=loaded),
                        compress(model, keep_params=0.6, calibration=batches))


def test_filters_of_a_compression_see_the_same_probes(model: nn.Module, kept: Calibration) -> None:
    settings: dict[str, Any] = {"keep_params": 0.8, "exclude": "blocks.0"}
    assert same_weights(compress(model, calibration=kept, **settings),
                        compress(model, calibration=IMAGES, **settings))


def test_without_images_factors_are_cut(model: nn.Module, kept: Calibration,
                                        tmp_path: Path) -> None:
    """No forward pass, the same from the file, and nearer than data-free factors."""
    calibrate(model, IMAGES, keep_images=False).save(tmp_path / "cal.safetensors")
    loaded = Calibration.load(tmp_path / "cal.safetensors")
    assert loaded.batches is None
    with forbidden(model):
        small = compress(model, keep_params=0.5, calibration=loaded)
    assert same_weights(small, compress(model, keep_params=0.5, calibration=kept, refit=False))
    assert same_weights(small, compress(model, keep_params=0.5, calibration=IMAGES, refit=False))
    assert 0.4 * model_params(model) < model_params(small) <= 0.5 * model_params(model)
    free = compress(model, keep_params=0.5)
    assert distance(model, small, IMAGES) < 0.5 * distance(model, free, IMAGES)


class forbidden:  # noqa: N801
    """Inside, no block of any model runs."""

    def __init__(self, model: nn.Module) -> None:
        self.kind = type(model.blocks[0])

    def __enter__(self) -> None:
        def refuse(module: nn.Module, *args: Any) -> None:
            assert not isinstance(module, self.kind), "a block ran"
        self.hook = nn.modules.module.register_module_forward_pre_hook(refuse)

    def __exit__(self, *args: object) -> None:
        self.hook.remove()


def test_neurons_of_a_small_width_are_among_those_of_a_large_one(
        model: nn.Module, kept: Calibration) -> None:
    found, fc2 = kept.known.factors["blocks.0.mlp.hidden"], model.blocks[0].mlp.fc2
    assert isinstance(found, NestedNeurons)
    small, large = (found.pruned(width, fc2.weight.detach(), fc2.bias.detach())[0]
                    for width in (40, 90))
    assert set(small.tolist()) == set(found.order[:40].tolist()) <= set(large.tolist())


def test_a_plan_takes_the_kept_factors(model: nn.Module, kept: Calibration) -> None:
    plan = RankPlan({"blocks.0.attn.qk": 8, "blocks.1.mlp.hidden": 64, "head": 3})
    assert same_weights(compress(model, plan=plan, calibration=kept),
                        compress(model, plan=plan, calibration=IMAGES))
    cut = compress(model, plan=plan, calibration=kept, refit=False)
    assert cut.blocks[1].mlp.fc1.out_features == 64


def test_other_weights_are_refused(kept: Calibration) -> None:
    with pytest.raises(UserError, match="belongs to other weights"):
        compress(dense_model("vit_tiny_patch16_224", seed=1), keep_params=0.5, calibration=kept)


def test_sites_that_nobody_calibrated_are_named(model: nn.Module) -> None:
    kept = calibrate(model, IMAGES, exclude="blocks.0")
    with pytest.raises(UserError, match=r"does not know blocks\.0\.attn\.qk"):
        compress(model, keep_params=0.5, calibration=kept)


@pytest.mark.parametrize(("settings", "message"), [
    ({"refit": True}, "kept none"),
    ({"refine": 2}, "refine makes factors of images"),
])
def test_what_needs_images_says_so(settings: dict[str, Any], message: str,
                                   model: nn.Module) -> None:
    kept = calibrate(model, IMAGES[:8], keep_images=False)
    with pytest.raises(UserError, match=message):
        compress(model, keep_params=0.5, calibration=kept, **settings)


def test_a_refit_without_a_calibration_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match="refit fits blocks to images"):
        compress(model, keep_params=0.5, refit=True)


def test_files_that_are_no_calibration_are_refused(tmp_path: Path, kept: Calibration) -> None:
    path = tmp_path / "cal.safetensors"
    with pytest.raises(UserError, match="cannot read the calibration"):
        Calibration.load(path)
    path.write_bytes(b"nonsense" * 10)
    with pytest.raises(UserError, match="cannot read the calibration"):
        Calibration.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="is no calibration"):
        Calibration.load(path)
    kept.save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot read the calibration"):
        Calibration.load(path)


def test_the_model_is_left_as_it_was() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2,
                              num_heads=2, num_classes=5).train()
    model.blocks[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    calibrate(model, IMAGES[:8])
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_public_names() -> None:
    assert adacomcat.calibrate is calibrate and adacomcat.Calibration is Calibration
