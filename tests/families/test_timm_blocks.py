"""Blocks of EVA, DINOv3, BEiT and Swin behind ``optimize``: what is fused, and what it computes."""

import pytest
import timm
import torch
from helpers.tolerance import relative_error
from timm.models.vision_transformer import Block
from torch import nn

import adacomcat
from adacomcat.errors import UserError
from adacomcat.layers.fused import FusedAttention, FusedBlock, FusedDenseMlp, FusedMlp

# architecture, arguments, size of the images, whether its low-rank attentions become one op
MODELS = {
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2}, 56, False),
    "eva, no rope": ("eva_giant_patch14_224",
                     {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4}, 56, True),
    "dinov3": ("vit_small_patch16_dinov3", {"depth": 2, "embed_dim": 96, "num_heads": 3}, 64,
               False),
    "beit": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 96, "num_heads": 3}, 64, True),
    "swin": ("swin_tiny_patch4_window7_224",
             {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4)}, 112, True),
}


def model_of(name: str) -> tuple[nn.Module, torch.Tensor, bool]:
    architecture, arguments, size, fuses = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, img_size=size, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms, scales and biases that matter
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(3, 3, size, size), fuses


def low_rank(model: nn.Module) -> nn.Module:
    """Every attention and MLP at rank 4."""
    plan = {site.name: 4 for site in adacomcat.find_sites(model)
            if ".attn" in site.name or ".mlp" in site.name}
    return adacomcat.compress(model, plan=adacomcat.RankPlan(plan))


def blocks_of(model: nn.Module) -> list[FusedBlock]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "keep 0.6"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fused_blocks_compute_the_same(name: str, form: str, dtype: torch.dtype) -> None:
    model, x, _ = model_of(name)
    model = model if form == "dense" else adacomcat.compress(model, keep_params=0.6)
    exact = model.double()(x.double())
    model, x = model.to(dtype), x.to(dtype)
    optimized = adacomcat.optimize(model)
    assert blocks_of(optimized) and not any(isinstance(m, Block) for m in optimized.modules())
    error = relative_error(optimized(x), exact)
    assert error <= 2 * relative_error(model(x), exact) + 1e-6


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_one_op(name: str) -> None:
    model, _, fuses = model_of(name)
    small = adacomcat.optimize(low_rank(model))
    # Rotary embeddings stand between projections and logits; gated MLPs have no op.
    assert all(isinstance(block.attn, FusedAttention) == fuses for block in blocks_of(small))
    gated = name.startswith("eva02")
    assert all(isinstance(block.mlp, FusedMlp | FusedDenseMlp) != gated
               for block in blocks_of(small))


@torch.no_grad()
def test_shared_biases_of_beit_are_added() -> None:
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", depth=2, embed_dim=96, num_heads=3,
                              img_size=64, use_shared_rel_pos_bias=True).eval()
    model.rel_pos_bias.relative_position_bias_table.normal_()
    small, x = adacomcat.compress(model, keep_params=0.6), torch.randn(2, 3, 64, 64)
    optimized = adacomcat.optimize(small)
    assert all(isinstance(block.attn, FusedAttention) for block in blocks_of(optimized))
    assert relative_error(optimized(x), small(x)) < 1e-6


@torch.no_grad()
def test_windows_that_need_padding_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2,), num_heads=(2,),
                              embed_dim=32, img_size=100).eval()
    optimized, x = adacomcat.optimize(model), torch.randn(1, 3, 100, 100)
    assert not blocks_of(optimized)
    assert relative_error(optimized(x), model(x)) < 1e-6


@torch.no_grad()
def test_an_optimized_swin_refuses_other_sizes() -> None:
    model, x, _ = model_of("swin")
    optimized = adacomcat.optimize(model)
    with pytest.raises(UserError, match="keeps its windows"):
        optimized.set_input_size((224, 224))
    block = blocks_of(optimized)[0]
    with pytest.raises(UserError, match="do not divide into windows"):
        block(torch.randn(1, 10, 14, 32))


@torch.no_grad()
def test_a_rotary_embedding_that_comes_later_is_refused() -> None:
    model, _, _ = model_of("eva, no rope")
    block = blocks_of(adacomcat.optimize(low_rank(model)))[0]
    with pytest.raises(UserError, match="without rotary embedding"):
        block(torch.randn(1, 17, 64), rope=torch.zeros(16, 32))
