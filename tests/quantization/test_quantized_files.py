"""Int8 models on disk: folders that this package and timm load, and files that do not fit."""

import json

import pytest
import timm
import torch
from helpers.models import compressed, dense_model, images
from safetensors.torch import load_file, save_file

import adacomcat
from adacomcat import UserError
from adacomcat.convert.quantized import quantized_layers

MODELS = {"dense": dense_model, "low-rank": compressed}


@pytest.fixture(params=MODELS, scope="module")
def saved(request, tmp_path_factory):
    model = adacomcat.quantize(MODELS[request.param]())
    folder = tmp_path_factory.mktemp("int8") / "model"
    adacomcat.save(model, folder)
    return model, folder


def edited(folder, tmp_path, change):
    """A copy of ``folder`` whose config and weights ``change`` changed in place."""
    weights, config = load_file(folder / "model.safetensors"), json.loads(
        (folder / "config.json").read_text())
    del config["checksums"]
    change(weights, config)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_gives_the_model_back(saved):
    model, folder = saved
    found = adacomcat.load(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(model)
    for other in (found, theirs):
        assert quantized_layers(other) == quantized_layers(model)
        assert not any(p.requires_grad for p in other.parameters())
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_the_file_is_as_large_as_its_numbers(saved):
    model, folder = saved
    weights = load_file(folder / "model.safetensors")
    int8 = {name for name, tensor in weights.items() if tensor.dtype == torch.int8}
    assert {name.removesuffix(".weight") for name in int8} == set(quantized_layers(model))
    assert all(f"{name}_scale" in weights for name in int8)
    size = (folder / "model.safetensors").stat().st_size
    assert abs(size - adacomcat.cost.model_bytes(model)) < 0.2 * size  # names are in it too


def test_timm_gives_another_number_of_classes_and_another_image_size(saved):
    model, folder = saved
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, img_size=48)
    assert other.eval()(torch.randn(2, 3, 48, 48)).shape == (2, 3)
    assert torch.equal(other.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)


def test_a_saved_model_has_no_gauge(saved, tmp_path):
    with pytest.raises(UserError, match="gauge takes the model that adacomcat.quantize was given"):
        adacomcat.save(saved[0], tmp_path / "other", gauge=True)


FIRST = "blocks.0.attn.proj"


@pytest.mark.parametrize(("change", "message"), [
    (lambda w, c: w.pop(f"{FIRST}.weight_scale"), rf"missing: {FIRST}\.weight_scale"),
    (lambda w, c: w.update({f"{FIRST}.weight": w[f"{FIRST}.weight"].float()}),
     rf"of another kind: {FIRST}\.weight real instead of int8"),
    (lambda w, c: w.update({f"{FIRST}.weight": w[f"{FIRST}.weight"].long()}),
     rf"of another kind: {FIRST}\.weight whole instead of int8"),
    (lambda w, c: w.update({f"{FIRST}.weight_scale": w[f"{FIRST}.weight_scale"][:3].clone()}),
     "of another shape"),
    (lambda w, c: c["model_args"]["int8"].remove(FIRST),
     rf"unexpected: {FIRST}\.weight_scale; of another kind: {FIRST}\.weight int8 instead of real"),
    (lambda w, c: c["model_args"].update(int8=["blocks.0.norm1"]),
     "'blocks.0.norm1', which is no linear layer"),
    (lambda w, c: c["model_args"].update(int8="qkv"), "int8 must be a list of names of layers"),
], ids=["no scale", "float weight", "long weight", "short scale", "float layer", "norm", "word"])
def test_a_folder_that_does_not_fit_is_one_line(change, message, saved, tmp_path):
    folder = edited(saved[1], tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        adacomcat.load(folder)
    assert "\n" not in str(error.value)
