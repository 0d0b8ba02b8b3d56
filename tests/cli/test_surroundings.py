"""The command line on machines that lack something: an encoding, a reader, a home, a network."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers.command_line import ARCHITECTURE, MODEL
from helpers.models import compressed, dense_model
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import adacomcat
from adacomcat.cli import download
from adacomcat.latency import cache
from adacomcat.report.files import record
from adacomcat.report.page import write_page
from adacomcat.utils.machine import cache_folder

DIGITS = ["--data", "digits"]


@pytest.fixture
def digits(tmp_path):
    """A folder with a model of 10 classes."""
    model = dense_model(img_size=16, patch_size=8, in_chans=1, embed_dim=32, depth=1, num_heads=2,
                        num_classes=10)
    adacomcat.save(model, tmp_path / "digits")
    return tmp_path / "digits"


# Numbers that are not finite


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_accuracy_of_outputs_that_are_not_finite_is_none(value, digits, run):
    weights = load_file(digits / "model.safetensors")
    weights["head.bias"][3] = value
    save_file(weights, digits / "model.safetensors", metadata={"format": "pt"})
    for flags in ([], ["--json"], ["--min-accuracy", "0"]):
        code, out, err = run("evaluate", "-m", digits, "--no-verify", *DIGITS, *flags)
        assert (code, out) == (2, "") and "NaN or infinite for 360 of 360 images" in err


def test_keys_that_are_nan_are_noticed(digits, run):
    """PyTorch's attention gives zeros for them, so that all outputs are finite."""
    weights = load_file(digits / "model.safetensors")
    bias = next(name for name in weights if name.endswith("attn.qkv.bias"))
    weights[bias][len(weights[bias]) // 2] = float("nan")
    save_file(weights, digits / "model.safetensors", metadata={"format": "pt"})
    code, out, err = run("evaluate", "-m", digits, "--no-verify", *DIGITS)
    assert (code, out) == (2, "") and f"{bias} holds NaN" in err


def test_a_class_that_cannot_be_is_no_fault(digits, run):
    weights = load_file(digits / "model.safetensors")
    weights["head.bias"][3] = -1e30
    save_file(weights, digits / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("evaluate", "-m", digits, "--no-verify", *DIGITS, "--json")
    assert code == 0 and json.loads(out, parse_constant=refuse)["top1"] < 100


@pytest.mark.parametrize("gate", ["nan", "inf", "-1", "101", "x"])
def test_gates_are_percentages(gate, digits, run):
    code, _, err = run("evaluate", "-m", digits, *DIGITS, "--min-accuracy", gate)
    assert code == 2 and "--min-accuracy: must be a number in [0, 100]" in err


# The environment


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_encoding_without_arrows(encoding):
    done = subprocess.run([sys.executable, "-m", "adacomcat", "inspect", *MODEL],
                          env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0 and b"in -> out" in done.stdout, done.stderr
    assert b" x 2" in done.stdout and done.stdout.isascii()


def test_a_reader_that_leaves_is_no_failure():
    command = [sys.executable, "-m", "adacomcat", "inspect", *MODEL]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    child.stdout.close()
    err = child.stderr.read().decode()
    assert child.wait() == 0 and "Traceback" not in err and "Broken pipe" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "adacomcat", "doctor"], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "adacomcat: error: cannot print the result: No space" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("environment", [{"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": "8"},
                                         {"RANK": "1", "WORLD_SIZE": "1"}])
def test_the_environment_of_a_cluster_does_not_silence(environment, run_json, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert "versions" in run_json("doctor")


def test_a_size_without_an_address_is_one_line(digits, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, _, err = run("evaluate", "-m", digits, *DIGITS)
    assert code == 2 and "MASTER_ADDR" in err and err.count("\n") == 1


def test_without_a_home_latencies_are_measured_anew(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_folder("latency") is None
    found = cache.LatencyCache({"device": "x"})
    found.add("block", {"8": 1.5})
    assert found.milliseconds == {} or found.milliseconds == {"block": {"8": 1.5}}
    assert cache.LatencyCache({"device": "x"}).milliseconds == {}


def test_names_of_files_that_are_no_text(tmp_path, digits, run):
    """A name in another encoding, as old archives have it: safetensors reads no such file."""
    digits.rename(tmp_path / "caf\udce9")
    code, _, err = run("evaluate", "-m", tmp_path / "caf\udce9", *DIGITS)
    assert code == 2 and "not valid UTF-8" in err and err.count("\n") == 1
    record(tmp_path, "evaluation", {"model": "caf\udce9", "images": 1})
    assert "caf?" in write_page([tmp_path]).read_text(encoding="utf-8")


def test_an_error_in_a_worker_process_is_the_line_alone(tmp_path, run):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "1.png").write_bytes(b"no picture")
    code, _, err = run("evaluate", "-m", ARCHITECTURE, "--num-classes", "2", "--data", tmp_path,
                       "-j", "1", "-b", "2")
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith("adacomcat: error: cannot read the picture")
    assert "Traceback" not in line


# Names


def test_a_folder_with_the_name_of_an_architecture_is_named(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir(ARCHITECTURE)
    code, _, err = run("inspect", *MODEL)
    assert code == 0 and "folder" not in err  # it holds no model
    os.rmdir(ARCHITECTURE)
    adacomcat.save(compressed(), ARCHITECTURE)
    code, out, err = run("inspect", "-m", ARCHITECTURE)
    assert code == 0 and "the folder is taken" in err and "low-rank already" in out
    code, out, err = run("inspect", "-m", f"./{ARCHITECTURE}")
    assert code == 0 and "the folder is taken" not in err and "low-rank already" in out


@pytest.mark.parametrize("name", ["a" * 300, "", "nul\0", "é" * 3000])
def test_names_that_no_model_has(name, run):
    code, _, err = run("inspect", "-m", name)
    assert code == 2 and "timm has no model" in err and len(err) < 400


# Downloads


def test_no_network_is_known_in_seconds(run, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    code, _, err = run("inspect", "-m", ARCHITECTURE, "--pretrained")
    assert code == 2 and "pass --checkpoint FILE" in err and err.count("\n") == 1
    assert sum(waited) < 5
    assert constants.HF_HUB_OFFLINE is False


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def test_a_server_that_never_answers_is_left(no_proxy):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert not download.reaches(url, seconds=0.2)
    assert not download.reaches(url, seconds=5.0)  # nobody listens any more


def test_any_answer_is_one(no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            connection.close()
        threading.Thread(target=answer, daemon=True).start()
        assert download.reaches(f"http://127.0.0.1:{server.getsockname()[1]}/", seconds=30)
