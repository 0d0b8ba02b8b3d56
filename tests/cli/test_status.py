"""adacomcat status, the summary, the live view and the metrics of a training run."""

import json
import os
import pty
import re
import subprocess
import sys
import time

import pytest
from helpers.command_line import GRAY, MODEL, QUICK

from adacomcat.report.live import pace
from adacomcat.report.summary import print_summary
from adacomcat.utils.files import exclusive

EVENTS = [
    {"event": "start", "epochs": 6, "steps": 20},
    {"event": "search", "epoch": 2, "changed": 3, "params": 90106},
    {"event": "epoch", "epoch": 1, "loss": 0.75, "top1": 51.25, "train_seconds": 3,
     "search_seconds": 1},
    {"event": "step", "epoch": 2, "step": 7, "at": 27, "loss": 0.5, "images_per_second": 1234.4,
     "data_wait": 0.03, "eta_seconds": 80.2}]


@pytest.fixture
def running(tmp_path):
    """The output of a run that has a state, and no checkpoint yet."""
    (tmp_path / "out.state").mkdir()
    lines = [json.dumps(event | {"time": time.time() - 65}) for event in EVENTS]
    (tmp_path / "out.state" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "out"


def test_status_of_a_run_that_goes_on(running, run, run_json):
    assert run_json("status", running)["state"] == "stopped"
    with exclusive(running.with_name("out.state") / "lock", "out"):
        found = run_json("status", running)
        assert found["state"] == "running" and 64 < found["age_seconds"] < 600
        assert found["step"]["at"] == 27 and found["search"]["changed"] == 3
        code, out, _ = run("status", f"{running}.state")
    assert code == 0
    for words in ("running", "2 of 6", "7 of 20", "1,234 img/s", "wait 3%", "ETA 0:01:20", "51.25",
                  "90,106 parameters"):
        assert words in out, words


def test_status_of_no_run(tmp_path, run):
    code, _, err = run("status", tmp_path / "nothing")
    assert code == 2 and "there is no run" in err


def test_train_tells_and_status_sums_up(tmp_path, run):
    argv = ["train", *GRAY, *QUICK, "--keep-params", 0.5, "--epochs", 2, "--metrics",
            tmp_path / "logs" / "m.jsonl", "-o", tmp_path / "out"]
    code, out, err = run(*argv)
    assert code == 0, err
    assert re.search(r"epoch 1: search at τ 5, F 1: \d+ ranks changed", err)
    kinds = [json.loads(line)["event"] for line in (tmp_path / "logs" / "m.jsonl").open()]
    assert {"start", "step", "search", "epoch", "end"} == set(kinds)
    assert not (tmp_path / "out.state").exists()
    assert "ranks, from the first block to the last" in out and "report.html" in out
    assert "\x1b" not in out + err
    code, out, _ = run("status", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "run.json").read_text())
    assert code == 0 and len(out.splitlines()) <= 30
    assert "Parameters" in out and f"{content['kept']['params']:.1%} kept" in out
    levels = re.search(r"hidden +([▁▂▃▄▅▆▇█]+)", out)[1]
    shares = [site["share"] for site in content["sites"] if site["site"].endswith(".hidden")]
    assert len(levels) == len(shares) == 2
    assert ["▁▂▃▄▅▆▇█".index(level) for level in levels] == [
        min(7, int(8 * share)) for share in shares]


def test_a_run_that_ends_early_leaves_no_state(tmp_path, run):
    code, _, err = run("train", *GRAY, *QUICK, "--keep-params", 0.001, "--epochs", 1, "-o",
                       tmp_path / "out")
    assert code == 2 and "keep" in err
    assert not (tmp_path / "out.state").exists()


def test_summary_of_recorded_results_fits_thirty_lines(tmp_path, run, capsys):
    run("compress", *MODEL, "--keep-params", 0.6, "-o", tmp_path / "s")
    run("profile", "-m", tmp_path / "s", "--batches", 1, 2, "--repeats", 1, "--record",
        tmp_path / "s")
    print_summary(tmp_path / "s")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30 and max(map(len, lines[:-1])) <= 80


def test_pace_in_words():
    assert pace(EVENTS[-1]) == "loss 0.500  1,234 img/s  wait 3%  ETA 0:01:20"
    assert pace({"loss": 1.25}) == "loss 1.250"


@pytest.mark.parametrize("color", [True, False])
def test_live_view_on_a_terminal(color, tmp_path):
    """A pseudo terminal of 80 columns: the bar, lines of epochs and searches, NO_COLOR."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color",
                                "OMP_NUM_THREADS": "1"} | ({} if color else {"NO_COLOR": "1"})
    argv = ["train", *GRAY, *QUICK, "--keep-params", "0.5", "--epochs", "2", "--no-report", "-o",
            str(tmp_path / "out")]
    child = subprocess.Popen([sys.executable, "-m", "adacomcat", *argv], stderr=theirs,
                             stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not part:
            break
        shown += part
    assert child.wait() == 0
    text = shown.decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "img/s" in plain and "ETA 0:00:" in plain and "epoch 2/2" in plain
    assert re.search(r"epoch 1: search at τ 5", plain) and "epoch 2 of 2: loss" in plain
    assert bool(re.search(r"\x1b\[(\d+;)*3\dm|\x1b\[(\d+;)*38;", text)) == color
