"""4-bit weights: two in a byte, a scale for 32 inputs; the model runs as float."""

import pytest
import timm
import torch
from helpers.models import FAMILIES, SMALL, compressed, dense_model, images
from helpers.tolerance import relative_error

import adacomcat
from adacomcat import UserError, cost
from adacomcat.convert.quantized import is_quantized, quantized_layers
from adacomcat.factorize.factors import LinearStatistics
from adacomcat.layers.fused import FusedAttention, FusedDenseMlp, FusedMlp
from adacomcat.layers.quantized import Int4Linear
from adacomcat.ops.int4 import GROUP, Int4Weight
from adacomcat.quantization.rounding import round_linear

MODELS = {"dense": dense_model, "low-rank": compressed}


@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 100])
def test_numbers_come_back(inputs):
    q = torch.randint(-7, 8, (5, inputs))
    scale = torch.rand(5, -(-inputs // GROUP)).bfloat16() + 0.1
    weight = Int4Weight.of(q.double(), scale)
    assert weight.packed.dtype == torch.uint8 and weight.packed.shape == (5, -(-inputs // 2))
    expected = torch.stack([q[:, i] * scale[:, i // GROUP].float() for i in range(inputs)], 1)
    assert torch.equal(weight.dense, expected)


def test_a_group_has_the_better_of_its_grids():
    weight = torch.randn(8, 70)
    weight[3, :GROUP] = 0
    found, _ = round_linear(weight, None, bits=4)
    assert found.scale.shape == (8, 3) and found.scale.dtype == torch.bfloat16
    assert not found.dense[3, :GROUP].any() and found.scale.min() > 0

    def error(dense):
        return (dense - weight).square().sum()

    step = torch.stack([weight[:, i:i + GROUP].abs().amax(1) / 7 for i in (0, 32, 64)], 1)
    wide = step.repeat_interleave(GROUP, 1)[:, :70].clamp_min(1e-9)
    assert error(found.dense) < 0.95 * error((weight / wide).round() * wide)


def test_feedback_lowers_the_error_of_the_output():
    basis = torch.randn(96, 96, dtype=torch.float64)
    x = torch.randn(4000, 96, dtype=torch.float64) * torch.logspace(0, -2, 96) @ basis + 1
    known = LinearStatistics(x.mean(0), torch.cov(x.T, correction=0), len(x))
    weight, bias = torch.randn(30, 96), torch.randn(30)
    exact = x @ weight.double().T + bias
    errors = []
    for statistics in (None, known):
        found, moved = round_linear(weight, bias, statistics, 4)
        assert found.dense.abs().max() > 0 and moved is not None
        errors.append((x @ found.dense.double().T + moved - exact).square().sum().item())
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_quantised_model_is_near_and_small(make, architecture, tmp_path):
    model = make(architecture)
    x = images(model, 16)
    made = adacomcat.quantize(model, x, "int4")
    names = quantized_layers(made)
    assert is_quantized(made) and names == quantized_layers(made, 4)
    assert all(isinstance(made.get_submodule(name), Int4Linear) for name in names)
    with torch.inference_mode():
        near = relative_error(made(x), model(x))
        eight = relative_error(adacomcat.quantize(model, x)(x), model(x))
    assert eight < near < 0.4
    assert cost.model_params(made) == cost.model_params(model)
    stored = sum(layer.out_features * (-(-layer.in_features // 2) + 2 * -(-layer.in_features // 32))
                 for layer in map(made.get_submodule, names))
    weights = sum(layer.out_features * layer.in_features
                  for layer in map(made.get_submodule, names))
    assert cost.model_bytes(made) == cost.model_bytes(adacomcat.to_plain(model)) - (
        4 * weights - stored)
    adacomcat.save(made, tmp_path / "made")
    for other in (adacomcat.load(tmp_path / "made"),
                  timm.create_model(f"local-dir:{tmp_path / 'made'}", pretrained=True).eval()):
        with torch.inference_mode():
            torch.testing.assert_close(other(x), made(x), rtol=0, atol=0)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_optimize_runs_the_float_model_of_the_same_numbers(make):
    model = make(architecture="vit_tiny_patch16_224", img_size=32, **SMALL)
    made = adacomcat.quantize(model, dtype="int4")
    fast = adacomcat.optimize(made)
    assert not is_quantized(fast)
    kinds = {type(module) for block in fast.blocks for module in block.children()}
    assert kinds == {FusedAttention, FusedMlp if make is compressed else FusedDenseMlp}
    x = images(model, 3)
    with torch.inference_mode():
        assert relative_error(fast(x), made(x)) < 1e-5


def test_it_keeps_its_numbers_in_every_dtype_and_does_not_train():
    made = adacomcat.quantize(compressed(), dtype="int4")
    before = {name: value.clone() for name, value in made.state_dict().items()}
    x = images(made, 2)
    with torch.inference_mode():
        expected = made(x)
    half = made.bfloat16()
    with torch.inference_mode():
        assert relative_error(half(x.bfloat16()).float(), expected) < 0.05
    after = half.state_dict()
    assert all(torch.equal(before[f"{name}.{kind}"], after[f"{name}.{kind}"])
               for name in quantized_layers(half) for kind in ("weight", "weight_scale"))
    with pytest.raises(UserError, match="does not train"):
        half.requires_grad_(True)(x.bfloat16())
