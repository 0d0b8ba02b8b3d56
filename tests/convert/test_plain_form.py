"""Plain models: the same factors in PyTorch's modules, and back, saved, quantised and scripted."""

import warnings

import pytest
import timm
import torch
from helpers.models import FAMILIES, compressed, dense_model, images
from torch import nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, from_plain, to_plain
from adacomcat.families import AttentionParts, Projection
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp
from adacomcat.layers.stock import LinearPair, PlainAttention
from adacomcat.sites import find_sites

MORE = {
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 4, "embed_dim": 32,
                                "depths": (1, 1), "num_heads": (2, 2), "num_classes": 7},
    "vit_small_patch16_dinov3": {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2,
                                 "num_classes": 7},
    "vit_tiny_patch16_224.qk": {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2,
                                "num_classes": 7, "qk_norm": True},
}
ARCHITECTURES = [*FAMILIES, *MORE]


def small(name: str) -> nn.Module:
    if name in FAMILIES:
        return compressed(name)
    return compressed(name.partition(".")[0], **MORE[name])


def low_rank(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules()
            if isinstance(module, LowRankAttention | LowRankLinear | LowRankMlp)]


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = 0) -> None:
    x = images(expected)
    with torch.inference_mode():
        torch.testing.assert_close(found.eval()(x), expected.eval()(x), rtol=tolerance,
                                   atol=tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_function_in_stock_modules(name):
    model = small(name)
    before = model.state_dict()
    plain = to_plain(model)
    assert low_rank(model) and not low_rank(plain)
    assert any(isinstance(module, PlainAttention) for module in plain.modules())
    assert_same(plain, model, 1e-5)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    back = from_plain(plain)
    after = back.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [type(module) for module in back.modules()] == [type(m) for m in model.modules()]
    assert_same(back, model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded(name, tmp_path):
    plain = to_plain(small(name))
    adacomcat.save(plain, tmp_path / "plain")
    loaded = adacomcat.load(tmp_path / "plain")
    assert not low_rank(loaded)
    assert_same(loaded, plain)
    assert_same(timm.create_model(f"local-dir:{tmp_path}/plain", pretrained=True), plain)
    adacomcat.save(from_plain(loaded), tmp_path / "again")
    assert low_rank(adacomcat.load(tmp_path / "again"))


def test_layers_alone():
    linear = LowRankLinear(10, 6, 3, bias=False)
    pair = to_plain(linear)
    assert isinstance(pair, LinearPair) and [type(layer) for layer in pair] == [nn.Linear] * 2
    assert (pair.in_features, pair.out_features, pair.rank) == (10, 6, 3)
    x = torch.randn(4, 10)
    torch.testing.assert_close(pair(x), linear(x))
    torch.testing.assert_close(from_plain(pair)(x), linear(x))


def test_what_is_frozen_stays_frozen():
    linear = LowRankLinear(10, 6, 3)
    linear.v.requires_grad_(False)
    pair = to_plain(linear)
    assert [p.requires_grad for p in pair.parameters()] == [False, True, True]
    assert [p.requires_grad for p in from_plain(pair).parameters()] == [False, True, True]


def test_masks_reach_plain_attention():
    model = dense_model()
    attn = LowRankAttention.from_timm(model.blocks[0].attn, 16, 12).eval()
    x, mask = torch.randn(2, 5, 64), torch.rand(2, 1, 5, 5) > 0.3
    plain = to_plain(attn)
    for arguments in ({"attn_mask": mask | torch.eye(5, dtype=torch.bool)}, {"is_causal": True},
                      {"attn_mask": torch.randn(2, 2, 5, 5)}):
        torch.testing.assert_close(plain(x, **arguments), attn(x, **arguments), rtol=1e-4,
                                   atol=1e-5)


def test_training_goes_on_in_plain_form():
    plain = to_plain(compressed()).train()
    before = [p.detach().clone() for p in plain.parameters()]
    plain(torch.randn(2, 3, 32, 32)).square().mean().backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))
    assert moved > len(before) // 2
    assert_same(from_plain(plain), plain, 1e-5)


def test_hooks_see_every_factor():
    plain, seen = to_plain(compressed()), []
    for name, module in plain.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    plain(torch.randn(1, 3, 32, 32))
    assert {"blocks.0.attn.q", "blocks.0.attn.proj", "blocks.1.mlp.fc1.0",
            "blocks.1.mlp.fc1.1"} <= set(seen)


def test_fx_traces_plain_models():
    plain, x = to_plain(compressed()), torch.randn(2, 3, 32, 32)
    model = nn.Sequential(plain.patch_embed, *plain.blocks, plain.norm).eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x))


def test_plain_models_have_no_sites():
    """Their factors are no dense layers, and would be compressed a second time."""
    plain = to_plain(compressed())
    assert not [site for site in find_sites(plain) if site.name.startswith("blocks")]
    assert_same(adacomcat.optimize(plain), plain, 1e-4)


def test_quantised_plain_models_are_half_of_the_quantised_dense_ones():
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    assert torchao
    sizes = []
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=192, depth=2, num_heads=3)
    for one in (model, to_plain(compress(model, keep_params=0.5))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(one, Int8WeightOnlyConfig(version=2))
        sizes.append(sum(weight.element_size() * weight.numel() if type(weight) is nn.Parameter
                         else weight.qdata.numel() + 4 * weight.scale.numel()
                         for weight in one.blocks.parameters()))
    assert sizes[1] < 0.55 * sizes[0]
    with pytest.raises(UserError, match="stands where to_plain put an nn.Linear"):
        from_plain(one)


def test_adapters_attach_to_plain_models():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v", "proj", "fc1.0", "fc2.1"])
    plain = to_plain(compressed())
    model = peft.get_peft_model(plain, config)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len([name for name in trained if ".blocks." in name]) == 2 * 2 * 6
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert_same(from_plain(model.merge_and_unload()), compressed(), 1e-5)


def test_optimized_models_are_refused(tmp_path):
    optimized = adacomcat.optimize(compressed())
    for refused in (to_plain, adacomcat.to_dense, lambda m: adacomcat.save(m, tmp_path / "x")):
        with pytest.raises(UserError, match="takes the model that adacomcat.optimize was given"):
            refused(optimized)
    assert not (tmp_path / "x").exists()


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, padding=None):
        raise NotImplementedError


class LowRankMine(LowRankAttention):
    def score_context(self, x, padding=None):
        return (None if padding is None else ~padding[:, None, None]), None


def test_attention_of_ones_own_says_what_it_lacks():
    def read(attn: Mine) -> AttentionParts:
        parts = map(Projection.of, (attn.query, attn.key, attn.value, attn.out))
        return AttentionParts(*parts, num_heads=2, scale=0.5)

    adacomcat.register_attention(Mine, read, {"A": LowRankMine})
    model = nn.Sequential(Mine())
    made = compress(model, plan=RankPlan({"0.qk": 2, "0.vo": 2}))
    with pytest.raises(UserError, match="LowRankMine has no plain form"):
        to_plain(made)
