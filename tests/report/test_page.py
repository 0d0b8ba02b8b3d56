"""The page of a run: every number is one of its files, and nothing is fetched from elsewhere."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.models import dense_model
from helpers.pictures import write_pictures
from helpers.report_pages import Page, at, number

import adacomcat
from adacomcat import UserError, cli, cost
from adacomcat.report.files import record, recorded
from adacomcat.report.page import write_page

MOST_BYTES = 1_500_000
PROSE = re.compile(r"[Tt]op-1|95%")  # words with a digit that are no result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with every file that a page shows."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    dense = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=2, num_heads=2,
                        num_classes=10)
    adacomcat.save(dense, root / "dense")
    write_pictures(root / "photos", 9, seed=3)
    folder = root / "small <&> café"

    def call(*words: object) -> None:
        assert cli.main([str(word) for word in words]) == 0, words
    call("compress", "-m", root / "dense", "--keep-params", "0.6", "--calibration-dir",
         root / "photos", "--exclude", "blocks.0.attn", "-o", folder)
    call("evaluate", "-m", folder, "--data", "digits", "--test-images", 60, "--teacher",
         root / "dense", "--record", folder)
    call("profile", "-m", folder, "--batches", 1, 2, "--repeats", 1, "--record", folder)
    call("inspect", "-m", root / "dense", "--sensitivity", "--images", root / "photos", "--ranks",
         2, "--record", folder)
    content = recorded(folder)["run"]
    content |= {"history": [{"epoch": 1, "loss": 2.5, "top1": 31.25, "lr": 1e-3},
                            {"epoch": 2, "loss": 1.25, "top1": 62.5, "lr": 1e-4}],
                "searches": [{"epoch": 2, "temperature": 0.7, "seconds": 1.5, "loss": 2.25,
                              "rejected": False, "changed": 3, "params": 12345, "entropy": 0.91,
                              "frequency": 2}]}
    record(folder, "run", content)
    record(folder, "pareto", PARETO)
    call("report", folder, "--images", root / "photos", "--teacher", root / "dense", "--count", 2)
    return folder


def point(name: str, kind: str, params: int, top1: float) -> dict[str, object]:
    return {"name": name, "kind": kind, "dtype": "float32", "params": params, "macs": 3 * params,
            "bytes": 4 * params, "kept": params / 200, "latency_ms": params / 50, "top1": top1}


PARETO = {"model": "vit_tiny_patch16_224", "quality": "top1", "quality_label": "top-1 %",
          "images": 60, "knee": "keep 0.5", "command": "adacomcat pareto",
          "points": [point("dense", "dense", 200, 90.5), point("keep 0.5", "compressed", 100, 90),
                     point("keep 0.25", "compressed", 50, 70.25),
                     point("vit_small", "landmark", 300, 91.75)]}


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page(finished / "report.html")


def test_every_number_is_that_of_a_file(page, finished):
    checked = 0
    for element in page.elements:
        place = element.attributes.get("data-at")
        if place is None:
            continue
        expected = at(place, [finished])
        if "data-form" not in element.attributes:
            assert element.text == str(expected), place
            continue
        stated = element.attributes.get("value", element.attributes.get("data-value"))
        assert json.loads(stated) == expected, place
        if isinstance(expected, str):
            assert element.text == expected
            continue
        value, half = number(element.text)
        scale = 0.01 if element.attributes["data-form"] == "share" else 1
        digits = 6e-3 * abs(expected) if element.attributes["data-form"] in (
            "si", "bytes", "general", "small") else 0
        if element.attributes["data-form"] == "small":
            digits *= 10
        assert abs(value * scale - expected) <= half * scale + digits, (place, element.text)
        checked += 1
    assert checked > 120


def test_marks_of_charts_stand_for_numbers_of_files(page, finished):
    marks = [element.attributes for element in page.elements if "data-x" in element.attributes]
    for mark in marks:
        for axis in ("x", "y"):
            assert float(mark[f"data-{axis}-value"]) == at(mark[f"data-{axis}"], [finished])
    charts = {mark["data-x"].partition("#")[0] for mark in marks}
    assert charts == {"0:run.json", "0:pareto.json"}


def test_marks_lie_where_their_numbers_say(page):
    """Places grow with the numbers, to the right and upwards."""
    charts: dict[int, list[dict[str, str]]] = {}
    for element in page.elements:
        if "data-x" in element.attributes:
            svg = next(e for e in element.above if e.name == "svg")
            charts.setdefault(id(svg), []).append(element.attributes)
    assert len(charts) > 6
    for marks in charts.values():
        for axis, sign in (("x", 1), ("y", -1)):
            order = sorted(marks, key=lambda mark: float(mark[f"data-{axis}-value"]))
            places = [sign * float(mark[f"c{axis}"]) for mark in order]
            assert places == sorted(places)


def test_no_other_digit_stands_on_the_page(page):
    for element in page.elements:
        known = (element.name in ("style", "title", "footer") or element.inside(aria_hidden="true")
                 or "data-at" in element.attributes or element.inside(**{"class": "tick"}))
        cell = "tick" in element.attributes.get("class", "")
        if not known and not cell:
            assert not re.search(r"\d", PROSE.sub("", element.text)), (element.name, element.text)


def test_every_kind_of_result_is_shown(page):
    headings = {e.text for e in page.elements if e.name == "h2"}
    assert headings == {"Size against quality", "Where the ranks went", "What truncation costs",
                        "Which site hurts", "Search history", "Training", "Latency",
                        "What the models look at", "Accuracy of each class",
                        "What was not compressed", "How to make it again"}
    cards = [e.text for e in page.elements if e.name == "dt"]
    assert cards == ["Parameters", "MACs per image", "Weights", "Latency", "Top-1"]
    text = page.source
    assert "left out by a filter" in text and "no projection" in text


def test_ranks_and_counts_are_those_of_the_models(finished):
    content = recorded(finished)["run"]
    small, dense = adacomcat.load(finished), adacomcat.load(finished.parent / "dense")
    models = content["models"]
    assert models["compressed"]["params"] == cost.model_params(small)
    assert models["dense"]["macs"] == cost.model_macs(dense)
    assert models["compressed"]["bytes"] == (finished / "model.safetensors").stat().st_size
    low = {site["site"]: site["rank"] for site in content["sites"] if site["rank"] != "dense"}
    assert low == small.rank_plan.ranks and "blocks.0.attn.qk" not in low
    left = {row["what"]: row for row in content["left"]}
    assert left["blocks.0.attn.qk"]["why"] == "left out by a filter"
    gone = sum(site["dense_params"] - site["params"] for site in content["sites"])
    folded = models["dense"]["params"] - gone - models["compressed"]["params"]
    assert abs(folded) < 0.02 * models["dense"]["params"]
    curve = content["curves"]["blocks.1.mlp.hidden"]
    assert low["blocks.1.mlp.hidden"] in [entry["rank"] for entry in curve]
    errors = [entry["error"] for entry in curve]
    assert errors[0] == 1 and errors == sorted(errors, reverse=True)


def test_the_page_is_one_file_that_asks_for_nothing(page, finished):
    assert not page.problems
    assert len(page.source.encode()) < MOST_BYTES
    assert "<script" not in page.source and "@import" not in page.source
    for element in page.elements:
        for key in ("src", "href", "xlink:href"):
            link = element.attributes.get(key, "data:")
            assert link.startswith(("data:", "#")), link
    assert not re.search(r"url\((?!#)", page.source)
    assert "small &lt;&amp;&gt; café" in page.source


def test_everything_drawn_has_words(page):
    for element in page.elements:
        if element.name == "img":
            assert element.attributes["alt"]
        if element.name == "svg":
            assert element.attributes["role"] == "img" and len(element.attributes["aria-label"]) > 9
    levels = [int(e.name[1]) for e in page.elements if re.fullmatch(r"h\d", e.name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_slower_cells_say_so(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    latency = recorded(folder)["latency"]
    latency["cells"][0]["speedup"] = 0.8
    latency["cells"][1]["speedup"] = 1.2
    record(folder, "latency", latency)
    page = Page(write_page([folder]))
    slow = [e for e in page.elements if e.attributes.get("class") == "slow"]
    assert [e.text.strip() for e in slow] == ["slower"] and "0.80×" in page.source


def test_several_runs_stand_side_by_side(finished, tmp_path, run_json):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    content = recorded(other)["run"]
    content["models"]["compressed"]["params"] = 4321
    record(other, "run", content)
    made = run_json("report", finished, other)
    assert made["page"] == str(finished / "comparison.html")
    page = Page(Path(made["page"]))
    (finished / "comparison.html").unlink()
    folders = [finished, other]
    shown = [e for e in page.elements if e.attributes.get("data-at", "").endswith(
        "models/compressed/params")]
    assert {at(e.attributes["data-at"], folders) for e in shown} == {
        4321, recorded(finished)["run"]["models"]["compressed"]["params"]}
    names = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert {"run-0", "run-1"} <= set(names)


def test_recording_renews_the_page(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "again"))
    before = (folder / "report.html").read_text()
    assert cli.main(["profile", "-m", str(folder), "--repeats", "1", "--record",
                     str(folder)]) == 0
    assert (folder / "report.html").read_text() != before


def test_folders_without_results_or_with_damaged_ones_are_named(tmp_path, run_json, capsys):
    with pytest.raises(UserError, match="holds no results"):
        write_page([tmp_path])
    (tmp_path / "run.json").write_text('{"format": 1')
    with pytest.raises(UserError, match="is damaged"):
        recorded(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="of this version"):
        recorded(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        record(tmp_path / "run.json" / "x", "run", {})
    assert cli.main(["report", str(tmp_path), "--images", "x"]) == 2
    assert "give one folder and --teacher" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_console_error_and_no_overflow(finished, width, tmp_path):
    """Chromium lays the page out; a script of the test's own says how wide it became."""
    probe = ("<script>document.title = 'wide ' + document.documentElement.scrollWidth + ' of ' "
             "+ innerWidth</script></body>")
    path = tmp_path / "probe.html"
    path.write_text((finished / "report.html").read_text().replace("</body>", probe))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom",
         path.as_uri()], capture_output=True, text=True, timeout=120)
    wide, inner = map(int, re.search(r"wide (\d+) of (\d+)", done.stdout).groups())
    assert wide <= inner
    assert "CONSOLE" not in done.stderr
