"""The knee, the rows of a curve, and the command that draws it."""

import json

import numpy as np
import pytest
import torch
from helpers.command_line import GRAY
from helpers.models import dense_model
from helpers.pictures import write_pictures

import adacomcat
from adacomcat import cost
from adacomcat.cli.commands import pareto
from adacomcat.cli.main import parse
from adacomcat.evaluation.pareto import knee
from adacomcat.report.tables import plot


def test_knee_is_furthest_from_the_chord_by_geometry():
    draw = np.random.default_rng(0)
    for _ in range(50):
        x = np.sort(draw.uniform(0, 5e6, 8))
        y = 60 + 30 * (1 - np.exp(-draw.uniform(2, 9) * x / x[-1]))
        ends = np.stack([(x - x[0]) / np.ptp(x), (y - y[0]) / (y[-1] - y[0])], 1)
        chord = ends[-1] - ends[0]
        distance = np.abs(chord[0] * (ends[:, 1] - ends[0, 1])
                          - chord[1] * (ends[:, 0] - ends[0, 0]))
        order = draw.permutation(8)
        assert order[knee(x[order], y[order])] == distance.argmax()


def test_knee_of_lines_and_of_curves_that_bend_down():
    assert knee([1, 2, 3], [1, 1, 1]) == 0
    assert knee([1, 2, 3, 4], [0, 0.1, 0.3, 9]) == 3
    assert knee([3], [1]) == 0


@pytest.mark.parametrize(("text", "expected"), [
    ("0.9:0.3:7", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)), ("50%,0.25", (0.5, 0.25)),
    ("0.5", (0.5,))])
def test_spelling_of_sizes(text, expected):
    assert parse(["pareto", "-m", "x", "-o", "y", "--keeps", text]).keeps == expected
    assert len(parse(["pareto", "-m", "x", "-o", "y"]).keeps) == 7


@pytest.mark.parametrize("text", ["", "0.9:0.3", "0.9:0.3:1", "2", "0.9:0:3", "a,b"])
def test_wrong_sizes_are_one_line(text, run):
    code, out, err = run("pareto", "-m", "x", "-o", "y", "--keeps", text)
    assert (code, out, err.count("\n")) == (2, "", 1) and "FIRST:LAST:COUNT" in err


def test_plot_puts_points_where_they_belong():
    lines = plot([(1.0, 10.0, "a"), (3.0, 20.0, "b"), (2.0, 15.0, "c")], "x", "y", 21, 5)
    grid = [line.partition("|")[2] for line in lines.splitlines()[1:6]]
    assert grid[0].index("b") == 20 and grid[2].index("c") == 10 and grid[4].index("a") == 0


def test_curve_of_a_classifier_with_a_landmark(tmp_path, run, run_json):
    torch.manual_seed(0)
    run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 1, "-o", tmp_path / "d",
             "--no-report")
    run_json("compress", "-m", tmp_path / "d", "--keep-params", 0.7, "-o", tmp_path / "other",
             "--no-report")
    argv = ["pareto", "-m", tmp_path / "d", "--data", "digits", "--calibration-images", 32,
            "--keeps", "0.8,0.5", "--landmarks", tmp_path / "other", "--dtypes", "float32",
            "bfloat16", "--test-images", 100, "--save-models", "-o", tmp_path / "out"]
    code, out, err = run(*argv)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "pareto.json").read_text())
    rows = {row["name"]: row for row in found["points"]}
    assert set(rows) == {f"{name}{dtype}" for name in ("dense", "keep 0.8", "keep 0.5", "other")
                         for dtype in ("", " bfloat16")}
    small = adacomcat.load(tmp_path / "out" / "keep-0.5")
    row = rows["keep 0.5"]
    assert (row["params"], row["macs"]) == (cost.model_params(small), cost.model_macs(small))
    assert rows["keep 0.5 bfloat16"]["bytes"] < 0.6 * row["bytes"]
    dense = run_json("evaluate", "-m", tmp_path / "d", "--data", "digits", "--test-images", 100)
    assert rows["dense"]["top1"] == pytest.approx(dense["top1"])
    judged = run_json("evaluate", "-m", tmp_path / "out" / "keep-0.5", "--data", "digits",
                      "--test-images", 100)
    assert row["top1"] == pytest.approx(judged["top1"])
    assert all(row["latency_ms"] > 0 for row in rows.values())
    assert found["knee"] in rows and found["knee"] in out and f"{row['params']:,}" in out
    assert "Size against quality" in (tmp_path / "out" / "report.html").read_text()


