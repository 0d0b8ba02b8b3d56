"""A quantised model computes nearly what it was made of, runs where models run, never trains."""

import copy
import io

import pytest
import timm
import torch
from helpers.models import FAMILIES, SMALL, compressed, dense_model, images
from helpers.tolerance import relative_error
from torch import nn

import adacomcat
from adacomcat import UserError, cost
from adacomcat.convert.quantized import is_quantized, quantized_layers
from adacomcat.convert.record import ranks_as_they_are
from adacomcat.layers.fused import FusedAttention, FusedDenseMlp, FusedMlp
from adacomcat.layers.packed import PackedModule, unpacked
from adacomcat.layers.quantized import Int8Linear
from adacomcat.utils.model import tokens_and_outputs

MODELS = {"dense": dense_model, "low-rank": compressed}


def neurons(**args) -> nn.Module:
    """Low-rank attentions, and an MLP that lost neurons."""
    model = dense_model(**args)
    return adacomcat.compress(model, keep_params=0.6, calibration=images(model, 8), multiple=2)


@torch.inference_mode()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([found.flatten(1) for found in tokens_and_outputs(model, x)], 1)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_are_near(make, architecture):
    model = make(architecture)
    x, before = images(model, 4), copy.deepcopy(model.state_dict())
    made = adacomcat.quantize(model)
    assert relative_error(outputs(made, x), outputs(model, x)) < 0.1
    assert not any(p.requires_grad for p in made.parameters()) and not made.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(quantized_layers(made)) > 4 and is_quantized(made) and not is_quantized(model)
    names = quantized_layers(made)
    assert all(made.get_submodule(name).weight.dtype == torch.int8 for name in names)
    assert not [name for name in names if "head" in name or "cpb" in name]


def test_a_weight_that_an_attention_reads_for_itself_stays_float():
    made = adacomcat.quantize(dense_model("beit_base_patch16_224"))  # timm calls no qkv there
    attn = made.blocks[0].attn
    assert type(attn.qkv) is nn.Linear and type(attn.proj) is Int8Linear


@pytest.mark.parametrize("make", [*MODELS.values(), neurons], ids=[*MODELS, "neurons"])
def test_images_lower_the_error(make):
    model = make()
    torch.manual_seed(0)
    seen, other = images(model, 32), images(model, 64)
    exact = outputs(model, other)
    plain = relative_error(outputs(adacomcat.quantize(model), other), exact)
    fed = relative_error(outputs(adacomcat.quantize(model, seen), other), exact)
    assert fed < 0.97 * plain


def test_a_calibration_gives_its_images():
    model = dense_model()
    x = images(model, 8)
    expected = adacomcat.quantize(model, x).state_dict()
    found = adacomcat.quantize(model, adacomcat.calibrate(model, x)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(UserError, match="keep_images"):
        adacomcat.quantize(model, adacomcat.calibrate(model, x, keep_images=False))


def test_values_lose_their_bias_and_parameters_are_counted():
    model = dense_model()
    made = adacomcat.quantize(model, images(model, 8))
    qkv = made.blocks[0].attn.qkv
    assert qkv.bias[-64:].abs().max() == 0 and qkv.bias[:64].abs().max() > 0
    assert cost.model_params(made) == cost.model_params(model)
    assert cost.model_macs(made) == cost.model_macs(model)
    scales = sum(made.get_submodule(name).weight_scale.numel() for name in quantized_layers(made))
    weights = sum(made.get_submodule(name).weight.numel() for name in quantized_layers(made))
    assert cost.model_bytes(made) == 4 * (cost.model_params(model) + scales) - 3 * weights


def test_the_ranks_stay_known():
    for make in (compressed, neurons):
        model = make()
        assert ranks_as_they_are(adacomcat.quantize(model)) == ranks_as_they_are(model) != {}


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("make", [*MODELS.values(), neurons], ids=[*MODELS, "neurons"])
def test_optimize_runs_the_same_numbers(make, pool):
    model = make(architecture="vit_tiny_patch16_224", img_size=32, **SMALL, global_pool=pool,
                 init_values=0.5)
    x = images(model, 16)
    made = adacomcat.quantize(model, images(model, 8))
    fast = adacomcat.optimize(made)
    fused = [m for m in fast.modules() if isinstance(m, PackedModule)]
    assert len(fused) == 4 and all(module.is_int8 for module in fused)
    kinds = {type(m) for m in fused}
    assert kinds == {FusedAttention, FusedMlp if make is compressed else FusedDenseMlp}
    formula = unpacked(copy.deepcopy(fast))
    with torch.inference_mode():
        exact, found, unfused, float_one = made(x), fast(x), formula(x), model(x)
    rounding = relative_error(exact, float_one)
    # The last attention for the class token alone rounds no activation; kernels may round finer.
    assert relative_error(unfused, exact) < (0.1 if pool == "avg" else 1) * rounding
    assert relative_error(found, exact) < 1.5 * rounding
    assert 0.3 * rounding < relative_error(found, float_one) < 2 * rounding


def test_a_fused_module_rounds_activations():
    """In the formula too, which runs where no kernel does."""
    model = dense_model(architecture="vit_tiny_patch16_224", img_size=32, **SMALL)
    mlp = adacomcat.optimize(adacomcat.quantize(model)).blocks[0].mlp
    mlp.unpack_()
    x = torch.randn(2, 3, 64)
    rounded = mlp(x)
    fine = copy.deepcopy(mlp)
    for name in fine.weights:
        del fine._buffers[f"{name}_scale"]
    assert 1e-4 < relative_error(fine(x) - x, rounded - x) < 0.1


def test_scales_stay_float32_and_numbers_stay_whole():
    made = adacomcat.quantize(compressed())
    for model in (made, adacomcat.optimize(made)):
        half = copy.deepcopy(model).to(torch.bfloat16)
        before, after = model.state_dict(), half.state_dict()
        scales = [name for name in before if name.endswith("_scale")]
        assert scales and all(torch.equal(before[name], after[name]) for name in scales)
        x = images(made, 3)
        with torch.inference_mode():
            found = half(x.bfloat16())
            assert found.dtype == torch.bfloat16
            assert relative_error(found.float(), model(x)) < 0.05


def test_a_model_in_bfloat16_is_quantised_in_its_dtype():
    model = dense_model().bfloat16()
    made = adacomcat.quantize(model, images(model, 4))
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    x = images(model, 3).bfloat16()
    assert relative_error(outputs(made, x), outputs(model, x)) < 0.1


def test_it_compiles_exports_copies_and_pickles():
    made = adacomcat.quantize(compressed())
    x = images(made, 3)
    with torch.inference_mode():
        expected = made(x)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(made, x)(x), expected)
        with pytest.raises(UserError, match="torch.jit.trace"):
            torch.jit.script(made)
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        for other in (copy.deepcopy(made), torch.load(file, weights_only=False)):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_a_fused_state_is_loaded_and_pickled():
    fast = adacomcat.optimize(adacomcat.quantize(compressed()))
    other = adacomcat.optimize(adacomcat.quantize(compressed(seed=5)))
    other.load_state_dict(fast.state_dict())
    x = images(fast, 3)
    with torch.inference_mode():
        torch.testing.assert_close(other(x), fast(x), rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(fast)(x), fast(x), rtol=0, atol=0)


