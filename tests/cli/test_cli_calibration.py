"""calibrate, compress --calibration and compress --elastic."""

from pathlib import Path

import pytest
import torch
from helpers.command_line import MODEL
from safetensors.torch import load_file

import adacomcat
from adacomcat.cli import main

DIGITS = ["--data", "digits", "--calibration-images", "24"]


def test_a_kept_calibration_gives_the_model_of_a_fresh_run(tmp_path: Path, run_json) -> None:
    done = run_json("calibrate", *MODEL, *DIGITS, "--output", tmp_path / "cal.safetensors")
    assert done["images"] == 24 and done["images_kept"]
    assert done["bytes"] == (tmp_path / "cal.safetensors").stat().st_size
    run_json("compress", *MODEL, *DIGITS, "--keep-params", 0.6, "--output", tmp_path / "fresh")
    second = run_json("compress", *MODEL, "--calibration", tmp_path / "cal.safetensors",
                      "--keep-params", 0.6, "--output", tmp_path / "second")
    assert second["refitted"] and second["calibration_images"] == 24
    fresh, again = (load_file(tmp_path / name / "model.safetensors")
                    for name in ("fresh", "second"))
    assert all(torch.equal(fresh[name], again[name]) for name in fresh)
    cut = run_json("compress", *MODEL, "--calibration", tmp_path / "cal.safetensors",
                   "--no-refit", "--keep-params", 0.5, "--output", tmp_path / "cut")
    assert not cut["refitted"]


def test_without_images_the_output_says_that_blocks_are_cut(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cal = str(tmp_path / "cal.safetensors")
    assert main(["calibrate", *MODEL, *DIGITS, "--no-images", "-o", cal]) == 0
    assert main(["compress", *MODEL, "--calibration", cal, "--keep-params", "0.5", "-o",
                 str(tmp_path / "cut")]) == 0
    assert "blocks fitted in sequence to images lose less" in capsys.readouterr().out


def test_an_elastic_folder(tmp_path: Path, run_json) -> None:
    done = run_json("compress", *MODEL, *DIGITS, "--elastic", "0.8,0.6", "--output",
                    tmp_path / "all")
    assert done["sizes"] == [0.8, 0.6] and done["refitted"]
    assert set(done["bytes"]) == {"model.safetensors", "nested.safetensors",
                                  "refit-0.8.safetensors", "refit-0.6.safetensors"}
    sizes = [adacomcat.cost.model_params(adacomcat.load(tmp_path / "all", keep_params=keep))
             for keep in (1.0, 0.8, 0.7, 0.6)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("argv", "message"), [
    (["calibrate", "-o", "cal"], "calibrate needs images"),
    (["compress", "--calibration", "absent", "--keep-params", "0.5", "-o", "x"],
     "cannot read the calibration absent"),
    (["compress", "--calibration", "cal", "--data", "digits", "--keep-params", "0.5", "-o", "x"],
     "--calibration stands for the images"),
    (["compress", "--elastic", "0.8,0.5", "-o", "x"], "--elastic needs images"),
    (["compress", "--elastic", "0.8", "--keep-params", "0.5", *DIGITS, "-o", "x"],
     "--elastic names sizes: leave out --keep-params"),
    (["compress", "--elastic", "0.8,2", *DIGITS, "-o", "x"], "must be a fraction"),
    (["compress", "--refit", "--keep-params", "0.5", "-o", "x"], "refit fits blocks to images"),
])
def test_wrong_use(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                   capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argv[0], *MODEL, *argv[1:]]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert message in last
    assert not list(tmp_path.iterdir())


def test_a_calibration_overwrites_nothing(tmp_path: Path, capsys) -> None:
    path = tmp_path / "cal"
    path.write_text("mine")
    assert main(["calibrate", *MODEL, *DIGITS, "-o", str(path)]) == 2
    assert "already holds something; name an absent file" in capsys.readouterr().err
    assert path.read_text() == "mine"
