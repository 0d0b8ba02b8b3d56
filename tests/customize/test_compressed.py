"""A compressed diffusion model is saved, opened, and takes adapters like a dense one."""

import pytest
import torch
from helpers import diffusion
from helpers.diffusion import randomise_

from adacomcat import UserError, compress, compress_
from adacomcat.customize import (
    add_adapters,
    load_adapters,
    merge_,
    open_pipeline,
    save_adapters,
    save_pipeline,
    unload_,
)
from adacomcat.customize.adapters import adapters_of, processors
from adacomcat.customize.files import base_checksum
from adacomcat.layers.linear import LowRankLinear

BLOCKS = "*transformer_blocks*"


def output(model, given):
    with torch.no_grad():
        return model(**given)[0]


def error(model, reference, given):
    expected = output(reference, given)
    return float((output(model, given) - expected).norm() / expected.norm())


def numbers(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def compressed():
    """A U-Net whose attentions and feed-forward layers are low-rank, and inputs."""
    model = compress(diffusion.unet(), keep_params=0.8, include=BLOCKS, multiple=1)
    assert any(isinstance(part, LowRankLinear) for part in model.modules())
    return model, diffusion.unet_inputs()


def test_inputs_by_name_calibrate():
    """Weights alone give a smaller model; calibrated, it keeps closer to the dense one."""
    model, given = diffusion.unet(), diffusion.unet_inputs()
    seen = {"sample": torch.randn(16, 4, 8, 8), "timestep": torch.arange(0, 960, 60),
            "encoder_hidden_states": torch.randn(16, 5, 24)}
    found = {name: compress(model, keep_params=0.8, include=BLOCKS, multiple=1, calibration=images)
             for name, images in {"weights": None, "inputs": seen}.items()}
    assert all(numbers(one) <= 0.8 * numbers(model) for one in found.values())
    assert error(found["inputs"], model, given) < error(found["weights"], model, given)


def test_adapters_stand_beside_low_rank_projections(compressed, tmp_path):
    model, given = compressed
    base = output(model, given)
    assert len(add_adapters(model, 2)) == 14
    assert torch.equal(output(model, given), base)
    randomise_(model)
    adapted = output(model, given)
    assert not torch.allclose(adapted, base, atol=1e-3)
    path = save_adapters(model, tmp_path / "a.safetensors")
    unload_(model)
    assert torch.equal(output(model, given), base)
    load_adapters(model, path)
    assert torch.equal(output(model, given), adapted)
    merge_(model)
    assert not processors(model)
    torch.testing.assert_close(output(model, given), adapted, rtol=1e-4, atol=1e-4)


def test_their_output_is_that_beside_the_products(compressed):
    """The oracle: a dense U-Net whose weights are the products of the factors."""
    model, given = compressed
    dense = diffusion.unet()
    with torch.no_grad():
        for name, part in model.named_modules():
            if isinstance(part, LowRankLinear):
                dense.get_submodule(name).weight.copy_(part.u @ part.v.T)
    for one in (model, dense):
        add_adapters(one, 2)
    randomise_(model)
    with torch.no_grad():
        for name, adapter in adapters_of(dense).items():
            adapter.load_state_dict(adapters_of(model)[name].state_dict())
    torch.testing.assert_close(output(model, given), output(dense, given), rtol=1e-4, atol=1e-4)
    assert base_checksum(model) != base_checksum(dense)


def test_a_compressed_pipeline_comes_back(tmp_path):
    pipe = diffusion.pipeline()
    compress_(pipe.unet, keep_params=0.8, include=BLOCKS, multiple=1)
    save_pipeline(pipe, tmp_path / "small")
    dense = diffusion.saved_pipeline(tmp_path / "dense")
    sizes = {at: (at / "unet/diffusion_pytorch_model.safetensors").stat().st_size
             for at in (tmp_path / "small", dense)}
    assert sizes[tmp_path / "small"] < 0.85 * sizes[dense]
    found, given = open_pipeline(str(tmp_path / "small"), pipe.device), diffusion.unet_inputs()
    assert torch.equal(output(found.unet, given), output(pipe.unet, given))
    assert base_checksum(found) == base_checksum(pipe)


def test_a_dense_pipeline_comes_back(tmp_path):
    pipe, given = diffusion.pipeline(), diffusion.unet_inputs()
    save_pipeline(pipe, tmp_path / "dense")
    found = open_pipeline(str(tmp_path / "dense"), pipe.device)
    assert torch.equal(output(found.unet, given), output(pipe.unet, given))


def test_saving_is_refused_in_words(tmp_path):
    pipe = diffusion.pipeline()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="already holds something"):
        save_pipeline(pipe, tmp_path)
    add_adapters(pipe)
    with pytest.raises(UserError, match="unload_ takes them away"):
        save_pipeline(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("small", [False, True])
def test_a_merged_pipeline_is_not_saved(small, tmp_path):
    """diffusers builds it by its config, whose heads are as wide as they were."""
    pipe = diffusion.pipeline()
    if small:
        compress_(pipe.unet, keep_params=0.8, include=BLOCKS, multiple=1)
    add_adapters(pipe)
    merge_(pipe)
    with pytest.raises(UserError, match="is not what its config describes"):
        save_pipeline(pipe, tmp_path / "new")
    assert not (tmp_path / "new").exists()