def test_it_moves_to_the_meta_device():
    made = adacomcat.quantize(compressed()).to("meta")
    assert made(torch.empty(2, *images(made).shape[1:], device="meta")).shape == (2, 7)


def test_training_is_refused():
    made = adacomcat.quantize(compressed()).requires_grad_(True)
    with pytest.raises(UserError, match="does not train"):
        made(images(made))
    layer = Int8Linear(4, 3)
    assert layer(torch.randn(2, 4)).requires_grad is False


def test_a_head_of_its_own_still_trains():
    made = adacomcat.quantize(compressed())
    made.head.requires_grad_(True)
    made(images(made)).sum().backward()
    assert made.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("use", [
    lambda made: adacomcat.quantize(made),
    lambda made: adacomcat.compress(made, keep_params=0.5),
    lambda made: adacomcat.calibrate(made, images(made)),
    lambda made: adacomcat.to_dense(made),
    lambda made: adacomcat.from_plain(made),
    lambda made: adacomcat.recover(made, made, [images(made)]),
], ids=["quantize", "compress", "calibrate", "to_dense", "from_plain", "recover"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_quantising_comes_last(use, make):
    with pytest.raises(UserError, match="quantising comes last"):
        use(adacomcat.quantize(make()))


def test_what_cannot_be_quantised():
    with pytest.raises(UserError, match="int8"):
        adacomcat.quantize(dense_model(), dtype="int2")
    with pytest.raises(UserError, match="optimize"):
        adacomcat.quantize(adacomcat.optimize(dense_model()))
    with pytest.raises(UserError, match="nothing to quantise"):
        adacomcat.quantize(timm.create_model("resnet18", num_classes=3))
    with pytest.raises(UserError, match="calibration holds no image"):
        adacomcat.quantize(dense_model(), [])
    broken = dense_model()
    broken.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.fc1: its weight holds NaN"):
        adacomcat.quantize(broken)


@torch.no_grad()
def test_a_model_of_transformers_with_named_inputs():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    dense = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28)).eval()
    seen, other = torch.randn(8, 3, 28, 28), torch.randn(4, 3, 28, 28)
    exact = dense(other).last_hidden_state
    made = adacomcat.quantize(dense, [{"pixel_values": seen}])
    assert len(quantized_layers(made)) == 12
    assert 0 < relative_error(made(other).last_hidden_state, exact) < 0.02
    fused = adacomcat.optimize(made)
    assert 0 < relative_error(fused(other).last_hidden_state, exact) < 0.02


@torch.no_grad()
def test_every_mlp_of_int8_is_packed_the_last_one_too():
    model = dense_model()
    last = adacomcat.optimize(adacomcat.quantize(model)).blocks[-1]
    assert last.mlp.forms and not last.attn.forms
