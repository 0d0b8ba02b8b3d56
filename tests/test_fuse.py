"""optimize(): the same function, whole sublayers at a time."""

import copy

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

import adacomcat
from adacomcat.families.timm import ClassTokenVisionTransformer
from adacomcat.fuse import fused_block
from adacomcat.layers.fused import (
    FusedAttention,
    FusedBlock,
    FusedDenseMlp,
    FusedMlp,
    GemvLinear,
    Sublayer,
)
from adacomcat.layers.registry import block_parts
from adacomcat.ops import backends

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4,
        "num_classes": 7}


def randomize_(model: nn.Module) -> nn.Module:
    """Norms, biases and layer scales that do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def compressed(**kwargs: object) -> nn.Module:
    model = randomize_(timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs}))
    ranks = {"qk": 5, "vo": 9, "q": 21, "k": 22, "fc1": 13, "fc2": 11}
    return adacomcat.compress(model, plan=adacomcat.RankPlan(
        {site.name: ranks[site.name.rpartition(".")[2]] for site in adacomcat.find_sites(model)
         if site.name.startswith("blocks")}))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kwargs", [
    {}, {"init_values": 0.1}, {"qkv_bias": False, "class_token": False, "global_pool": "avg"},
    {"act_layer": "silu"}, {"norm_layer": "rmsnorm"}, {"qk_norm": True},
], ids=["plain", "layer-scale", "no-bias", "silu", "rms-norm", "qk-norm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_same_outputs(kwargs: dict, dtype: torch.dtype) -> None:
    model = compressed(**kwargs).to(dtype)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    x = torch.randn(5, 3, 32, 32, dtype=dtype)
    optimized = adacomcat.optimize(model)
    assert relative(optimized(x), model(x)) < (1e-12 if dtype == torch.float64 else 1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_what_is_fused() -> None:
    block = adacomcat.optimize(compressed()).blocks[0]
    assert type(block) is FusedBlock
    assert type(block.attn) is FusedAttention and type(block.mlp) is FusedMlp
    block = adacomcat.optimize(compressed(norm_layer="rmsnorm")).blocks[0]
    assert type(block.attn) is Sublayer and type(block.mlp) is Sublayer
    block = adacomcat.optimize(compressed(qk_norm=True)).blocks[0]
    assert type(block.attn) is Sublayer and type(block.mlp) is FusedMlp


@torch.no_grad()
def test_cuda_takes_both_halves_of_a_block_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norm and residual go to the compiled kernels; the meta device stands for a GPU here."""
    calls = []

    def compiled(op: str, device: str):
        def kernel(x: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
            calls.append((op, device, sorted(options)))
            return x

        return kernel

    block = adacomcat.optimize(compressed()).blocks[0].to("meta")
    monkeypatch.setattr(backends, "pick", lambda op, x, keep=False: "cuda")
    monkeypatch.setattr(backends, "_compiled_kernel", compiled)
    block(torch.empty(2, 17, 48, device="meta"))
    assert calls == [("low_rank_attention", "cuda", ["epsilon", "residual"]),
                     ("low_rank_mlp", "cuda", ["epsilon", "residual"])]


@pytest.mark.parametrize("kwargs, shortcut", [
    ({}, True), ({"reg_tokens": 2}, True), ({"init_values": 0.3}, True),
    ({"class_token": False, "global_pool": "avg"}, False), ({"global_pool": "avg"}, False),
    ({"global_pool": "map"}, False), ({"qk_norm": True}, False),
    ({"no_embed_class": True, "reg_tokens": 1}, True), ({"pos_embed": "none"}, True),
    ({"pre_norm": True}, True), ({"num_classes": 0}, True), ({"fc_norm": True}, True),
    ({"patch_size": 7, "img_size": 35}, True),
], ids=str)
@torch.no_grad()
def test_a_head_that_reads_the_class_token_gets_no_other(kwargs: dict, shortcut: bool) -> None:
    model = compressed(**kwargs)
    optimized, x = adacomcat.optimize(model), torch.randn(6, 3, *model.patch_embed.img_size)
    assert (type(optimized) is ClassTokenVisionTransformer) == shortcut
    if shortcut and model.num_classes:
        assert type(model.head) is torch.nn.Linear and type(optimized.head) is GemvLinear
    for images in (x, x[:3], x[:1]):
        assert relative(optimized(images), model(images)) < 1e-5
    assert relative(optimized.forward_features(x), model.forward_features(x)) < 1e-5
    assert relative(optimized(x, is_causal=True), model(x, is_causal=True)) < 1e-5


@pytest.mark.parametrize("size", [(40, 24), (16, 64)], ids=str)  # the second: as many patches
@torch.no_grad()
def test_another_input_size(size: tuple[int, int]) -> None:
    model = compressed()
    optimized = adacomcat.optimize(model)
    for changed in (model, optimized):
        changed.set_input_size(size)
    x = torch.randn(2, 3, *size)
    assert relative(optimized(x), model(x)) < 1e-5


@torch.no_grad()
def test_bfloat16_is_as_near_as_the_model_that_went_in() -> None:
    model = compressed(init_values=0.5).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    exact = model(x)
    half = model.bfloat16()
    error = relative(half(x.bfloat16()).double(), exact)
    assert relative(adacomcat.optimize(half)(x.bfloat16()).double(), exact) < 1.5 * error


@torch.no_grad()
def test_masks_reach_the_attention() -> None:
    model = compressed()
    block, fused = model.blocks[1], adacomcat.optimize(model).blocks[1]
    x, mask = torch.randn(2, 17, 48), torch.randn(2, 1, 17, 17)
    torch.testing.assert_close(fused(x, attn_mask=mask), block(x, attn_mask=mask))
    torch.testing.assert_close(fused(x, is_causal=True), block(x, is_causal=True))
    assert not torch.allclose(fused(x), fused(x, is_causal=True))


@torch.no_grad()
def test_compiles_whole() -> None:
    optimized = adacomcat.optimize(compressed())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(optimized, fullgraph=True)(x), optimized(x))