def test_curve_without_labels_is_judged_by_the_other_half(tmp_path, run_json):
    model = dense_model("vit_small_patch14_dinov2")
    adacomcat.save(model, tmp_path / "d")
    write_pictures(tmp_path / "photos", 10, seed=4)
    found = run_json("pareto", "-m", tmp_path / "d", "--calibration-dir", tmp_path / "photos",
                     "--calibration-images", 10, "--keeps", "0.6", "-o", tmp_path / "out")
    dense, small = found["points"]
    assert (dense["cosine"], dense["token_error"]) == (pytest.approx(1), 0)
    assert small["cosine"] < 1 and found["images"] == 5 and found["quality"] == "cosine"


def test_all_sizes_are_cut_from_one_calibration(tmp_path, run_json, monkeypatch):
    """As compress makes each of them, with the blocks fitted and without."""
    model = dense_model()
    adacomcat.save(model, tmp_path / "d")
    write_pictures(tmp_path / "photos", 24, seed=6)
    photos = ["--calibration-dir", tmp_path / "photos", "--calibration-images", 24]
    count, made = [], pareto.calibrate
    monkeypatch.setattr(pareto, "calibrate", lambda *a, **k: count.append(1) or made(*a, **k))
    run_json("calibrate", "-m", tmp_path / "d", *photos, "-o", tmp_path / "cal.safetensors")
    kept = ["--calibration", tmp_path / "cal.safetensors"]
    for flags in ([], ["--no-refit"]):
        out = tmp_path / "-".join(["curve", *flags])
        run_json("pareto", "-m", tmp_path / "d", *photos, *kept, *flags, "--keeps", "0.7,0.5",
                 "--save-models", "-o", out)
        for keep in (0.7, 0.5):
            run_json("compress", "-m", tmp_path / "d", *kept, *flags, "--keep-params", keep,
                     "-o", out / f"alone-{keep}", "--no-report")
            alone = adacomcat.load(out / f"alone-{keep}").state_dict()
            for name, tensor in adacomcat.load(out / f"keep-{keep}").state_dict().items():
                assert torch.equal(tensor, alone[name]), name
    assert not count
    run_json("pareto", "-m", tmp_path / "d", *photos, "--keeps", "0.7,0.6,0.5", "-o",
             tmp_path / "three")
    assert len(count) == 1


def test_curve_needs_images_and_labels_for_landmarks(tmp_path, run):
    adacomcat.save(dense_model(), tmp_path / "d")
    write_pictures(tmp_path / "few", 3, seed=5)
    base = ["pareto", "-m", tmp_path / "d", "-o", tmp_path / "out"]
    for more, says in (([], "pass --data, or --calibration-dir"),
                       (["--calibration-dir", tmp_path / "few"], "at least 4 pictures"),
                       (["--calibration-dir", tmp_path / "few", "--landmarks", "x"],
                        "judged by labels"),
                       (["--calibration-dir", tmp_path / "few", "--keeps", "0.5", "--search", 1],
                        "at least 4 pictures"),
                       (["--data", "digits", "--search", 1, "--no-refit"], "leave out")):
        code, _, err = run(*base, *more)
        assert code == 2 and says in err, err
    assert not (tmp_path / "out").exists()
