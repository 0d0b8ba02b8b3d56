"""bench/quality/int8.py on tiny data: what it writes is what the models do."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adacomcat.data import datasets
from adacomcat.distill.config import TrainConfig

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench" / "quality"))

import int8  # noqa: E402
import records  # noqa: E402
import subjects  # noqa: E402
import timm  # noqa: E402


def digits(args: Any, seed: int) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=48, depth=2, num_heads=2, num_classes=10).eval()
    train_set, test_set = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    return subjects.classifier(model, train_set, test_set.subset(torch.arange(50)),
                               TrainConfig(calibration_images=32, seed=seed))


def test_accuracy_of_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "fashion_mnist", digits)
    monkeypatch.setattr(sys, "argv", ["int8.py", "--data", "fashion-mnist", "--keeps", "0.6",
                                      "--seeds", "0", "1", "--output", str(tmp_path)])
    int8.main()
    found = records.Records(tmp_path / "int8.json").found
    assert list(found) == ["fashion-mnist, keeps 0.6, seed 0", "fashion-mnist, keeps 0.6, seed 1"]
    names = [f"{size}, {name}" for size in ("dense", "keep 0.6")
             for name in ("float", *int8.VARIANTS)]
    assert all(list(runs) == names for runs in found.values())
    lines = (tmp_path / "int8-fashion-mnist.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| dense")] == [
        f"| {name}" for name in names[:5]]


def test_a_variant_is_what_quantize_makes() -> None:
    subject = digits(None, 0)
    images = subject.calibration
    for feedback, seen in ((True, images), (False, None)):
        made = int8.quantized(subject.model, images, feedback, rotate=True).state_dict()
        expected = int8.adacomcat.quantize(subject.model, seen).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in made.items())
