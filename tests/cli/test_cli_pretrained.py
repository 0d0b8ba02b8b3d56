"""-m hf:DIR: every command takes a folder that transformers wrote."""

import json
from typing import Any

import pytest
import torch
from helpers.pictures import write_pictures
from safetensors.torch import load_file, save_file
from torch import Tensor

import adacomcat
from adacomcat import data

transformers = pytest.importorskip("transformers", minversion="5.24")


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3,
                                    intermediate_size=96, image_size=32, patch_size=8,
                                    num_labels=5)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.25, 0.25]}))
    return tmp_path / "dense"


def logits(folder: Any, images: Tensor) -> Tensor:
    model: Any = adacomcat.load(folder)
    with torch.no_grad():
        return model(images).logits


def test_compress_and_inspect(folder: Any, tmp_path: Any, run_json: Any) -> None:
    write_pictures(tmp_path / "pictures", 20, 0)
    done = run_json("compress", "-m", f"hf:{folder}", "--keep-params", 0.8, "--calibration-dir",
                    tmp_path / "pictures", "--output", tmp_path / "small")
    rows = done["models"]
    assert rows["compressed"]["params"] <= 0.8 * rows["dense"]["params"]
    assert rows["compressed"]["macs"] < rows["dense"]["macs"]
    assert done["calibration_images"] == 20
    small = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(small(images).logits, logits(tmp_path / "small", images))
    seen = run_json("inspect", "-m", f"hf:{tmp_path / 'small'}")
    assert seen["params"] == rows["compressed"]["params"] and seen["low_rank_modules"] > 0
    dense = run_json("inspect", "-m", f"hf:{folder}")
    assert {row["kind"] for row in dense["sites"]} == {"qk", "vo", "linear"}


def test_pictures_are_normalised_as_the_folder_says(folder: Any) -> None:
    found = data.model_data_config(adacomcat.load(folder))
    assert (found["mean"], found["std"]) == ((0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
    assert (found["input_size"], found["num_classes"]) == ((3, 32, 32), 5)


def test_wrong_folders_are_one_line(folder: Any, tmp_path: Any, run: Any) -> None:
    for argv, says in (
            (["-m", f"hf:{tmp_path / 'nothing'}"], "there is no checkpoint folder"),
            (["-m", f"hf:{folder}", "--num-classes", "3"], "leave out --num-classes")):
        code, _, err = run("inspect", *argv)
        assert code == 2 and says in err and "Traceback" not in err
    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != "classifier.bias"},
              folder / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("inspect", "-m", f"hf:{folder}")
    assert code == 2 and "lacks 1 weights of its model, like classifier.bias" in err
    (folder / "model.safetensors").write_bytes(b"nothing")
    code, _, err = run("inspect", "-m", f"hf:{folder}")
    assert code == 2 and "transformers cannot load" in err and "Traceback" not in err
