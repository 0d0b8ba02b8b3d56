"""The demo as a user runs it: its table, its folder, and what that folder gives back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import adacomcat
from adacomcat import cost
from adacomcat.data import datasets

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"
ROWS = ("dense", "training-free", "searched + distilled", "reloaded by timm")
COLUMNS = ("top-1 %", "parameters", "MACs per image", "latency, ms", "parameters kept")
KEEP = 0.4


def run_demo(*flags: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, DEMO, *map(str, flags)], env=environment,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what it printed, the folder it wrote)"""
    folder = tmp_path_factory.mktemp("demo") / "small"
    run = run_demo("--epochs", 2, "--keep-params", f"{KEEP:.0%}", "--output", folder)
    assert run.returncode == 0, run.stderr
    return run.stdout, folder


@pytest.fixture(scope="module")
def table(demo: tuple[str, Path]) -> dict[str, dict[str, float]]:
    """Row → column → number."""
    found = {}
    for line in demo[0].splitlines():
        name, *cells = re.split(r"\s{2,}", line.strip())
        if name in ROWS:
            values = [float(cell.replace(",", "")) for cell in cells]
            found[name] = dict(zip(COLUMNS, values, strict=True))
    return found


def top1(model: torch.nn.Module) -> float:
    _, test = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    images, labels = test.batch(torch.arange(len(test)))
    with torch.inference_mode():
        return 100 * (model.eval()(images).argmax(1) == labels).double().mean().item()


def test_table_has_every_model_and_measure(demo, table):
    assert tuple(table) == ROWS
    header = next(line for line in demo[0].splitlines() if COLUMNS[0] in line)
    assert tuple(re.split(r"\s{2,}", header.strip())) == COLUMNS
    for row in table.values():
        assert 0 <= row["top-1 %"] <= 100
        assert row["latency, ms"] > 0
    assert str(demo[1]) in demo[0].splitlines()[-1]


def test_last_line_names_a_page_with_a_curve(demo, table):
    page = demo[1] / "report.html"
    assert demo[0].splitlines()[-1].endswith(str(page))
    assert "Size against quality" in page.read_text()
    points = {row["name"]: row for row in
              json.loads((demo[1] / "pareto.json").read_text())["points"]}
    assert {"dense", "keep 0.5", f"keep {KEEP:g}", "searched + distilled"} <= set(points)
    for row, name in (("dense", "dense"), ("training-free", f"keep {KEEP:g}"),
                      ("searched + distilled", "searched + distilled")):
        assert points[name]["top1"] == pytest.approx(table[row]["top-1 %"], abs=0.01)
        assert points[name]["params"] == table[row]["parameters"]


def test_budget_is_kept_and_used(table):
    dense = table["dense"]
    assert dense["parameters kept"] == 1
    for name in ROWS[1:]:
        assert table[name]["parameters"] <= KEEP * dense["parameters"]
        assert table[name]["parameters kept"] > 0.8 * KEEP
        assert table[name]["MACs per image"] < dense["MACs per image"]


def test_dense_training_learns(table):
    assert table["dense"]["top-1 %"] > 30, "chance is 10"


@pytest.mark.parametrize("load", [adacomcat.load, lambda folder: timm.create_model(
    f"local-dir:{folder}", pretrained=True)], ids=["adacomcat", "timm"])
def test_folder_gives_back_what_was_measured(demo, table, load):
    saved, reloaded = table["searched + distilled"], table["reloaded by timm"]
    exact = ("top-1 %", "parameters", "MACs per image", "parameters kept")
    assert [saved[name] for name in exact] == [reloaded[name] for name in exact]
    model = load(demo[1])
    assert top1(model) == pytest.approx(saved["top-1 %"], abs=0.01)
    assert cost.model_params(model) == saved["parameters"]
    assert cost.model_macs(model) == saved["MACs per image"]


def test_folder_holds_weights_and_plan(demo):
    config = json.loads((demo[1] / "config.json").read_text())
    assert config["model_args"]["plan"]
    assert sorted(path.name for path in demo[1].iterdir()) == [
        "config.json", "model.safetensors", "pareto.json", "report.html", "run.json"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("kept")
    run = run_demo("--output", tmp_path)
    assert run.returncode == 2
    assert "absent or empty" in run.stderr and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
