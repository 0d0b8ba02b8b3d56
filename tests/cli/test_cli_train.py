"""The command line of `train`: flags, resumed runs, several processes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from helpers.command_line import GRAY, QUICK, shell

import adacomcat
from adacomcat import cli
from adacomcat.utils.files import exclusive


def test_train_dense_then_search_and_evaluate(tmp_path, run_json):
    dense = run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 2, "--lr", "2e-3",
                     "--model-ema", "--model-ema-decay", "0.9", "--output", tmp_path / "dense")
    assert dense["params"] == dense["dense_params"] and len(dense["history"]) == 2
    found = run_json("train", "-m", tmp_path / "dense", *QUICK, "--keep-params", "50%",
                     "--epochs", 2, "--finetune-epochs", 1, "--output", tmp_path / "small")
    assert 0.4 < found["keep"] <= 0.5 and found["dense_top1"] == dense["top1"]
    assert [row["epoch"] for row in found["history"]] == [1, 2, 3]
    model = adacomcat.load(tmp_path / "small")
    assert sum(p.numel() for p in model.parameters()) == found["params"]
    measured = run_json("evaluate", "-m", tmp_path / "small", "--data", "digits")
    assert measured["top1"] == pytest.approx(found["top1"])
    assert measured["loss"] == pytest.approx(found["loss"], rel=1e-3)
    written = json.loads((tmp_path / "small" / "run.json").read_text())
    assert written["history"] == found["history"] and written["searches"] == found["searches"]
    assert written["models"]["compressed"]["top1"] == found["top1"]
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Search history" in page and "Training" in page
    assert not list(tmp_path.glob("*.state"))
    tuned = run_json("train", "-m", tmp_path / "small", "--dense", "--teacher", tmp_path / "dense",
                     "--data", "digits", "--epochs", 1, "--output", tmp_path / "tuned")
    assert tuned["params"] == found["params"]
    assert adacomcat.load(tmp_path / "tuned").rank_plan == model.rank_plan


@pytest.mark.parametrize("compressed", [False, True])
def test_adapters_leave_the_model_and_become_a_small_file(compressed, tmp_path, run_json):
    from adacomcat.customize import load_adapters

    base = ["compress", *GRAY, "--keep-params", "0.7"] if compressed else \
        ["train", *GRAY, "--data", "digits", "--epochs", 1, "--dense"]
    run_json(*base, "--output", tmp_path / "base")
    found = run_json("train", "-m", tmp_path / "base", "--data", "digits", "--adapters", 2,
                     "--epochs", 2, "--lr", "5e-3", "--keep-best", "--output", tmp_path / "out")
    assert found["params"] == found["dense_params"] + found["adapters"]
    assert found["top1"] > found["dense_top1"]
    measured = run_json("evaluate", "-m", tmp_path / "out", "--data", "digits")
    assert measured["top1"] == pytest.approx(found["top1"])
    given, merged = adacomcat.load(tmp_path / "base"), adacomcat.load(tmp_path / "out")
    for name in ("blocks.0.norm1.weight", "patch_embed.proj.weight"):
        assert torch.equal(given.get_parameter(name), merged.get_parameter(name))
    load_adapters(given, tmp_path / "out/adapters.safetensors", rank=2)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(given(x), merged(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out/best/adapters.safetensors").exists()


def test_adapters_resume_and_take_other_classes(tmp_path, run, run_json):
    """Stopped after an epoch and resumed, the adapters are those of a run in one go."""
    run_json("compress", *GRAY, "--keep-params", "0.7", "--output", tmp_path / "base")
    flags = ["train", "-m", tmp_path / "base", "--data", "digits", "--adapters", 2, "--epochs", 2,
             "--num-classes", 10, "--no-report"]
    run_json(*flags, "--output", tmp_path / "whole")
    stopped = tmp_path / "part.state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adacomcat.distill.trainer.asked_to_stop",
                      lambda: signal.SIGTERM if (stopped / "training_state.pt").exists() else None)
        code, _, err = run(*flags, "--checkpoint-steps", 5, "--output", tmp_path / "part")
    assert code != 0 and stopped.exists(), err
    run_json(*flags, "--resume", "--output", tmp_path / "part")
    files = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "part")]
    assert files[0] == files[1]


def test_no_epochs_and_a_plan_are_legal(tmp_path, run_json):
    adacomcat.RankPlan({"blocks.0.mlp.fc1": 8}).save(tmp_path / "plan.json")
    run_json("train", *GRAY, *QUICK, "--epochs", 0, "--plan", tmp_path / "plan.json",
             "--output", tmp_path / "small")
    model = adacomcat.load(tmp_path / "small")
    assert model.blocks[0].mlp.fc1.rank == 8
    assert isinstance(model.blocks[1].mlp.fc1, torch.nn.Linear)


def test_flags_reach_the_training_unless_not_given(tmp_path, run_json, monkeypatch):
    from adacomcat import train
    from adacomcat.distill.config import TrainConfig

    seen = []

    class Stop(Exception):
        pass

    def remember(model, config, *rest, **kwargs):
        seen.append(config)
        raise Stop
    monkeypatch.setattr(train, "run", remember)
    base = ["train", *GRAY, "--data", "digits", "--keep-params", 0.5, "--output", tmp_path / "x"]
    for flags in ([], ["--preset", "comcat"], ["--preset", "comcat", "--kd", "soft"],
                  ["--lr", 0.1, "--mixup", 0.8, "--model-ema", "--amp", "-b", 64, "--no-augment",
                   "--steps", 3]):
        assert cli.main([str(word) for word in base + flags]) == 1
    state = {"state_dir": f"{tmp_path}/x.state", "keep_params": 0.5}
    assert seen == [TrainConfig(**state), TrainConfig.preset("comcat", **state),
                    TrainConfig.preset("comcat", kd="soft", **state),
                    TrainConfig(lr=0.1, mixup=0.8, ema_decay=0.9998, amp=True, batch_size=64,
                                augment=False, steps=3, **state)]


def test_defaults_in_the_help_are_those_of_the_training(run):
    from adacomcat.cli.commands.train import FLAGS
    from adacomcat.distill.config import TrainConfig
    _, out, _ = run("train", "--help")
    told = {}
    for text in re.split(r"\s--(?=[a-z])", " ".join(out.split())):
        default = re.search(r"default: ([\w.-]+)\)?", text)
        told[text.split()[0].replace("-", "_")] = default and default[1]
    defaults, compared = TrainConfig(), 0
    for flag, name in set(FLAGS.items()) - {("checkpoint_steps", "checkpoint_steps")}:
        value = getattr(defaults, name)
        if told.get(flag) is not None and type(value) in (int, float, str):
            assert told[flag] == str(value), flag
            compared += 1
    assert compared > 35


def test_interrupted_training_goes_on(tmp_path, run, run_json, monkeypatch):
    from adacomcat.distill import trainer
    flags = ["train", *GRAY, *QUICK, "--keep-params", 0.5, "--epochs", 3, "--lr", "2e-3"]
    whole = run_json(*flags, "--output", tmp_path / "whole")
    step = trainer.Trainer._train_step

    def interrupted(self, *batch):
        if (self.epoch, self.step) == (2, 4):
            raise KeyboardInterrupt
        return step(self, *batch)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", interrupted)
        assert run(*flags, "--output", tmp_path / "cut")[0] == 130
    assert not (tmp_path / "cut").exists()
    code, _, err = run(*flags, "--output", tmp_path / "cut")
    assert code == 2 and "pass --resume" in err
    resumed = run_json(*flags, "--output", tmp_path / "cut", "--resume")
    assert [row["loss"] for row in resumed["history"]] == [row["loss"] for row in whole["history"]]
    assert resumed["plan"] == whole["plan"]
    assert not (tmp_path / "cut.state").exists()


def test_a_signal_stops_a_run_that_says_how_to_go_on(tmp_path):
    flags = ["train", *GRAY, *QUICK, "--keep-params", "0.5", "--epochs", "500", "--no-report",
             "--output", str(tmp_path / "out")]
    child = subprocess.Popen([sys.executable, "-m", "adacomcat", *map(str, flags)], text=True,
                             stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    first = next(line for line in child.stderr if line.startswith("epoch 1 of 500"))
    assert first
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate()
    line = err.splitlines()[-1]
    assert child.returncode == 143, err
    assert line.startswith("adacomcat: stopped by SIGTERM at epoch ")
    assert line.endswith("--resume") and shlex.split(line)[-1 - len(flags):-1] == flags
    assert not (tmp_path / "out").exists() and (tmp_path / "out.state").is_dir()


@pytest.mark.parametrize("place", ["report", "state", "its results", "its folder", "done"])
def test_a_run_that_died_behind_its_checkpoint_is_completed(place, tmp_path, run, run_json,
                                                            monkeypatch):
    from adacomcat.cli.commands import train as command
    flags = ["train", *GRAY, *QUICK, "--keep-params", 0.5, "--epochs", 1, "--seed", 1]
    whole = run_json(*flags, "--output", tmp_path / "whole")
    output = tmp_path / "cut"

    def dies_at(function, path=""):
        def dies(given=None, *args, **kwargs):
            if str(given).endswith(path):
                raise KeyboardInterrupt
            return function(given, *args, **kwargs)
        return dies
    with monkeypatch.context() as patch:
        if place != "done":
            owner, name, path = {"report": (command, "write_page", ""),
                                 "state": (command.shutil, "rmtree", ""),
                                 "its results": (os, "unlink", "results.json"),
                                 "its folder": (os, "rmdir", "cut.state")}[place]
            patch.setattr(owner, name, dies_at(getattr(owner, name), path))
        assert run(*flags, "--output", output)[0] == (0 if place == "done" else 130)
    if place == "its results":
        assert [path.name for path in (tmp_path / "cut.state").iterdir()] == ["results.json"]
    found = run_json(*flags, "--output", output, "--resume")
    if place in ("done", "its folder"):
        assert found["finished"]
    else:
        assert found["history"][0]["loss"] == whole["history"][0]["loss"]
    assert not (tmp_path / "cut.state").exists()
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json", "model.safetensors", "report.html", "run.json"]


def test_damaged_results_of_a_finished_run_are_named(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out.state").mkdir()
    (tmp_path / "out.state" / "results.json").write_text('{"params": 1')
    code, _, err = run("train", *GRAY, *QUICK, "--dense", "-o", tmp_path / "out", "--resume")
    assert code == 2 and "results.json is damaged" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("case", ["below a file", "state is a file", "state dir is a file"])
def test_an_output_that_cannot_be_written_is_refused_at_once(case, tmp_path, run, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken.state").write_text("")
    flags = {"below a file": ["-o", tmp_path / "file" / "out"],
             "state is a file": ["-o", tmp_path / "taken"],
             "state dir is a file": ["-o", tmp_path / "out", "--state-dir", tmp_path / "file"]}
    monkeypatch.setattr("timm.create_model", None)
    code, _, err = run("train", *GRAY, *QUICK, "--dense", *flags[case])
    assert code == 2 and "cannot write" in err and len(err.splitlines()) == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.state"]


def test_two_runs_do_not_write_one_output(tmp_path, run):
    (tmp_path / "out.state").mkdir()
    with exclusive(tmp_path / "out.state" / "lock", "out"):
        code, _, err = run("train", *GRAY, *QUICK, "--dense", "-o", tmp_path / "out")
    assert code == 2 and "another run is writing" in err


@pytest.mark.parametrize(("flags", "says"), [
    ([], "train needs --keep-params FRACTION, --plan FILE, --adapters RANK or --dense"),
    (["--dense", "--keep-params", "0.5"], "leave out --keep-params"),
    (["--adapters", "2", "--keep-params", "0.5"], "leave out --keep-params, --plan and --dense"),
    (["--adapters", "2", "--preset", "comcat"], "neither keep_params nor the presets"),
    (["--keep-params", "0.01"], "at least"),
    (["--keep-params", "0.5", "--num-classes", "7"], "pass --num-classes 10"),
    (["--keep-params", "0.5", "--search", "never"], "invalid choice: 'never'"),
    (["--dense", "--batch-size", "5000"], "larger than the training set"),
])
def test_bad_training_input_writes_nothing(flags, says, tmp_path, run):
    code, out, err = run("train", *GRAY, "--data", "digits", "--output", tmp_path / "x", *flags)
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert says in lines[0]
    assert not list(tmp_path.iterdir())


def test_two_processes_train_to_the_same_checkpoint(tmp_path, run_json):
    flags = ["train", *GRAY, *QUICK, "--keep-params", 0.5, "--epochs", 1, "--device", "cpu",
             "--no-report"]
    alone = run_json(*flags, "--output", tmp_path / "one")
    done = shell("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "adacomcat",
                 *flags, "--output", tmp_path / "two", "--json")
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["plan"] == alone["plan"]
    assert together["history"][0]["loss"] == pytest.approx(alone["history"][0]["loss"], rel=1e-4)
    one, two = (adacomcat.load(tmp_path / name) for name in ("one", "two"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=1e-3)
