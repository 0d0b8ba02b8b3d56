"""quantize, compress --quantize, and what other commands say of a model on int8."""

import json

import pytest
import torch
from helpers.command_line import MODEL

import adacomcat
from adacomcat.convert.quantized import quantized_layers

DIGITS = ["--data", "digits", "--calibration-images", "24"]


@pytest.fixture
def small(tmp_path, run_json):
    run_json("compress", *MODEL, *DIGITS, "--keep-params", 0.6, "-o", tmp_path / "small")
    return tmp_path / "small"


def test_at_once_and_in_two_steps_are_the_same(small, tmp_path, run_json, run):
    once = run_json("compress", *MODEL, *DIGITS, "--keep-params", 0.6, "--quantize", "int8", "-o",
                    tmp_path / "once")
    twice = run_json("quantize", small, *DIGITS, "-o", tmp_path / "twice")
    assert twice["calibration_images"] == 24
    found, other = (adacomcat.load(tmp_path / name) for name in ("once", "twice"))
    assert twice["layers"] == len(quantized_layers(other)) > 8
    states = found.state_dict(), other.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    rows = once["models"]
    assert rows["compressed"]["params"] == twice["models"]["int8"]["params"] == (
        adacomcat.cost.model_params(found)) == twice["models"]["before"]["params"]
    assert rows["compressed"]["bytes"] == adacomcat.cost.model_bytes(found)
    assert twice["models"]["int8"]["bytes"] < 0.8 * twice["models"]["before"]["bytes"]
    content = json.loads((tmp_path / "once" / "run.json").read_text())
    assert content["int8_layers"] == twice["layers"]
    assert "multiply int8 numbers" in (tmp_path / "once" / "report.html").read_text()
    code, out, _ = run("inspect", "-m", tmp_path / "twice")
    assert code == 0 and f"{twice['layers']} layers are on int8" in out


def test_it_is_measured_like_every_model(small, tmp_path, run_json, run):
    code, out, _ = run("quantize", "-m", small, "-o", tmp_path / "int8")
    assert code == 0 and "--calibration-dir corrects the errors" in out
    before, after = (run_json("evaluate", "-m", folder, "--data", "digits", "--test-images", 64)
                     for folder in (small, tmp_path / "int8"))
    assert after["bytes"] < before["bytes"] and after["params"] == before["params"]
    assert abs(after["loss"] - before["loss"]) < 0.1
    rows = run_json("profile", "-m", tmp_path / "int8", "--repeats", 1)["models"]
    assert rows["compressed"]["bytes"] == after["bytes"] < rows["dense"]["bytes"]
    assert rows["compressed"]["params"] < rows["dense"]["params"]


@pytest.mark.parametrize(("argv", "message"), [
    (["quantize", *MODEL], "quantize needs --output"),
    (["quantize", "absent/", "-o", "x"], "there is no checkpoint folder absent"),
    (["compress", *MODEL, "--keep-params", "0.6", "--quantize", "int8", "--gauge", "-o", "x"],
     "--gauge is for factors in float"),
    (["compress", *MODEL, "--keep-params", "0.6", "--quantize", "int2", "-o", "x"],
     "invalid choice: 'int2'"),
    (["compress", *MODEL, *DIGITS, "--elastic", "0.8", "--quantize", "int8", "-o", "x"],
     "--elastic names sizes: leave out --quantize"),
    (["compress", *MODEL, "--keep-bytes", "0.6", "--gauge", "-o", "x"],
     "--gauge is for factors in float"),
    (["compress", *MODEL, "--keep-bytes", "0.6", "--bits", "8,3", "-o", "x"],
     "bits must be some of 32, 16, 8, 4"),
    (["compress", *MODEL, "--keep-bytes", "0.6", "--quantize", "int8", "-o", "x"],
     "keep_bytes chooses the bits"),
    (["compress", *MODEL, "--max-latency-ms", "60", "--quantize", "int4", "-o", "x"],
     "max_latency_ms plans in float or in int8"),
    (["compress", *MODEL, "--keep-bytes", "0.6", "--keep-params", "0.5", "-o", "x"],
     "--keep-params and --keep-bytes exclude each other"),
])
def test_wrong_use_is_one_line(argv, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv)
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert code == 2 and message in lines[-1] and len(lines) == 1 and not out


def test_a_quantised_folder_is_not_quantised_or_trained_again(small, tmp_path, run):
    run("quantize", small, "-o", tmp_path / "int8")
    for argv in (["quantize", tmp_path / "int8", "-o", tmp_path / "x"],
                 ["compress", "-m", tmp_path / "int8", "--keep-params", 0.5, "-o", tmp_path / "x"],
                 ["train", "-m", tmp_path / "int8", "--data", "digits", "--dense", "-o",
                  tmp_path / "x"]):
        code, _, err = run(*argv)
        assert code == 2 and "quantising comes last" in err


def test_a_budget_in_bytes(tmp_path, run_json, run):
    found = run_json("compress", *MODEL, *DIGITS, "--keep-bytes", "45%", "--bits", "16,8,4", "-o",
                     tmp_path / "small")
    rows = found["models"]
    made = adacomcat.load(tmp_path / "small")
    names = {bits: quantized_layers(made, bits) for bits in (8, 4)}
    assert sum(map(len, names.values())) > 4
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert rows["compressed"]["bytes"] < size <= 0.45 * rows["dense"]["bytes"]
    code, out, _ = run("inspect", "-m", tmp_path / "small")
    for bits, layers in names.items():
        assert code == 0 and (f"{len(layers)} layers are on int{bits}" in out) == bool(layers)
    run_json("quantize", *MODEL, "--dtype", "int4", "-o", tmp_path / "int4")
    assert len(quantized_layers(adacomcat.load(tmp_path / "int4"), 4)) == 8


def test_a_latency_that_int8_reaches(tmp_path, run_json):
    found = run_json("compress", *MODEL, "--max-latency-ms", 1000, "--quantize", "int8", "-o",
                     tmp_path / "quick")
    assert found["models"]["compressed"]["latency_ms"] < 1000
    assert len(quantized_layers(adacomcat.load(tmp_path / "quick"), 8)) == 8
