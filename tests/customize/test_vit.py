"""Adapters beside the attentions of ViTs: the formula, dense and compressed; files; merging."""

import copy

import pytest
import timm
import torch
from torch import nn

import adacomcat
from adacomcat import RankPlan, UserError, checkpoint, compress
from adacomcat.customize import (
    adapter_parameters,
    add_adapters,
    load_adapters,
    merge_,
    parameter_count,
    save_adapters,
    set_alpha,
    to_lora,
    unload_,
)
from adacomcat.customize.adapters import adapters_of, processors
from adacomcat.layers.attention import LowRankAttention

CLOSE = {"rtol": 0, "atol": 1e-10}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3,
         "num_classes": 5}


def vit(architecture="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    model = timm.create_model(architecture, **SMALL | settings)
    return moved(model)


def swin():
    """Windows of 2 by 2 tokens, each second one shifted."""
    torch.manual_seed(0)
    return moved(timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=4, window_size=2, embed_dim=24,
        depths=(2, 2), num_heads=(3, 6), num_classes=5))


def moved(model):
    """In double precision; no bias is zero and no norm is the identity."""
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


PLAN = {"blocks.*.attn.qk": 4, "blocks.*.attn.vo": 6, "blocks.0.mlp.fc1": 8}
MODELS = {
    "dense": vit,
    "low-rank": lambda: compress(vit(), plan=RankPlan(PLAN)),
    "with norms": lambda: vit(qk_norm=True),
    "low-rank with norms": lambda: compress(vit(qk_norm=True), plan=RankPlan(
        {"blocks.*.attn.q": 8, "blocks.*.attn.vo": 4})),
    "rotary, low-rank": lambda: compress(vit("eva02_tiny_patch14_224"),
                                         plan=RankPlan({"blocks.*.attn.vo": 4})),
    "shifted windows, low-rank": lambda: compress(swin(), plan=RankPlan(
        {"layers.*.qk": 4, "layers.*.vo": 4})),
}
ADAPTS_QUERIES = {"dense", "low-rank", "shifted windows, low-rank"}


def pictures(count=3):
    return torch.randn(count, 3, 16, 16, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(1))


def output(model, x=None):
    with torch.no_grad():
        return model(pictures() if x is None else x)


def randomise_(model, std=0.3):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * drawn)


def two_terms(x, attn, adapter, alpha, mask):
    """The formula per head of a dense attention, with the products as matrices, one softmax."""
    total, d, r = 0, attn.head_dim, adapter.rank
    q, k, v = attn.qkv.weight.chunk(3)
    bq, bk, bv = attn.qkv.bias.chunk(3)
    for h in range(attn.num_heads):
        rows, cols = slice(h * d, (h + 1) * d), slice(h * r, (h + 1) * r)
        frozen = (x @ q[rows].T + bq[rows]) @ (x @ k[rows].T + bk[rows]).mT
        added = x @ adapter.q[cols].T @ adapter.k[cols] @ x.mT
        logits = d**-0.5 * (frozen + alpha**2 * added)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        values = (x @ v[rows].T + bv[rows]) @ attn.proj.weight[:, rows].T
        more = x @ adapter.v[cols].T @ adapter.o[:, cols].T
        total = total + logits.softmax(-1) @ (values + alpha**2 * more)
    return total + attn.proj.bias


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_output_is_the_formula(rank, alpha, masked):
    model = vit()
    dense = copy.deepcopy(model.blocks[0].attn)
    add_adapters(model, rank)
    randomise_(model)
    set_alpha(model, alpha)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.rand(2, 1, 7, 7).ge(0.3) | torch.eye(7, dtype=torch.bool) if masked else None
    expected = two_terms(x, dense, adapters_of(model)["blocks.0.attn.tokens"], alpha,
                         None if mask is None else mask[:, 0])
    found = model.blocks[0].attn(x, attn_mask=mask)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", MODELS)
def test_models_begin_where_they_were(kind):
    """Zero factors and α = 0 change no bit; nor is anything left when adapters are taken away."""
    model = MODELS[kind]()
    base = output(model)
    places = add_adapters(model, 3)
    assert len(places) == (4 if "windows" in kind else 2)
    assert torch.equal(output(model), base)
    with torch.enable_grad():
        torch.testing.assert_close(model(pictures()).detach(), base, **CLOSE)
    randomise_(model)
    assert not torch.allclose(output(model), base, atol=1e-3)
    set_alpha(model, 0)
    assert torch.equal(output(model), base)
    unload_(model)
    assert not processors(model) and torch.equal(output(model), base)


