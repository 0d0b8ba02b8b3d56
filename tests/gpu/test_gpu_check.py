"""bench/gpu/check.py goes through all of its measurements on the CPU."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "bench" / "gpu"))

import check  # noqa: E402
import models  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", {"tiny": ("test_vit", 8, 16)})
    monkeypatch.setattr(check, "SIZES", {"tiny": (128, 16, 2)})


def test_a_dry_run_measures_everything(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(check.HERE.iterdir())
    assert check.main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(",".join(models.COLUMNS))
    told = [line for line in lines[:at] if " us (" in line]
    for what in ("mlp tiny b1", "attention tiny b1", "linear tiny b1", "svd 3 x 8 x 8",
                 "test_vit torch.bfloat16 b1", "test_vit torch.float32 b1"):
        assert any(f"what {what}" in line for line in told), what
    rows = list(csv.DictReader(lines[at:]))
    ways = {"ours", *(f"{model}, {runtime}" for model in ("same ranks", "dense")
                      for runtime in ("PyTorch", "inductor"))}
    assert {row["way"] for row in rows} >= ways
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        assert float(row["infer_samples_per_sec"]) == pytest.approx(
            1e3 / float(row["infer_step_time"]), rel=0.01)
        assert float(row["cold_time"]) >= 0 < float(row["param_count"])
    params = {row["way"]: float(row["param_count"]) for row in rows}
    assert params["ours"] == params["same ranks, PyTorch"] < params["dense, inductor"]
    assert sorted(check.HERE.iterdir()) == before


def test_a_runtime_that_refuses_is_named() -> None:
    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such engine\nand more")

    row = models.timed({"ours": torch.relu, "dense, TensorRT": refuses}, torch.zeros(1))
    assert set(row["seconds"]) == {"ours"}
    assert row["absent"] == {"dense, TensorRT": "RuntimeError: no such engine"}


def test_errors_against_float64() -> None:
    layer = torch.nn.Linear(3, 5)
    x = torch.randn(8, 3)
    exact = torch.nn.Linear(3, 5).double()
    exact.load_state_dict(layer.state_dict())
    found = models.errors({"ours": lambda x: 1.1 * layer(x), "dense, PyTorch": layer}, exact, x)
    assert found["errors"] == {"ours": pytest.approx(0.1, rel=1e-4)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([]) == 0 and "--dry-run" in capsys.readouterr().out
