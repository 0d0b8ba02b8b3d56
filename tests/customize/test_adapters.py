"""Adapters compute their formula, on every kind of attention, and leave the base as it was."""

import math

import pytest
import torch
from helpers import diffusion
from helpers.diffusion import randomise_
from torch import nn

from adacomcat import UserError
from adacomcat.customize import (
    adapter_parameters,
    add_adapters,
    merge_,
    parameter_count,
    set_alpha,
    unload_,
)
from adacomcat.customize.adapters import adapters_of, attentions

CLOSE = {"rtol": 0, "atol": 1e-12}


def attention(cross: bool, heads: int = 3, width: int = 24, context: int = 20, **settings):
    from diffusers.models.attention_processor import Attention
    return Attention(width, context if cross else None, heads, dim_head=8, **settings).double()


def two_terms(attn, adapter, alpha, x, context, mask=None):
    """The formula per head, with the products as matrices, one softmax, and no wider heads."""
    d, r, total = attn.inner_dim // attn.heads, adapter.rank, 0
    for h in range(attn.heads):
        rows, cols = slice(h * d, (h + 1) * d), slice(h * r, (h + 1) * r)
        wq, wk, wv = (getattr(attn, f"to_{n}").weight[rows].T for n in "qkv")
        wo = attn.to_out[0].weight[:, rows].T
        uq, sk, uv, so = adapter.q[cols].T, adapter.k[cols].T, adapter.v[cols].T, adapter.o.T[cols]
        qk = wq @ wk.T + alpha**2 * uq @ sk.T
        logits = x @ qk @ context.mT / math.sqrt(d)
        if mask is not None:
            logits = logits + mask
        total = total + logits.softmax(-1) @ context @ (wv @ wo + alpha**2 * uv @ so)
    return total + attn.to_out[0].bias


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("cross", [False, True])
def test_output_is_the_formula(rank, alpha, cross):
    attn = attention(cross)
    add_adapters(attn, rank)
    randomise_(attn)
    set_alpha(attn, alpha)
    x, context = torch.randn(2, 7, 24).double(), torch.randn(2, 5, 20).double()
    given = {"encoder_hidden_states": context} if cross else {}
    adapter = adapters_of(attn)[".tokens"]
    expected = two_terms(attn, adapter, alpha, x, context if cross else x)
    torch.testing.assert_close(attn(x, **given), expected, **CLOSE)
    merge_(attn)
    torch.testing.assert_close(attn(x, **given), expected, **CLOSE)
    assert "Adapted" not in type(attn.processor).__name__


def test_masks_are_kept():
    attn = attention(cross=True)
    add_adapters(attn, 2)
    randomise_(attn)
    x, context = torch.randn(2, 7, 24).double(), torch.randn(2, 5, 20).double()
    mask = torch.zeros(2, 1, 5).double().masked_fill(torch.rand(2, 1, 5) < 0.4, -1e9)
    found = attn(x, encoder_hidden_states=context, attention_mask=mask)
    adapter = adapters_of(attn)[".tokens"]
    torch.testing.assert_close(found, two_terms(attn, adapter, 1.0, x, context, mask), **CLOSE)
    assert not torch.allclose(found, attn(x, encoder_hidden_states=context))


def test_pictures_norms_and_residuals_are_kept():
    """The attention of a block without a transformer: pictures, a group norm, a residual."""
    attn = attention(False, norm_num_groups=4, residual_connection=True, rescale_output_factor=2,
                     bias=True)
    for bias in (attn.to_q.bias, attn.to_k.bias, attn.to_v.bias):
        nn.init.normal_(bias)
    picture = torch.randn(2, 24, 3, 4).double()
    base = attn(picture)
    add_adapters(attn, 2)
    torch.testing.assert_close(attn(picture), base, **CLOSE)
    randomise_(attn)
    found = attn(picture)
    assert not torch.allclose(found, base)
    merge_(attn)
    torch.testing.assert_close(attn(picture), found, **CLOSE)