@pytest.mark.parametrize("kind", MODELS)
def test_merged_models_compute_the_same(kind):
    model = MODELS[kind]()
    add_adapters(model, 2)
    add_adapters(model, 1, name="second", seed=1)
    randomise_(model)
    set_alpha(model, {"default": 0.8, "second": 0.5})
    assert all((adapter.q is None) != (kind in ADAPTS_QUERIES)
               for adapter in adapters_of(model).values())
    expected = output(model)
    merge_(model)
    assert not processors(model)
    torch.testing.assert_close(output(model), expected, **CLOSE)
    ranks = model.rank_plan.ranks
    attentions = {name: part for name, part in model.named_modules()
                  if isinstance(part, LowRankAttention)}
    assert {name: ranks[f"{name}.vo"] for name in attentions} \
        == {name: part.rank_vo for name, part in attentions.items()}


@pytest.mark.parametrize("kind", ["dense", "low-rank"])
def test_merged_models_are_saved_and_optimized(kind, tmp_path):
    """Of a dense model too, whose heads are then wider than any plan for it may ask."""
    model = MODELS[kind]().float()
    add_adapters(model, 3)
    randomise_(model)
    x = pictures().float()
    expected = output(model, x)
    merge_(model)
    checkpoint.save(model, tmp_path / "merged", architecture="vit_tiny_patch16_224",
                    model_args=SMALL)
    loaded = checkpoint.load(tmp_path / "merged")
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-4, atol=1e-4)
    fast = adacomcat.optimize(loaded)
    torch.testing.assert_close(output(fast, x), expected, rtol=1e-4, atol=1e-4)


def test_plans_of_ones_own_have_no_wider_heads():
    with pytest.raises(UserError, match="a whole number from 1 to 8"):
        compress(vit(), plan=RankPlan({"blocks.0.attn.qk": 9}))


@pytest.mark.parametrize("kind", MODELS)
def test_only_adapters_and_classifier_train(kind):
    """Every weight of the backbone stays, and gradients are those of finite differences."""
    model = MODELS[kind]()
    add_adapters(model, 2)
    randomise_(model)
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters." in name or name.startswith("head") for name in training)
    factors = adapter_parameters(model)
    assert len(training) == len(factors) + 2
    x, weights = pictures(), torch.randn(3, 5, dtype=torch.float64)
    (model(x) * weights).sum().backward()
    for parameter in factors[:4]:
        way = torch.randn(parameter.shape, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(1e-5 * way)
            above = (model(x) * weights).sum()
            parameter.sub_(2e-5 * way)
            below = (model(x) * weights).sum()
            parameter.add_(1e-5 * way)
        torch.testing.assert_close((parameter.grad * way).sum(), (above - below) / 2e-5,
                                   rtol=1e-4, atol=1e-6)


def test_a_file_has_adapters_and_classifier(tmp_path):
    """It is small, and gives a base with another classifier its own."""
    model = vit(num_classes=7).float()
    add_adapters(model, 2)
    randomise_(model)
    x = pictures().float()
    expected = output(model, x)
    path = save_adapters(model, tmp_path / "a.safetensors")
    size = 4 * (parameter_count(model) + sum(p.numel() for p in model.head.parameters()))
    assert size < path.stat().st_size < size + 6000
    base = vit(num_classes=7).float()
    base.reset_classifier(5)
    load_adapters(base, path, rank=2)
    assert base.num_classes == 7 and torch.equal(output(base, x), expected)
    other = vit(num_classes=7).float()
    nn.init.normal_(other.blocks[1].attn.qkv.weight)
    with pytest.raises(UserError, match="other weights"):
        load_adapters(other, path)


def test_dropout_behaves_as_in_the_base():
    """In training the drawn masks are those of the base, whose output is the adapters' at zero."""
    model = vit(proj_drop_rate=0.3).train()
    torch.manual_seed(3)
    base = model(pictures())
    add_adapters(model, 2)
    torch.manual_seed(3)
    torch.testing.assert_close(model(pictures()), base, **CLOSE)


@pytest.mark.parametrize(("make", "act", "message"), [
    (swin, add_adapters, "no attention of SwinTransformer"),
    (lambda: timm.create_model("resnet18", num_classes=3), add_adapters, "no attention of ResNet"),
    (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), add_adapters,
     "has several classifiers"),
    (vit, lambda m: (add_adapters(m), checkpoint.save(m, "never-written")),
     "customize.merge_ writes them"),
    (vit, lambda m: (add_adapters(m), to_lora(m)), "is an attention of a ViT"),
])
def test_what_cannot_be_is_said(make, act, message):
    with pytest.raises(UserError, match=message):
        act(make())
