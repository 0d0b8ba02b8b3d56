"""The command line: what each command writes and prints, and one clear line for bad input."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import timm
import torch
from helpers import comcat
from helpers.command_line import ARCHITECTURE, MODEL, SMALL, shell
from helpers.pictures import write_pictures
from helpers.together import command_on
from safetensors.torch import save_file

import adacomcat
from adacomcat.ops import backends


def build(seed=0, **args):
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, img_size=32, num_classes=10, **SMALL | args).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "dense.safetensors"
    save_file(build().state_dict(), path)
    return path


def test_compress_evaluate_and_profile(tmp_path, weights, run_json):
    folder = tmp_path / "small"
    done = run_json("compress", *MODEL, "--checkpoint", weights, "--keep-params", "60%",
                    "--data", "digits", "--calibration-images", 40, "--output", folder)
    params = {name: row["params"] for name, row in done["models"].items()}
    assert 0.5 < params["compressed"] / params["dense"] <= 0.6
    assert done["calibration_images"] == 40
    model = adacomcat.load(folder)
    assert model.rank_plan.ranks.items() <= done["ranks"].items()
    assert "Where the ranks went" in (folder / "report.html").read_text()
    assert "http" not in (folder / "report.html").read_text()

    found = run_json("evaluate", "-m", folder, "--data", "digits")
    config = adacomcat.data.model_data_config(model)
    _, test = adacomcat.data.train_and_test("digits", None, config)
    images = torch.stack([test[i][0] for i in range(len(test))])
    labels = torch.tensor([test[i][1] for i in range(len(test))])
    with torch.inference_mode():
        logits = model(images)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean())
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)

    rows = run_json("profile", "-m", folder, "--repeats", 2, "--batch-size", 2)["models"]
    expected = {**params, "optimized": params["compressed"]}
    assert {name: row["params"] for name, row in rows.items()} == expected
    assert rows["compressed"]["macs"] < rows["dense"]["macs"]
    assert all(row["latency_ms"] > 0 for row in rows.values())


def test_tables_show_the_same_numbers(tmp_path, weights, run):
    code, out, err = run("compress", *MODEL, "--checkpoint", weights, "--keep-macs", "0.5",
                         "--output", tmp_path / "small", "--no-report")
    assert code == 0, err
    assert f"{sum(p.numel() for p in build().parameters()):,}" in out
    assert str(tmp_path / "small") in out
    assert not {"report.html", "run.json"} & {p.name for p in (tmp_path / "small").iterdir()}
    code, out, _ = run("evaluate", "-m", tmp_path / "small", "--data", "digits")
    assert code == 0 and "top-1" in out


def test_plan_and_rank_multiple(tmp_path, weights, run_json):
    plan = adacomcat.RankPlan({"blocks.0.attn.qk": 5, "blocks.1.mlp.fc1": 12})
    plan.save(tmp_path / "plan.json")
    base = ["compress", *MODEL, "--checkpoint", weights]
    run_json(*base, "--plan", tmp_path / "plan.json", "--output", tmp_path / "one")
    model = adacomcat.load(tmp_path / "one")
    assert model.rank_plan == plan and model.blocks[0].attn.rank_qk == 5
    done = run_json(*base, "--keep-params", 0.6, "--rank-multiple", 3, "--output",
                    tmp_path / "two")
    ranks = {name: rank for name, rank in done["ranks"].items() if rank != "dense"}
    assert ranks and all(rank % 3 == 0 for rank in ranks.values())


def test_refine_tells_what_it_changed(tmp_path, weights, run, run_json):
    argv = ["compress", *MODEL, "--checkpoint", weights, "--in-chans", "3", "--data", "digits",
            "--calibration-images", "24", "--collages", "4",
            "--keep-params", "0.7", "--refine", "6", "--no-report", "--output"]
    done = run_json(*argv, tmp_path / "one")
    found = done["refinement"]
    assert 1 <= found["tried"] <= 6 and found["loss"] < found["start_loss"]
    assert all(done["ranks"][name] == after for name, (_, after) in found["changed"].items())
    code, out, err = run(*argv, tmp_path / "two")
    assert code == 0, err
    assert f"{found['tried']} plans tried" in out and next(iter(found["changed"])) in out


def test_inspect_names_sites_and_errors(weights, run, run_json):
    found = run_json("inspect", *MODEL, "--checkpoint", weights)
    sites = {row["site"]: row for row in found["sites"]}
    assert sites["blocks.0.attn.qk"]["tier"] == "A"
    assert sites["blocks.1.mlp.fc2"]["full_rank"] == 64
    spectrum = torch.linalg.svdvals(build().blocks[1].mlp.fc1.weight.double())
    for rank, error in sites["blocks.1.mlp.fc1"]["errors"].items():
        tail = spectrum[int(rank):].norm() / spectrum.norm()
        assert error == pytest.approx(tail.item(), rel=1e-5)
    code, out, _ = run("inspect", *MODEL, "--checkpoint", weights)
    assert code == 0 and "blocks.1.attn.vo" in out and "error at 0.25" in out


def test_inspect_needs_no_weights(weights, run, run_json):
    """What it lists is the same; errors of random weights would say nothing."""
    with_weights = run_json("inspect", *MODEL, "--checkpoint", weights)
    found = run_json("inspect", *MODEL)
    assert all(row.pop("errors") for row in with_weights["sites"])
    assert not any(row.pop("errors") for row in found["sites"])
    assert found == with_weights
    code, out, err = run("inspect", "-m", "vit_giant_patch14_224")  # of 4 GB
    assert code == 0 and "blocks.39.attn.qk" in out and "error at" not in out and not err


@pytest.mark.parametrize("name", ["levit_128s", "volo_d1_224", "swinv2_tiny_window8_256"])
def test_products_are_counted_without_weights(name, run_json):
    model = timm.create_model(name).eval()
    assert run_json("inspect", "-m", name)["macs"] == adacomcat.cost.model_macs(model)


def test_doctor_says_what_runs_and_why_not(run, run_json):
    found = run_json("doctor")
    assert found["backends"] == backends.available()
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["machine"]["threads"] == torch.get_num_threads()
    code, out, _ = run("doctor")
    assert len(out.splitlines()) < 80  # no line for each Triton kernel
    assert code == 0
    assert all(reason in out for reason in found["backends"].values() if reason)


def test_folders_are_models_and_adapt(tmp_path, weights, run_json):
    adacomcat.save(build(), tmp_path / "dense")
    run_json("compress", "-m", tmp_path / "dense", "--keep-params", 0.6, "--output",
             tmp_path / "small")
    run_json("compress", "-m", tmp_path / "dense", "--num-classes", 3, "--keep-params", 0.6,
             "--output", tmp_path / "three")
    assert adacomcat.load(tmp_path / "small").num_classes == 10
    assert adacomcat.load(tmp_path / "three").num_classes == 3


def test_gate_of_evaluate_is_exit_code_3(weights, run_json):
    base = ["evaluate", *MODEL, "--checkpoint", weights, "--data", "digits"]
    assert run_json(*base, "--min-accuracy", 100, code=3)["passed"] is False
    assert run_json(*base, "--min-accuracy", 0)["passed"] is True


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path, weights, run, run_json):
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model: {ARCHITECTURE}
img-size: 32
num_classes: 10
model_kwargs: {{embed_dim: 64, depth: 2, num_heads: 2}}
checkpoint: {weights}
keep_params: 90%
no_report: true
""")
    done = run_json("compress", "-c", config, "--output", tmp_path / "one")
    rows = done["models"]
    assert rows["compressed"]["params"] > 0.8 * rows["dense"]["params"]
    assert not (tmp_path / "one" / "report.html").exists()
    done = run_json("compress", "-c", config, "--keep-macs", 0.5, "--output", tmp_path / "two")
    rows = done["models"]
    assert rows["compressed"]["macs"] <= 0.5 * rows["dense"]["macs"]

    for line, says in (("learning_rate: 1", "compress has no --learning-rate"),
                       ("no_report: 3", "no value of --no-report"),
                       ("keep_params: 2", "must be a fraction"),
                       ("- a", "'flag: value' lines are expected"),
                       ("a: [", "cannot read")):
        config.write_text(line)
        code, _, err = run("compress", "-c", config, "-m", ARCHITECTURE, "--output", tmp_path / "x")
        assert code == 2 and says in err and err.count("\n") == 1


