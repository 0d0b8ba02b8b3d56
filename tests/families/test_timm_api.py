"""timm's own functions on compressed, plain, loaded and optimized models.

Where a dense model allows a use, the others give what the use gives of a model that computes the
same, or refuse with a ``UserError``.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.models import dense_model
from timm.layers import DropPath
from timm.utils import AttentionExtract, ModelEmaV3
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress
from adacomcat.utils.model import input_size

VIT = {"img_size": 32, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 7}
SWIN = {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 7,
        "drop_path_rate": 0.0}
MODELS = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {**VIT, "img_size": 28}),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "beit": ("beit_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", {**VIT, "img_size": 28}),
    "dinov3": ("vit_small_patch16_dinov3", VIT),
    "swin": ("swin_tiny_patch4_window7_224", {**SWIN, "window_size": 4}),
    "swinv2": ("swinv2_tiny_window8_256", {**SWIN, "window_size": 4}),
}
STATES = ("compressed", "loaded", "plain", "optimized")


@cache
def _full_rank(name: str) -> tuple[nn.Module, nn.Module]:
    architecture, args = MODELS[name]
    with torch.random.fork_rng():  # whichever test comes first
        torch.manual_seed(0)
        dense = dense_model(architecture, **args).double()
    return dense, compress(dense, plan=RankPlan.full(dense))


def full_rank(name: str) -> tuple[nn.Module, nn.Module]:
    """A dense model, and the same function in factors."""
    return copy.deepcopy(_full_rank(name))


def in_state(small: nn.Module, state: str, folder: Path) -> nn.Module:
    if state == "plain":
        return adacomcat.to_plain(small)
    if state == "optimized":
        return adacomcat.optimize(small)
    if state == "loaded":
        adacomcat.save(small.float(), folder / "saved")
        return adacomcat.load(folder / "saved").double()
    return small


def images(model: nn.Module, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *input_size(model), generator=generator).to(
        next(model.parameters()).dtype)


Use = Callable[[nn.Module, Path], Any]


def larger(model: nn.Module) -> int:
    return 2 * input_size(model)[1]


def set_input_size(model: nn.Module, folder: Path) -> Any:
    model.set_input_size(img_size=larger(model))
    return model(images(model))


def set_input_size_and_save(model: nn.Module, folder: Path) -> Any:
    model.set_input_size(img_size=larger(model))
    adacomcat.save(model.float(), folder / "sized")
    loaded = adacomcat.load(folder / "sized").double()
    assert input_size(loaded)[1] == input_size(model)[1]
    return loaded(images(loaded))


def new_head(model: nn.Module) -> None:
    model.reset_classifier(5)
    for index, parameter in enumerate(p for p in model.get_classifier().parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def reset_classifier(model: nn.Module, folder: Path) -> Any:
    model.reset_classifier(0)
    return model(images(model))


def reset_classifier_and_save(model: nn.Module, folder: Path) -> Any:
    model.reset_classifier(0)
    adacomcat.save(model.float(), folder / "reset")
    return adacomcat.load(folder / "reset").double()(images(model).double())


def average_pooling(model: nn.Module, folder: Path) -> Any:
    model.reset_classifier(0, "avg")
    return model(images(model))


def intermediates(model: nn.Module, folder: Path) -> Any:
    return model.forward_intermediates(images(model), indices=2)


def prune_intermediate_layers(model: nn.Module, folder: Path) -> Any:
    model.prune_intermediate_layers(1, prune_head=True)
    return model.forward_features(images(model))


def features_only(model: nn.Module, folder: Path) -> Any:
    adacomcat.save(model.float(), folder / "features")
    network = timm.create_model(f"local-dir:{folder}/features", pretrained=True,
                                features_only=True).double().eval()
    return [network.feature_info.channels(), network.feature_info.reduction(),
            *network(images(model).double())]


def another_size(model: nn.Module, folder: Path) -> Any:
    adacomcat.save(model.float(), folder / "another")
    found = timm.create_model(f"local-dir:{folder}/another", pretrained=True,
                              img_size=larger(model)).double().eval()
    return found(images(found))


def gray_images(model: nn.Module, folder: Path) -> Any:
    adacomcat.save(model.float(), folder / "gray")
    found = timm.create_model(f"local-dir:{folder}/gray", pretrained=True,
                              in_chans=1).double().eval()
    return found(images(found))


def gradient_checkpointing(model: nn.Module, folder: Path) -> Any:
    model.set_grad_checkpointing(True)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0  # a loaded model has the architecture's own rate
    x = images(model).requires_grad_()
    model.train()(x).square().sum().backward()
    return x.grad


def parameter_groups(model: nn.Module, folder: Path) -> Any:
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model)
    return sorted({round(group["lr_scale"], 6) for group in groups})


def average_of_weights(model: nn.Module, folder: Path) -> Any:
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    return average.module(images(model))


def attention_maps(method: str) -> Use:
    def extract(model: nn.Module, folder: Path) -> Any:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        maps = AttentionExtract(model, method=method)(images(model))
        return [weights for _, weights in sorted(maps.items())]
    return extract


def deep_copy(model: nn.Module, folder: Path) -> Any:
    return copy.deepcopy(model)(images(model))


USES: dict[str, Use] = {
    "forward": lambda model, folder: model(images(model)),
    "deepcopy": deep_copy,
    "forward_intermediates": intermediates,
    "prune_intermediate_layers": prune_intermediate_layers,
    "set_input_size": set_input_size,
    "set_input_size, then save": set_input_size_and_save,
    "reset_classifier": reset_classifier,
    "reset_classifier, then save": reset_classifier_and_save,
    "reset_classifier with another pooling": average_pooling,
    "features_only of a folder": features_only,
    "a folder with another image size": another_size,
    "a folder with other channels": gray_images,
    "set_grad_checkpointing": gradient_checkpointing,
    "param_groups_layer_decay": parameter_groups,
    "ModelEmaV3": average_of_weights,
    "AttentionExtract by hook": attention_maps("hook"),
    "AttentionExtract by fx": attention_maps("fx"),
}


def flat(result: Any) -> list[Any]:
    if isinstance(result, list | tuple):
        return [part for item in result for part in flat(item)]
    return [result]


def same(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Tensor):
            assert not other.isnan().any()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        else:
            assert one == other


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("use", USES)
def test_use(use: str, name: str, tmp_path: Path) -> None:
    dense, small = full_rank(name)
    try:
        expected = USES[use](dense, tmp_path / "dense")
    except (AttributeError, TypeError, AssertionError, RuntimeError, NotImplementedError) as error:
        pytest.skip(f"not for dense models: {error}")
    for state in STATES:
        model = in_state(copy.deepcopy(small), state, tmp_path / state)
        try:
            found = USES[use](model, tmp_path / state)
        except (UserError, RuntimeError) as error:
            assert state == "optimized", error
            # timm's own line where nothing writes attention weights
            assert isinstance(error, UserError) or "No module names found" in str(error), error
            continue
        if use == "param_groups_layer_decay" and state == "optimized":
            assert found == []  # nothing trains in there
        else:
            same(found, expected)
