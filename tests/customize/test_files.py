"""Adapters on disk, ComCAT's lists, and LoRA in both directions."""

import json

import pytest
import torch
from helpers import diffusion
from helpers.diffusion import randomise_
from safetensors import safe_open

from adacomcat import UserError
from adacomcat.customize import (
    adapter_parameters,
    add_adapters,
    from_lora,
    load_adapters,
    load_comcat,
    parameter_count,
    save_adapters,
    set_alpha,
    to_lora,
    unload_,
)
from adacomcat.customize.adapters import adapters_of

EXACT = {"rtol": 0, "atol": 1e-9}


def output(model, given):
    with torch.no_grad():
        return model(**given)[0]


@pytest.fixture
def adapted():
    """A U-Net with a random adapter of rank 2, and inputs."""
    model = diffusion.unet()
    add_adapters(model, 2)
    randomise_(model)
    return model, diffusion.unet_inputs()


def test_reloaded_adapters_compute_the_same_bits(adapted, tmp_path):
    model, given = adapted
    expected = output(model, given)
    path = save_adapters(model, tmp_path / "new" / "a.safetensors", token="sks", alpha=1.0)
    fresh = diffusion.unet()
    found = load_adapters(fresh, path, rank=2)
    assert (found.token, found.alpha) == ("sks", 1.0)
    assert torch.equal(output(fresh, given), expected)


def test_the_files_alpha_is_used(adapted, tmp_path):
    model, given = adapted
    path = save_adapters(model, tmp_path / "a.safetensors", alpha=0.75)
    set_alpha(model, 0.75)
    fresh = diffusion.unet()
    assert load_adapters(fresh, path).token is None
    assert torch.equal(output(fresh, given), output(model, given))


def test_half_precision_is_half_as_large(adapted, tmp_path):
    model, given = adapted
    whole = save_adapters(model, tmp_path / "whole.safetensors")
    half = save_adapters(model, tmp_path / "half.safetensors", half=True)
    saved = whole.stat().st_size - half.stat().st_size
    assert saved == pytest.approx(2 * parameter_count(model), rel=0.02)
    fresh = diffusion.unet()
    load_adapters(fresh, half)
    torch.testing.assert_close(output(fresh, given), output(model, given), rtol=0.02, atol=0.02)


def test_names_begin_with_the_attention(adapted, tmp_path):
    model, _ = adapted
    path = save_adapters(model, tmp_path / "a.safetensors")
    with safe_open(path, "pt") as file:
        names, header = list(file.keys()), json.loads(file.metadata()["adacomcat"])
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.tokens.q" in names
    assert header["ranks"] == [2]
    assert header["base"] == "UNet2DConditionModel"


def test_a_base_in_another_precision_is_the_same(adapted, tmp_path):
    model, _ = adapted
    path = save_adapters(model, tmp_path / "a.safetensors")
    load_adapters(diffusion.unet().half(), path)


def test_another_base_is_refused(adapted, tmp_path):
    model, _ = adapted
    path = save_adapters(model, tmp_path / "a.safetensors")
    other = diffusion.unet()
    with torch.no_grad():
        other.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight[0, 0] += 1
    with pytest.raises(UserError, match="other weights"):
        load_adapters(other, path)
    assert load_adapters(other, path, verify=False).base == "UNet2DConditionModel"


@pytest.mark.parametrize("change", ["rank", "missing", "shape", "place", "bytes", "format"])
def test_files_that_do_not_fit_are_refused(change, adapted, tmp_path):
    model, _ = adapted
    path = save_adapters(model, tmp_path / "a.safetensors")
    fresh = diffusion.unet(cross_attention_dim=20) if change == "shape" else diffusion.unet()
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:100])
    if change == "missing":
        path = tmp_path / "missing.safetensors"
    if change == "place":
        fresh = diffusion.unet(mid_block_type=None)
    if change == "format":
        content = path.read_bytes()
        path.write_bytes(content.replace(b"adacomcat-adapters-1", b"adacomcat-adapters-2"))
    messages = {"rank": "has the rank 2, not 3", "missing": "there is no adapters file",
                "shape": "of another shape", "place": "no attention of this model",
                "bytes": "cannot read the adapters", "format": "no adapters of this program"}
    before = sum(1 for _ in fresh.parameters())
    with pytest.raises(UserError, match=messages[change]):
        load_adapters(fresh, path, rank=3 if change == "rank" else None, verify=False)
    assert sum(1 for _ in fresh.parameters()) == before


