"""One folder of every size: named ones as if compressed alone, others cut, and the dense model."""

from pathlib import Path

import pytest
import timm
import torch
from helpers.models import dense_model

import adacomcat
from adacomcat import Calibration, UserError, calibrate, compress
from adacomcat.cost import model_params

IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IMAGES[:4])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2,
                       num_classes=7)


@pytest.fixture(scope="module")
def kept(model: torch.nn.Module) -> Calibration:
    return calibrate(model, IMAGES)


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, kept: Calibration, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "all"
    adacomcat.save_elastic(model, path, kept, [0.8, 0.5])
    return path


def test_a_named_size_is_the_model_compressed_for_it_alone(
        folder: Path, model: torch.nn.Module) -> None:
    for keep in (0.8, 0.5):
        loaded = adacomcat.load(folder, keep_params=keep)
        alone = compress(model, keep_params=keep, calibration=IMAGES)
        assert loaded.rank_plan == alone.rank_plan and not loaded.training
        assert torch.equal(outputs(loaded), outputs(alone))


def test_sizes_between_are_cut_from_nested_factors(folder: Path, model: torch.nn.Module,
                                                   kept: Calibration) -> None:
    previous = float("inf")
    for keep in (0.7, 0.6, 0.45):
        loaded = adacomcat.load(folder, keep_params=keep)
        assert keep - 0.1 < model_params(loaded) / model_params(model) <= keep
        assert model_params(loaded) < previous
        previous = model_params(loaded)
        cut = compress(model, keep_params=keep, calibration=kept, refit=False)
        assert torch.equal(outputs(loaded), outputs(cut))
    work = adacomcat.load(folder, keep_macs=0.5)
    assert adacomcat.cost.model_macs(work) <= 0.5 * adacomcat.cost.model_macs(model)


def test_the_folder_is_a_dense_checkpoint_too(folder: Path, model: torch.nn.Module) -> None:
    assert torch.equal(outputs(adacomcat.load(folder)), outputs(model))
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(outputs(by_timm), outputs(model))


def test_a_model_cut_from_it_is_saved_as_any_other(folder: Path, tmp_path: Path) -> None:
    cut = adacomcat.load(folder, keep_params=0.6)
    adacomcat.save(cut, tmp_path / "cut")
    assert torch.equal(outputs(adacomcat.load(tmp_path / "cut")), outputs(cut))


def test_images_are_not_in_the_folder(folder: Path) -> None:
    assert Calibration.load(folder / "nested.safetensors").batches is None


@pytest.mark.parametrize("file", ["nested.safetensors", "refit-0.5.safetensors"])
def test_damage_is_found(file: str, model: torch.nn.Module, kept: Calibration,
                         tmp_path: Path) -> None:
    adacomcat.save_elastic(model, tmp_path / "all", kept, [0.5])
    path = tmp_path / "all" / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{file} is not the file that was saved"):
        adacomcat.load(tmp_path / "all", keep_params=0.5)
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match="is damaged|cannot read the calibration"):
        adacomcat.load(tmp_path / "all", verify=False,
                       keep_params=0.5 if file.startswith("refit") else 0.6)


def test_a_folder_of_one_size_takes_no_budget(model: torch.nn.Module, tmp_path: Path) -> None:
    adacomcat.save(model, tmp_path / "dense")
    with pytest.raises(UserError, match="holds one model of one size"):
        adacomcat.load(tmp_path / "dense", keep_params=0.5)


@pytest.mark.parametrize("keep", [0, 1.5, "half"])
def test_sizes_are_fractions(keep: object, model: torch.nn.Module, kept: Calibration,
                             tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sizes of an elastic folder must be a fraction"):
        adacomcat.save_elastic(model, tmp_path / "all", kept, [keep])
    assert not (tmp_path / "all").exists()