def poisoned(tmp_path):
    model = build()
    model.blocks[1].mlp.fc1.weight.data[3, 4] = float("nan")
    save_file(model.state_dict(), tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def other_architecture(tmp_path):
    save_file(build(embed_dim=96).state_dict(), tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def lacking(tmp_path):
    weights = build().state_dict()
    del weights["blocks.1.norm2.weight"]
    torch.save({"state_dict": weights}, tmp_path / "lacking.pth")
    return tmp_path / "lacking.pth"


def truncated_folder(tmp_path):
    adacomcat.save(build(), tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    return tmp_path / "cut"


def foreign_folder(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "foreign"


def empty_data(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "val").mkdir()
    return tmp_path / "data"


def unreadable_data(tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            (tmp_path / "data" / part / name / "1.png").write_bytes(b"no picture")
    return tmp_path / "data"


BAD = {
    "did you mean vit_tiny_patch16_224": lambda t: ["-m", "vit_tiny_patch16_225"],
    "timm has no model 'resnot'": lambda t: ["-m", "resnot"],
    "there is no checkpoint folder": lambda t: ["-m", "no/such/folder"],
    "its checksum differs": lambda t: ["-m", truncated_folder(t)],
    "truncated or no weights file": lambda t: ["-m", truncated_folder(t), "--no-verify"],
    "names no 'architecture'": lambda t: ["-m", foreign_folder(t)],
    "of another shape: cls_token (1, 1, 96) instead of (1, 1, 64)":
        lambda t: [*MODEL, "--checkpoint", other_architecture(t)],
    "missing: blocks.1.norm2.weight": lambda t: [*MODEL, "--checkpoint", lacking(t)],
    "there is no weights file": lambda t: [*MODEL, "--checkpoint", t / "absent.pth"],
    "blocks.1.mlp.fc1": lambda t: [*MODEL, "--checkpoint", poisoned(t)],
    "below what is reachable": lambda t: [*MODEL, "--keep-params", "0.01"],
    "must be a fraction in (0, 1], like 0.5 or 50%; got '0'":
        lambda t: [*MODEL, "--keep-params", "0"],
    "got '150%'": lambda t: [*MODEL, "--keep-params", "150%"],
    "got 'half'": lambda t: [*MODEL, "--keep-params", "half"],
    "--keep-params and --keep-macs exclude each other":
        lambda t: [*MODEL, "--keep-params", "0.5", "--keep-macs", "0.5"],
    "absent.json: No such file": lambda t: [*MODEL, "--plan", t / "absent.json"],
    "neither a folder nor a dataset; the datasets are digits":
        lambda t: [*MODEL, "--data", t / "absent"],
    "no readable pictures": lambda t: [*MODEL, "--data", empty_data(t)],
    "cannot read the picture": lambda t: [*MODEL, "--data", unreadable_data(t)],
    "no pictures in the folder": lambda t: [*MODEL, "--calibration-dir", empty_data(t)],
    "cannot make vit_tiny_patch16_224": lambda t: ["-m", ARCHITECTURE, "--model-kwargs", "widht=3"],
    "must be KEY=VALUE": lambda t: ["-m", ARCHITECTURE, "--model-kwargs", "width"],
    "at least 1": lambda t: [*MODEL, "--img-size", "0"],
    "argument --refine: must be a whole number of at least 1; got '0'":
        lambda t: [*MODEL, "--refine", "0"],
    "refine tries plans at a budget": lambda t: [*MODEL, "--refine", "2"],
    "unrecognized arguments: --epoch 3": lambda t: [*MODEL, "--epoch", "3"],
    "compress needs --model": lambda t: [],
    "--device nowhere": lambda t: [*MODEL, "--device", "nowhere"],
}


@pytest.mark.parametrize("says", BAD)
def test_bad_input_is_one_line_and_exit_code_2(says, tmp_path, run):
    argv = BAD[says](tmp_path)
    if not {"--keep-params", "--keep-macs", "--plan"} & set(argv):
        argv = [*argv, "--keep-params", "0.6"]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("compress", *argv, "--output", tmp_path / "output")
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("adacomcat: error: ") and says in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_taken_output_is_refused_before_work_starts(tmp_path, run, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "thesis.tex").write_text("mine")
    monkeypatch.setattr(timm, "create_model", None)
    for command in (["compress", *MODEL, "--keep-params", "0.5"],
                    ["import-comcat", "-m", ARCHITECTURE, "--ranks", "r", "--checkpoint", "c"]):
        code, _, err = run(*command, "--output", tmp_path / "output")
        assert code == 2 and "already holds something" in err
    assert (tmp_path / "output" / "thesis.tex").read_text() == "mine"


def test_bugs_and_interrupts_have_their_own_codes(run, monkeypatch):
    from adacomcat.cli.commands import doctor
    for error, code in ((RuntimeError("a bug"), 1), (KeyboardInterrupt(), 130)):
        def broken(args, error=error):
            raise error
        monkeypatch.setattr(doctor, "run", broken)
        assert run("doctor")[0] == code


def test_help_is_instant_and_loads_no_torch():
    code = ("import sys, adacomcat.cli\ncode = adacomcat.cli.main(['train', '--help'])\n"
            "print(code, {'torch', 'timm', 'rich', 'yaml'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("0 set()\n") and "--keep-params" in done.stdout
    seconds = []  # of a processor: other work on the machine does not count
    for _ in range(3):
        before = os.times()
        assert shell("adacomcat", "--help").returncode == 0
        after = os.times()
        seconds.append(after.children_user + after.children_system
                       - before.children_user - before.children_system)
    assert min(seconds) < 0.5
    done = shell("adacomcat", "evaluate", "--batch-size", "none")
    assert done.returncode == 2
    assert done.stderr.startswith("adacomcat: error: argument -b/--batch-size")


def test_evaluate_counts_the_same_on_two_processes(tmp_path, weights, run_json):
    flags = ["evaluate", *MODEL, "--checkpoint", weights, "--data", "digits", "-b", "77"]
    alone = run_json(*flags)
    done = command_on(2, *flags, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["top1"] == pytest.approx(alone["top1"])
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_import_comcat_then_evaluate(tmp_path, run, run_json):
    comcat.released(tmp_path)
    flags = ["import-comcat", "--ranks", tmp_path / "ranks.txt", "--checkpoint",
             tmp_path / "checkpoint.pth", "-m", "deit_tiny_patch16_224", "--num-classes", 10,
             "--img-size", 32, "--model-kwargs",
             *(f"{key}={comcat.ARGS[key]}" for key in ("embed_dim", "depth", "num_heads"))]
    found = run_json(*flags, "--output", tmp_path / "folder")
    assert found["ranks"]["head"] == comcat.RANKS[-1]
    assert 0 <= run_json("evaluate", "-m", tmp_path / "folder", "--data", "digits")["top1"] <= 100
    (tmp_path / "ranks.txt").write_text("1,2")
    code, _, err = run(*flags, "--output", tmp_path / "other")
    assert code == 2 and "holds 2 ranks" in err and not (tmp_path / "other").exists()


def test_inspect_measures_what_each_site_hurts(tmp_path, weights, run, run_json):
    argv = ["inspect", *MODEL, "--in-chans", "3", "--checkpoint", weights, "--sensitivity"]
    write_pictures(tmp_path / "photos", 6, seed=2)
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and "pass --images FOLDER" in err
    assert "pass both" in run("inspect", *MODEL, "--record", tmp_path)[2]
    argv += ["--images", tmp_path / "photos", "--ranks", "2", "--record", tmp_path]
    found = run_json(*argv)["sensitivity"]
    assert {row["site"] for row in found["sites"]} >= {"blocks.0.attn.qk", "blocks.1.mlp.hidden"}
    written = json.loads((tmp_path / "sensitivity.json").read_text())
    assert written["order"] == found["order"] and written["judging"] == 3
    code, out, _ = run(*argv)
    assert code == 0 and "blocks, the most sensitive first" in out
    damage = found["sites"][0]["damage"]
    assert all(f"{rank}: {value:.4f}" in out for rank, value in damage.items())