def test_comcats_list_is_read(adapted, tmp_path):
    """Its order is down, up, middle; of each attention q, k, v and o."""
    model, given = adapted
    adapters = adapters_of(model)
    order = [a for part in ("down", "up", "mid") for n, a in adapters.items() if n.startswith(part)]
    torch.save([p for a in order for p in (a.q, a.k, a.v, a.o)], tmp_path / "comcat.pt")
    fresh = diffusion.unet()
    load_comcat(fresh, tmp_path / "comcat.pt", rank=2)
    assert torch.equal(output(fresh, given), output(model, given))
    with pytest.raises(UserError, match="has the rank 2, not 1"):
        load_comcat(diffusion.unet(), tmp_path / "comcat.pt", rank=1)
    torch.save([torch.zeros(2, 2)], tmp_path / "short.pt")
    with pytest.raises(UserError, match="no list of 56 matrices"):
        load_comcat(diffusion.unet(), tmp_path / "short.pt", rank=2)
    with pytest.raises(UserError, match="cannot read"):
        load_comcat(diffusion.unet(), tmp_path / "absent.pt", rank=2)


def lora(model, projections=("to_q", "to_k", "to_v", "to_out.0"), rank=3) -> dict:
    found = {}
    for name, module in model.named_modules():
        if name.endswith(projections) and "attn" in name:
            found[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, module.in_features)
            found[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, rank)
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("projections", [("to_q", "to_k", "to_v", "to_out.0"), ("to_v",),
                                         ("to_k", "to_v"), ("to_q", "to_out.0")])
def test_lora_becomes_an_adapter_exactly(projections):
    """The LoRA's own formula, W + B A, is the oracle."""
    model, given = diffusion.unet().double(), diffusion.unet_inputs(torch.float64)
    tensors = lora(model, projections)
    from_lora(model, tensors)
    changed = diffusion.unet().double()
    with torch.no_grad():
        for key in tensors:
            if key.endswith("lora_A.weight"):
                up = tensors[key.replace("lora_A", "lora_B")]
                layer = changed.get_submodule(key[5:].removesuffix(".lora_A.weight"))
                layer.weight += up @ tensors[key]
    torch.testing.assert_close(output(model, given), output(changed, given), **EXACT)


def test_lora_of_peft_and_its_scale(tmp_path):
    """diffusers itself runs the LoRA, with an alpha of half its rank."""
    pytest.importorskip("peft")
    from safetensors.torch import save_file
    model, given = diffusion.unet(), diffusion.unet_inputs()
    tensors = {k: t.float() for k, t in lora(model).items()}
    tensors |= {k.replace("lora_A.weight", "alpha"): torch.tensor(1.5) for k in list(tensors)
                if "lora_A" in k}
    save_file(tensors, tmp_path / "lora.safetensors")
    from_lora(model, tmp_path / "lora.safetensors")
    theirs = diffusion.unet()
    alphas = {k: t.item() for k, t in tensors.items() if "alpha" in k}
    theirs.load_lora_adapter({k: t for k, t in tensors.items() if "alpha" not in k}, prefix="unet",
                             network_alphas=alphas)
    torch.testing.assert_close(output(model, given), output(theirs, given), rtol=1e-3, atol=1e-4)


def test_lora_of_q_and_v_comes_back():
    """Their changes lie where a LoRA can have them, so both ways are exact."""
    model, given = diffusion.unet().double(), diffusion.unet_inputs(torch.float64)
    from_lora(model, lora(model, ("to_q", "to_v")))
    set_alpha(model, 0.8)
    expected = output(model, given)
    tensors, error = to_lora(model)
    assert error < 1e-6
    unload_(model)
    from_lora(model, tensors)
    torch.testing.assert_close(output(model, given), expected, rtol=0, atol=1e-5)


def test_adapters_that_no_lora_can_be_say_so(adapted):
    model, _ = adapted
    tensors, error = to_lora(model)
    assert error > 0.1
    assert len(tensors) == 4 * 14


@pytest.mark.parametrize(("tensors", "message"), [
    ({"unet.conv_in.lora_A.weight": torch.zeros(1, 4)}, "no projection of an attention"),
    ({"unet.conv_in.weight": torch.zeros(1, 4)}, "no part of a LoRA"),
    ({}, "changes nothing"),
])
def test_other_loras_are_refused(tensors, message):
    with pytest.raises(UserError, match=message):
        from_lora(diffusion.unet(), tensors)


def test_loras_that_adapters_cannot_be_are_refused(tmp_path):
    joint, _ = diffusion.sd3()
    with pytest.raises(UserError, match="joint attention"):
        from_lora(joint, lora(joint, ("to_v",)))
    biased, _ = diffusion.dit()
    with pytest.raises(UserError, match="has biases"):
        from_lora(biased, lora(biased, ("to_k",)))
    with pytest.raises(UserError, match="cannot read the LoRA"):
        from_lora(biased, tmp_path / "absent.safetensors")


def test_training_parameters_are_single_precision_beside_half():
    model = diffusion.unet().half()
    add_adapters(model, 2)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