def test_gradients_are_those_of_the_formula():
    attn = attention(cross=True, heads=2, width=6, context=5)
    add_adapters(attn, 2)
    randomise_(attn)
    x, context = torch.randn(1, 3, 6).double(), torch.randn(1, 4, 5).double()
    factors = adapter_parameters(attn)
    weights = torch.randn(1, 3, 6).double()
    found = torch.autograd.grad((attn(x, encoder_hidden_states=context) * weights).sum(), factors)
    formula = two_terms(attn, adapters_of(attn)[".tokens"], 1.0, x, context)
    expected = torch.autograd.grad((formula * weights).sum(), factors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not any(p.requires_grad for name, p in attn.named_parameters() if "adapters" not in name)


MODELS = {"unet": lambda: (diffusion.unet(), diffusion.unet_inputs()), "dit": diffusion.dit,
          "sd3": diffusion.sd3, "sd3 with norms": lambda: diffusion.sd3("rms_norm"),
          "flux": diffusion.flux}
NUMBER = {"unet": 14, "dit": 2, "sd3": 2, "sd3 with norms": 2, "flux": 2}


@pytest.mark.parametrize("kind", MODELS)
def test_models_begin_where_they_were(kind):
    """Zero factors and α = 0 change no bit; the published start moves the output."""
    model, given = MODELS[kind]()
    with torch.no_grad():
        base = model(**given)[0]
        assert len(add_adapters(model, 3)) == NUMBER[kind]
        assert torch.equal(model(**given)[0], base)
        randomise_(model)
        moved = model(**given)[0]
        assert not torch.allclose(moved, base, atol=1e-4)
        set_alpha(model, 0)
        assert torch.equal(model(**given)[0], base)
        unload_(model)
        assert torch.equal(model(**given)[0], base)
        add_adapters(model, 3, init="linear")
        assert not torch.allclose(model(**given)[0], base, atol=1e-5)


@pytest.mark.parametrize("write", [lambda p: nn.init.normal_(p), lambda p: p.data.normal_()])
@torch.no_grad()
def test_factors_written_later_count(write):
    """However they are written, after the model has run with zeros; and zeroed again."""
    attn, x = attention(cross=False), torch.randn(2, 7, 24).double()
    base = attn(x)
    add_adapters(attn, 2)
    assert torch.equal(attn(x), base)
    write(adapters_of(attn)[".tokens"].o)
    assert not torch.allclose(attn(x), base)
    adapters_of(attn)[".tokens"].o.zero_()
    assert torch.equal(attn(x), base)


@pytest.mark.parametrize("kind", MODELS)
def test_zero_factors_compute_the_base_with_gradients(kind):
    model, given = MODELS[kind]()
    base = model(**given)[0].detach()
    add_adapters(model, 3)
    found = model(**given)[0]
    torch.testing.assert_close(found.detach(), base, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    moving = [p for p in adapter_parameters(model) if p.grad is not None and p.grad.any()]
    assert moving


@pytest.mark.parametrize("kind", ["unet", "dit", "sd3"])
def test_merged_models_compute_the_same(kind):
    model, given = MODELS[kind]()
    add_adapters(model, 2, name="one")
    add_adapters(model, 1, name="two", seed=1)
    randomise_(model, "one")
    randomise_(model, "two")
    set_alpha(model, {"one": 0.5, "two": 0.9})
    with torch.no_grad():
        expected = model(**given)[0]
        merge_(model)
        torch.testing.assert_close(model(**given)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd3 with norms", "flux"])
def test_only_values_are_adapted_behind_norms(kind):
    model, _ = MODELS[kind]()
    add_adapters(model, 2)
    assert all(adapter.q is None and adapter.k is None for adapter in adapters_of(model).values())
    with pytest.raises(UserError, match="its heads cannot grow"):
        merge_(model)


def test_several_adapters_add_up():
    """Two adapters of ranks 1 and 2 are one of rank 3 with their rows together."""
    attn = attention(cross=False)
    x = torch.randn(2, 7, 24).double()
    add_adapters(attn, 1, name="one")
    add_adapters(attn, 2, name="two")
    randomise_(attn, "one")
    randomise_(attn, "two")
    found = attn(x)
    parts = [adapters_of(attn, name)[".tokens"] for name in ("one", "two")]
    split = {name: [getattr(p, name).unflatten(0, (3, -1)) for p in parts] for name in "qkv"}
    rows = {name: torch.cat(pair, 1).flatten(0, 1) for name, pair in split.items()}
    columns = torch.cat([p.o.unflatten(1, (3, -1)) for p in parts], 2).flatten(1)
    unload_(attn)
    add_adapters(attn, 3)
    both = adapters_of(attn)[".tokens"]
    with torch.no_grad():
        for name, value in (rows | {"o": columns}).items():
            getattr(both, name).copy_(value)
    torch.testing.assert_close(attn(x), found, **CLOSE)


def test_counts_of_stable_diffusion():
    """The shapes of Stable Diffusion 1.4: 16 transformer blocks, 6.4 MB in single precision."""
    with torch.device("meta"):
        model = diffusion.unet(
            sample_size=64, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
            norm_num_groups=32, cross_attention_dim=768, attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert len(add_adapters(model, rank=2)) == 32
    assert len(adapter_parameters(model)) == 128
    assert parameter_count(model) == 1_591_296
    assert round(4 * parameter_count(model) / 1e6, 1) == 6.4
    unload_(model)
    add_adapters(model, rank=1)
    assert round(4 * parameter_count(model) / 1e6, 1) == 3.2


def test_targets_choose_attentions():
    model = diffusion.unet()
    assert len(attentions(model)) == 14
    names = add_adapters(model, 2, ["*.attn2"])
    assert len(names) == 7 and all(name.endswith("attn2") for name in names)


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: add_adapters(m, 0), "rank must be a whole number"),
    (lambda m: add_adapters(m, 2, ["blocks.*"]), "no attention of UNet2DConditionModel"),
    (lambda m: add_adapters(m, 2, init="random"), "unknown init 'random'"),
    (lambda m: add_adapters(m, 2, name="a.b"), "letters and no dot"),
    (lambda m: (add_adapters(m), add_adapters(m)), "an adapter 'default' already"),
    (lambda m: (add_adapters(m), set_alpha(m, -1)), "alpha must be"),
    (lambda m: (add_adapters(m), set_alpha(m, {"other": 1})), "its adapters are: default"),
    (lambda m: merge_(m), "no adapter to merge"),
    (lambda m: add_adapters("stable-diffusion"), "got str"),
])
def test_wrong_use_is_refused(call, message):
    with pytest.raises(UserError, match=message):
        call(diffusion.unet())
