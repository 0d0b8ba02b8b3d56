"""A budget in bytes: ranks and bits together, and no file above it."""

import pytest
import torch
from helpers.models import FAMILIES, dense_model, images
from helpers.tolerance import relative_error

import adacomcat
from adacomcat import RankPlan, UserError, cost, find_sites
from adacomcat.allocation.bits import BytesAllocator, rounding_changes
from adacomcat.allocation.budget import Budget
from adacomcat.allocation.sensitivity import relative_change, relative_sensitivities
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.quantized import quantized_layers
from adacomcat.layers.quantized import Int4Linear, Int8Linear
from adacomcat.quantization.model import quantize_
from adacomcat.quantization.rounding import round_linear
from adacomcat.utils.model import copied, tokens_and_outputs


def compressed(model, keep, bits=None, calibration=None, **settings):
    return adacomcat.compress(model, keep_bytes=keep, bits=bits, calibration=calibration,
                              multiple=2, **settings)


@pytest.mark.parametrize(("keep", "bits", "seen"), [
    (0.5, None, True), (0.5, (32,), False), (0.26, (16, 8), True), (0.22, (16, 8, 4), True),
    (0.22, (16, 8, 4), False), (0.4, (8,), False)])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_file_is_never_larger(architecture, keep, bits, seen, tmp_path):
    model = dense_model(architecture)
    made = compressed(model, keep, bits, images(model, 8) if seen else None)
    whole = cost.model_bytes(model)
    adacomcat.save(made, tmp_path / "made")
    size = (tmp_path / "made" / "model.safetensors").stat().st_size
    assert cost.model_bytes(made) < size <= keep * whole
    assert size > 0.8 * keep * whole  # and the budget is spent
    dtype = torch.bfloat16 if bits and 16 in bits else torch.float32
    assert {p.dtype for p in made.parameters()} == {dtype}
    loaded = adacomcat.load(tmp_path / "made").to(dtype)
    x = images(model).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), made(x), rtol=0, atol=0)
        assert relative_error(adacomcat.optimize(made)(x).float(), made(x).float()) < 0.1


def low_rank_model():
    """Its weights are nearly of low rank, as trained ones are."""
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=3, num_heads=2,
                        num_classes=7)
    for block in model.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            u, s, v = torch.linalg.svd(linear.weight.data, full_matrices=False)
            linear.weight.data = (u * s[0] * torch.arange(1, len(s) + 1) ** -0.8) @ v
    return model


@pytest.mark.parametrize(("keep", "bits"), [(0.35, (32, 8)), (0.2, (16, 8, 4))])
def test_both_lose_less_than_ranks_alone(keep, bits):
    model = low_rank_model()
    torch.manual_seed(0)
    seen, other = images(model, 48), images(model, 48)

    def error(chosen):
        made = compressed(model, keep, chosen, seen).float()
        with torch.inference_mode():
            return relative_error(made(other), model(other))

    assert error(bits) < 0.9 * error(bits[:1])


def test_a_plan_has_the_bits_and_gives_the_model_again(tmp_path):
    model = dense_model()
    x = images(model, 8)
    made = compressed(model, 0.4, (32, 8, 4), x)
    plan = made.rank_plan
    assert plan.bits and set(plan.bits) <= {f"blocks.{i}.{part}" for i in range(2)
                                            for part in ("attn", "mlp")}
    for name, bits in plan.bits.items():
        inside = [layer for layer in quantized_layers(made, bits) if layer.startswith(name)]
        assert len(inside) == len(quantized_layers(made.get_submodule(name))) > 1
    plan.save(tmp_path / "plan.json")
    again = adacomcat.compress(model, plan=RankPlan.load(tmp_path / "plan.json"), calibration=x)
    assert again.rank_plan == plan
    states = made.state_dict(), again.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_bits_of_a_plan_are_checked(tmp_path):
    for bits in ({"blocks.0.attn": 3}, ["blocks.0.attn"], {"blocks.0.attn": [8]}):
        with pytest.raises(UserError, match="the bits of a plan map names of modules to 8 or 4"):
            RankPlan({}, bits)
    (tmp_path / "plan.json").write_text('{"ranks": {}, "bits": {"blocks.0.attn": "8"}}')
    with pytest.raises(UserError, match="the bits of a plan"):
        RankPlan.load(tmp_path / "plan.json")


def test_what_filters_leave_out_stays_float():
    model = dense_model()
    made = compressed(model, 0.85, (32, 8), images(model, 8), exclude=["blocks.0", "*.1.mlp.fc1"])
    assert quantized_layers(made) and all(name.startswith("blocks.1.attn")
                                          for name in quantized_layers(made))


