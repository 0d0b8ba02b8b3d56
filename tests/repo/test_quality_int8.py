"""bench/quality/int8.py and bits.py on tiny data: what they write is what the models do."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adacomcat.data import datasets
from adacomcat.distill.config import TrainConfig

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench" / "quality"))

import bits  # noqa: E402
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


def test_another_int8_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--nncf: the runtime gets the model and the images that calibrate, and is judged as ours."""
    seen = []

    class Peer(torch.nn.Module):
        def __init__(self, model: torch.nn.Module, images: torch.Tensor, tokens: bool) -> None:
            super().__init__()
            seen.append((images.shape, tokens))
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    monkeypatch.setattr(int8, "fashion_mnist", digits)
    monkeypatch.setattr(int8, "Nncf", Peer)
    monkeypatch.setattr(sys, "argv", ["int8.py", "--data", "fashion-mnist", "--keeps", "0.6",
                                      "--nncf", "--variants", "feedback", "--output",
                                      str(tmp_path)])
    int8.main()
    [found] = records.Records(tmp_path / "int8.json").found.values()
    for size in ("dense", "keep 0.6"):
        assert found[f"{size}, NNCF"] == found[f"{size}, float"]
    assert len(found) == 6
    assert seen == [((32, 1, 16, 16), False)] * 2


def test_nncf_computes_the_model_on_int8() -> None:
    """So small a model loses up to a third; another model's outputs would be off by more than 1."""
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    subject = digits(None, 0)
    images = subject.calibration
    for tokens in (False, True):
        made = int8.Nncf(subject.model, images, tokens)
        with torch.inference_mode():
            exact = subject.model.forward_features(images) if tokens else subject.model(images)
        error = (made.forward_features(images) - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.6


def test_memory_is_what_the_process_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["int8.py", "--data", "memory", "--model",
                                      "vit_tiny_patch16_224", "--crops", "1", "--output",
                                      str(tmp_path)])
    int8.main()
    row = (tmp_path / "int8-memory.md").read_text().splitlines()[-1]
    model, made, before, most = map(float, row.split("|")[2:6])
    assert made < 0.35 * model and most >= before > model


def test_ranks_and_bits_at_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "fashion_mnist", digits)
    methods = ["dense, int8", "dense, int4", "ranks alone, float32", "ranks and bits, 16 8 4"]
    monkeypatch.setattr(sys, "argv", ["bits.py", "--data", "fashion-mnist", "--sizes", "0.5", "0.2",
                                      "--methods", *methods, "--output", str(tmp_path)])
    bits.main()
    found = records.Records(tmp_path / "bits.json").found
    assert found["fashion-mnist, dense, int8, 1, seed 0"]["bytes"] < 0.5
    assert "below what is reachable" in found[
        "fashion-mnist, ranks alone, float32, 0.2, seed 0"].get("refused", "") or (
        found["fashion-mnist, ranks alone, float32, 0.2, seed 0"]["bytes"] <= 0.2)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in
            (tmp_path / "bits-fashion-mnist.md").read_text().splitlines() if line.startswith("| ")}
    assert set(rows) >= set(methods)
    for method in methods:
        sizes = rows[method][0::2]
        assert all(size == "–" or float(size) <= limit
                   for size, limit in zip(sizes, (0.5, 0.2), strict=True))
    assert rows["dense, int8"][2] == "–"  # it does not fit