@torch.no_grad()
def test_the_optimized_model_keeps_names_and_methods() -> None:
    model = compressed()
    optimized, x = adacomcat.optimize(model), torch.randn(2, 3, 32, 32)
    outside = {name for name in model.state_dict() if not name.startswith("blocks.")}
    assert {name for name in optimized.state_dict() if not name.startswith("blocks.")} == \
        outside | {"embedding"}
    assert isinstance(optimized, type(model)) and optimized.get_classifier() is optimized.head
    copied = copy.deepcopy(optimized)
    assert torch.equal(copied(x), optimized(x))
    copied.reset_classifier(3)
    assert copied(x).shape == (2, 3) and optimized(x).shape == (2, 7)
    assert type(model.head) is nn.Linear and type(model.patch_embed.proj) is nn.Conv2d


def dense(**kwargs: object) -> nn.Module:
    return randomize_(timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs}))


@pytest.mark.parametrize("kwargs", [
    {}, {"init_values": 0.1}, {"qkv_bias": False, "proj_bias": False},
    {"class_token": False, "global_pool": "avg"}, {"act_layer": "silu"}, {"act_layer": "tanh"},
    {"qk_norm": True}, {"scale_attn_norm": True}, {"scale_mlp_norm": True},
], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_dense_sublayers_give_the_same(kwargs: dict, dtype: torch.dtype) -> None:
    model = dense(**kwargs).to(dtype)
    x = torch.randn(5, 3, 32, 32, dtype=dtype)
    optimized = adacomcat.optimize(model)
    assert relative(optimized(x), model(x)) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kwargs, attention, mlp", [
    ({}, FusedAttention, FusedDenseMlp), ({"init_values": 0.1}, FusedAttention, FusedDenseMlp),
    ({"act_layer": "tanh"}, FusedAttention, Sublayer), ({"qk_norm": True}, Sublayer, FusedDenseMlp),
    ({"scale_attn_norm": True}, Sublayer, FusedDenseMlp),
    ({"scale_mlp_norm": True}, FusedAttention, Sublayer),
    ({"norm_layer": "rmsnorm"}, Sublayer, Sublayer),
], ids=str)
def test_which_dense_sublayers_are_fused(kwargs: dict, attention: type, mlp: type) -> None:
    optimized = adacomcat.optimize(dense(**kwargs))
    assert type(optimized.blocks[0].attn) is attention and type(optimized.blocks[0].mlp) is mlp
    assert (type(optimized) is ClassTokenVisionTransformer) == (attention is FusedAttention)


def test_linears_of_another_kind_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = dense()
    model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2 = Doubled(48, 144), Doubled(192, 48)
    optimized, x = adacomcat.optimize(model.eval()), torch.randn(2, 3, 32, 32)
    assert type(optimized.blocks[0].attn) is Sublayer and type(optimized.blocks[1].mlp) is Sublayer
    with torch.no_grad():
        assert relative(optimized(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_an_mlp_of_fewer_hidden_neurons() -> None:
    """Beside low-rank attention, in some blocks: of none at all it is its last bias."""
    model = compressed(init_values=0.4)
    for block, hidden in zip(model.blocks, (37, 1, 0), strict=True):
        block.mlp = randomize_(Mlp(48, 48, act_layer=nn.GELU))
        block.mlp.fc1 = nn.Linear(48, hidden)
        block.mlp.fc2 = nn.Linear(hidden, 48)
    optimized, x = adacomcat.optimize(model.eval()), torch.randn(3, 3, 32, 32)
    assert {type(block.mlp) for block in optimized.blocks} == {FusedDenseMlp}
    assert relative(optimized(x), model(x)) < 1e-5


@torch.no_grad()
def test_masks_reach_a_dense_attention() -> None:
    block = randomize_(Block(48, 4, qkv_bias=True))
    fused = fused_block(block_parts(block))
    x, mask = torch.randn(2, 17, 48), torch.randn(2, 1, 17, 17)
    torch.testing.assert_close(fused(x, attn_mask=mask), block(x, attn_mask=mask))
    torch.testing.assert_close(fused(x, is_causal=True), block(x, is_causal=True))


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.1}, {"qk_norm": True}],
                         ids=["plain", "layer-scale", "qk-norm"])
@torch.no_grad()
def test_the_plain_form_is_fused_as_the_low_rank_layers_are(kwargs: dict) -> None:
    model = compressed(**kwargs)
    plain, x = adacomcat.to_plain(model), torch.randn(2, 3, 32, 32)
    fast, same = adacomcat.optimize(model), adacomcat.optimize(plain)
    assert ([[type(part) for part in block.children()] for block in same.blocks]
            == [[type(part) for part in block.children()] for block in fast.blocks])
    assert type(same.blocks[0].mlp) is FusedMlp
    assert relative(same(x), fast(x)) < 1e-5 and relative(same(x), model(x)) < 1e-5


@torch.no_grad()
def test_a_plain_form_that_someone_changed_stays() -> None:
    plain, x = adacomcat.to_plain(compressed()), torch.randn(2, 3, 32, 32)
    plain.blocks[0].mlp.fc1[0].register_forward_hook(lambda module, args, y: 2 * y)
    plain.blocks[1].attn.v.register_forward_hook(lambda module, args, y: 2 * y)
    fast = adacomcat.optimize(plain)
    assert type(fast.blocks[0].mlp) is type(fast.blocks[1].attn) is Sublayer
    assert relative(fast(x), plain(x)) < 1e-5
