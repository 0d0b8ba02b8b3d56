"""Blocks of EVA, DINOv3, BEiT and Swin behind ``optimize``: what is fused, and what it computes."""

import copy
import pickle

import pytest
import timm
import torch
from helpers.tolerance import relative_error
from timm.models.vision_transformer import Block
from torch import nn

import adacomcat
from adacomcat.errors import UserError
from adacomcat.layers.fused import FusedAttention, FusedBlock
from adacomcat.layers.packed import PackedModule

SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3}
# architecture, arguments, size of the images
MODELS = {
    "eva02": ("eva02_tiny_patch14_224", {"depth": 2}, 56),
    "eva, no rope": ("eva_giant_patch14_224",
                     {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4}, 56),
    "eva, angles of each head": ("eva02_tiny_patch14_224", {**SMALL, "rope_type": "mixed"}, 56),
    "dinov3": ("vit_small_patch16_dinov3", SMALL, 64),  # a class token and four registers
    "dinov3, gated": ("vit_small_plus_patch16_dinov3", SMALL, 64),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", SMALL, 64),
    "dinov2, gated": ("vit_giant_patch14_dinov2", {**SMALL, "mlp_ratio": 4}, 56),
    "beit": ("beit_base_patch16_224", SMALL, 64),
    "swin": ("swin_tiny_patch4_window7_224",
             {"depths": (2, 2), "embed_dim": 32, "num_heads": (2, 4)}, 112),
}


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    architecture, arguments, size = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, img_size=size, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms, scales and biases that matter
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(3, 3, size, size)


def low_rank(model: nn.Module) -> nn.Module:
    """Every attention and MLP at rank 4."""
    plan = {site.name: 4 for site in adacomcat.find_sites(model)
            if ".attn" in site.name or ".mlp" in site.name}
    return adacomcat.compress(model, plan=adacomcat.RankPlan(plan))


def blocks_of(model: nn.Module) -> list[FusedBlock]:
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["dense", "keep 0.6", "rank 4"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_fused_blocks_compute_the_same(name: str, form: str, dtype: torch.dtype) -> None:
    model, x = model_of(name)
    model = {"dense": lambda: model, "keep 0.6": lambda: adacomcat.compress(model, keep_params=0.6),
             "rank 4": lambda: low_rank(model)}[form]()
    exact = model.double()(x.double())
    model, x = model.to(dtype), x.to(dtype)
    optimized = adacomcat.optimize(model)
    assert blocks_of(optimized) and not any(isinstance(m, Block) for m in optimized.modules())
    error = relative_error(optimized(x), exact)
    assert error <= 2 * relative_error(model(x), exact) + 1e-6


@pytest.mark.parametrize("form", ["dense", "rank 4"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_each_half_of_a_block_is_one_op(name: str, form: str) -> None:
    model, _ = model_of(name)
    optimized = adacomcat.optimize(model if form == "dense" else low_rank(model))
    blocks = blocks_of(optimized)
    assert blocks
    assert all(isinstance(half, PackedModule) for block in blocks
               for half in (block.attn, block.mlp))


@pytest.mark.parametrize("name", ["dinov3, gated", "dinov2, gated", "eva02"])
@torch.no_grad()
def test_an_altered_half_stays_what_it_is(name: str) -> None:
    model, x = model_of(name)
    block = model.blocks[0]
    first = block.mlp.fc1 if hasattr(block.mlp, "fc1") else block.mlp.fc1_g
    first.register_forward_hook(lambda module, args, output: output * 2)
    block.attn.proj.register_forward_hook(lambda module, args, output: output * 3)
    optimized = adacomcat.optimize(model)
    halves = [blocks_of(optimized)[0].attn, blocks_of(optimized)[0].mlp]
    assert not any(isinstance(half, PackedModule) for half in halves)
    assert relative_error(optimized(x), model.double()(x.double())) < 1e-5


@torch.no_grad()
def test_a_mask_reaches_the_rotary_attention() -> None:
    model, _ = model_of("dinov3")
    block, optimized = model.blocks[0], adacomcat.optimize(model).blocks[0]
    x, rope = torch.randn(2, 21, 96), model.rope.get_embed(shape=(4, 4))
    mask = torch.rand(21, 21) > 0.3
    for call in ({"rope": rope, "attn_mask": mask}, {"rope": rope, "is_causal": True},
                 {"rope": None}):
        assert relative_error(optimized(x, **call), block(x, **call)) < 1e-5


@torch.no_grad()
def test_optimized_rotary_models_are_copied_and_moved() -> None:
    model, x = model_of("eva02")
    optimized = adacomcat.optimize(low_rank(model))
    expected = optimized(x)
    assert torch.equal(copy.deepcopy(optimized)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(optimized))(x), expected)
    again = adacomcat.optimize(low_rank(model_of("eva02")[0]))
    again.load_state_dict(optimized.state_dict())
    assert torch.equal(again(x), expected)
    halved = copy.deepcopy(optimized)
    halved.blocks[0].attn.half()
    assert halved.blocks[0].attn.wq.dtype == torch.float16
    assert relative_error(optimized.double()(x.double()), expected) < 1e-5


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
    model, x = model_of("swin")
    optimized = adacomcat.optimize(model)
    with pytest.raises(UserError, match="keeps its windows"):
        optimized.set_input_size((224, 224))
    block = blocks_of(optimized)[0]
    with pytest.raises(UserError, match="do not divide into windows"):
        block(torch.randn(1, 10, 14, 32))


@torch.no_grad()
def test_a_rotary_embedding_that_comes_later_is_refused() -> None:
    model, _ = model_of("eva, no rope")
    block = blocks_of(adacomcat.optimize(low_rank(model)))[0]
    with pytest.raises(UserError, match="without rotary embedding"):
        block(torch.randn(1, 17, 64), rope=torch.zeros(16, 32))