def test_every_plan_of_a_refinement_stays_within_the_budget():
    model = dense_model()
    made = compressed(model, 0.45, (32, 8), images(model, 32), refine=3)
    assert made.refinement.tried == 3
    assert cost.model_bytes(made) <= 0.45 * cost.model_bytes(model)
    assert made.refinement.plan.bits


def test_bytes_that_a_plan_is_said_to_take_are_those_that_it_takes():
    model = dense_model()
    sites = find_sites(model)
    factors = factorize_model(model, sites=sites)
    allocator = BytesAllocator(model, factors, sites, None, keep=1.0, bits=(32, 8, 4), multiple=2)
    weights = relative_sensitivities(sites, factors)
    names = len(model.state_dict())
    for item in allocator.items(weights, 2):
        for index in range(0, len(item.ranks), 7):
            plan = RankPlan({site.name: rank for site, rank
                             in zip(item.sites, item.ranks[index], strict=True)})
            number = item.bits[index]
            plan.bits = {} if number is None else {item.place: number}
            made = adacomcat.compress(model, plan=plan)
            dense = sum(site.dense_params for site in item.sites)
            entries = item.choices[index].cost - (
                cost.model_bytes(made) - cost.model_bytes(model) + 4 * dense)
            assert 0 <= entries <= 5000 and names  # the header of the file, and no weight


def test_what_rounding_loses_by_weights_alone():
    model = dense_model()
    places = {"blocks.1.mlp": (), "head": ()}
    found = rounding_changes(model, places, (8, 4), None)
    assert set(found) == {"blocks.1.mlp"}  # the head does not work on tokens
    for bits in (8, 4):
        expected = 0.0
        for linear in (model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2):
            rounded, _ = round_linear(linear.weight, None, None, bits)
            expected += ((rounded.dense - linear.weight).norm() / linear.weight.norm()).item() ** 2
        assert found["blocks.1.mlp"][bits] == pytest.approx(expected, rel=1e-4)
    assert found["blocks.1.mlp"][4] > 50 * found["blocks.1.mlp"][8]


@torch.no_grad()
def test_what_rounding_loses_on_images():
    model = dense_model()
    batches = calibration_batches(images(model, 20), model)
    found = rounding_changes(model, {"blocks.0.attn": ()}, (8, 4), batches)["blocks.0.attn"]
    before = tokens_and_outputs(model, batches[0][:4])
    for bits in (8, 4):
        other = copied(model)
        other.blocks[0].norm1.weight.fill_(1)  # so that there is nothing to fold
        other.blocks[0].norm1.bias.fill_(0)
        plain = tokens_and_outputs(other, batches[0][:4])
        quantize_(other, batches, {"blocks.0.attn": bits})
        kind = {8: Int8Linear, 4: Int4Linear}[bits]
        assert isinstance(other.blocks[0].attn.qkv, kind)
        rough = relative_change(plain, tokens_and_outputs(other, batches[0][:4]))
        assert 0.2 * rough < found[bits] < 5 * rough
    assert found[4] > 5 * found[8]
    assert all(torch.equal(one, two) for one, two in
               zip(before, tokens_and_outputs(model, batches[0][:4]), strict=True))


@pytest.mark.parametrize("bits", [(), (3,), (32, 16), (32, 16, 8), (8, 2)])
def test_bits_that_numbers_cannot_have(bits):
    with pytest.raises(UserError, match="bits must be some of 32, 16, 8, 4, and floats have 32 or"):
        Budget("bytes", 0.5, bits=bits)


@pytest.mark.parametrize(("settings", "message"), [
    ({"keep_bytes": 0.5, "quantize": "int8"}, "keep_bytes chooses the bits of numbers"),
    ({"keep_params": 0.5, "bits": (32, 8)}, "bits are what keep_bytes chooses from"),
    ({"plan": RankPlan(), "bits": (32, 8)}, "bits are what keep_bytes chooses from"),
    ({"keep_bytes": 0.5, "keep_params": 0.5}, "say exactly one of"),
    ({"keep_bytes": 1.5}, "keep must be a fraction"),
    ({"keep_bytes": 0.01}, "keep 0.01 is below what is reachable here; the least is"),
    ({"max_latency_ms": 9.0, "quantize": "int4"}, "4-bit weights run as float"),
    ({"keep_params": 0.5, "quantize": "int2"}, "quantize knows the dtype int8, int4"),
])
def test_wrong_use_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        adacomcat.compress(dense_model(), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_compress_and_quantize_at_once(dtype):
    model = dense_model()
    x = images(model, 8)
    for seen in (None, x, adacomcat.calibrate(model, x)):
        once = adacomcat.compress(model, keep_params=0.6, calibration=seen, quantize=dtype)
        twice = adacomcat.quantize(adacomcat.compress(model, keep_params=0.6, calibration=seen),
                                   seen, dtype)
        states = once.state_dict(), twice.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
