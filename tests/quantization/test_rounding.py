"""Weights rounded to int8: the nearest, with error feedback, and exact changes before it."""

import pytest
import torch
from helpers.models import FAMILIES, compressed, dense_model, images
from timm.models.vision_transformer import Block
from torch import Tensor

import adacomcat
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.registry import block_parts
from adacomcat.quantization.fold import (
    fold_norms_,
    folding_attentions,
    move_value_bias_,
    orthogonal,
    rotate_middles_,
)
from adacomcat.quantization.rounding import round_linear


def statistics(width: int, tokens: int = 4000) -> tuple[LinearStatistics, Tensor]:
    """Correlated inputs: a few directions hold most of their variance."""
    basis = torch.randn(width, width, dtype=torch.float64)
    x = torch.randn(tokens, width, dtype=torch.float64) * torch.logspace(0, -2, width)
    x = x @ basis + 2 * torch.randn(width)
    return LinearStatistics(x.mean(0), torch.cov(x.T, correction=0), tokens), x


def test_without_images_every_number_is_the_nearest_of_its_grid():
    weight = torch.randn(6, 50)
    weight[2] = 0
    found, bias = round_linear(weight, None)
    assert found.q.dtype == torch.int8 and bias is None
    assert not found.q[2].any() and found.scale.min() > 0
    assert torch.equal(found.q.abs().amax(1)[[0, 1, 3]], torch.full((3,), 127, dtype=torch.int8))
    assert ((found.dense - weight).abs() <= found.scale[:, None] * 0.5001).all()


@pytest.mark.parametrize("with_bias", [True, False])
def test_feedback_lowers_the_error_of_the_output(with_bias):
    known, x = statistics(200)
    weight = torch.randn(30, 200)
    bias = torch.randn(30) if with_bias else None
    found, moved = round_linear(weight, bias, known)
    plain, _ = round_linear(weight, bias)

    def error(dense: Tensor, shift: Tensor | float) -> float:
        return ((x @ (dense - weight).double().T) + shift).square().sum().item()

    shift = 0.0 if moved is None else (moved - bias).double()
    assert error(found.dense, shift) < 0.2 * error(plain.dense, 0.0)
    assert torch.equal(found.scale, plain.scale)


def test_the_bias_absorbs_the_mean_of_the_error():
    known, x = statistics(40)
    weight, bias = torch.randn(9, 40), torch.randn(9)
    found, moved = round_linear(weight, bias, known)
    before = (x @ weight.double().T + bias).mean(0)
    after = (x @ found.dense.double().T + moved).mean(0)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_feedback_is_plain_rounding_where_inputs_are_independent():
    weight = torch.randn(5, 16)
    known = LinearStatistics(torch.zeros(16).double(), torch.eye(16).double(), 1000)
    assert torch.equal(round_linear(weight, None, known)[0].q, round_linear(weight, None)[0].q)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 24, 40, 64, 77])
def test_a_rotation_is_orthogonal_and_has_no_large_entry(size):
    rotation = orthogonal(size)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size).double())
    assert rotation.abs().max() <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("make", [dense_model, compressed])
@torch.no_grad()
def test_folding_and_rotating_keep_the_function(make, architecture):
    model = adacomcat.to_plain(make(architecture)).double()
    x = images(model).double()
    expected = model(x)
    fold_norms_(model)
    attentions = folding_attentions(model)
    for attn in attentions:
        move_value_bias_(attn)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotate_middles_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    moved = [name for name, value in model.state_dict().items()
             if not torch.equal(value, before[name])]
    assert bool(moved) == (make is compressed)
    for block in [block_parts(module) for module in model.modules() if isinstance(module, Block)]:
        for part in (block.attn, block.mlp):
            assert (part.norm.weight == 1).all() and not part.norm.bias.any()


@torch.no_grad()
def test_a_norm_stays_where_no_bias_can_take_it():
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=1, num_heads=2,
                        qkv_bias=False).double()
    block, x = model.blocks[0], images(model).double()
    expected, norm = model(x), block.norm1.weight.clone()
    fold_norms_(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(block.norm1.weight, norm) and (block.norm2.weight == 1).all()
