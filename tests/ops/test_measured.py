"""Backends by preference and by measurement: what `pick` takes, and what it falls back to."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.command_line import GRAY

from adacomcat import ops
from adacomcat.errors import UserError
from adacomcat.latency import self_measurement
from adacomcat.ops import backends, measured

CPU = torch.device("cpu")
needs_cpp = pytest.mark.skipif(backends.available()["cpp"] is not None,
                               reason=str(backends.available()["cpp"]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured._ranked.cache_clear()
    yield tmp_path / "adacomcat/backends"
    measured._ranked.cache_clear()


def linear(*options, dtype=torch.float32):
    draw = [torch.randn(shape).to(dtype) for shape in ((3, 8), (8, 2), (5, 2))]
    return ops.low_rank_linear(*draw, *options)


@needs_cpp
def test_a_preferred_backend_runs_what_it_can():
    """`use_backend` refuses the rest; a preference lets it run elsewhere."""
    x = torch.randn(3, 8)
    with backends.prefer_backend("reference"):
        assert backends.pick("low_rank_linear", x) == "reference"
        assert backends.direct_kernel("low_rank_mlp", x) is None
    with backends.prefer_backend("cpp"):
        assert backends.pick("low_rank_linear", x) == "cpp"
        assert backends.pick("gated_low_rank_linear", x) == "reference"
        assert linear(dtype=torch.float64).dtype == torch.float64
        with backends.use_backend("reference"):
            assert backends.pick("low_rank_linear", x) == "reference"
    assert backends.pick("low_rank_linear", x) == "cpp"


@pytest.mark.parametrize(("name", "says"), [("numpy", "unknown backend 'numpy'"),
                                            ("triton", "not available here")])
def test_a_preference_that_cannot_be_is_refused(name, says):
    if backends.available().get(name, "") is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(UserError, match=says), backends.prefer_backend(name):
        pass


def in_a_process(code: str, **env: str):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | env)


@needs_cpp
def test_the_environment_names_a_backend(cache):
    code = ("import torch; from adacomcat.ops import backends; "
            "print(backends.pick('low_rank_linear', torch.randn(3, 8)))")
    for name, expected in (("reference", "reference"), ("cpp", "cpp"), ("", "cpp")):
        assert in_a_process(code, ADACOMCAT_BACKEND=name).stdout.strip() == expected
    wrong = in_a_process(code, ADACOMCAT_BACKEND="cppp")
    assert wrong.stderr.strip().endswith("UserError: ADACOMCAT_BACKEND: unknown backend 'cppp'; "
                                         "choose one of reference, cpp, triton, cuda")


@needs_cpp
def test_the_flag_names_a_backend(tmp_path, run, monkeypatch):
    seen = []
    real = backends.pick
    monkeypatch.setattr(backends, "pick",
                        lambda op, *rest: seen.append(real(op, *rest)) or seen[-1])
    monkeypatch.setattr(backends, "direct_kernel", lambda op, x: None)
    (tmp_path / "plan.json").write_text('{"ranks": {"blocks.0.mlp.fc1": 8, "blocks.0.mlp.fc2": 8}}')
    for name in ("reference", "cpp"):
        seen.clear()
        code, _, err = run("profile", *GRAY, "--plan", tmp_path / "plan.json", "--repeats", 1,
                           "--backend", name)
        assert code == 0, err
        assert set(seen) == {name}
    code, _, err = run("profile", *GRAY, "--backend", "numpy")
    assert code == 2 and "invalid choice: 'numpy'" in err


def costs(**milliseconds):
    """A clock that says what each backend takes."""
    return lambda runs: {name: milliseconds[name] for name in runs}


@needs_cpp
@torch.no_grad()
def test_pick_follows_what_was_measured(cache):
    x = torch.randn(3, 8)
    for cpp, reference, expected in ((1.0, 2.0, "cpp"), (2.0, 1.0, "reference"),
                                     (1.05, 1.0, "cpp")):  # a twentieth is noise
        times = self_measurement.measure(CPU, costs(cpp=cpp, reference=reference))
        path = measured.keep(CPU, times)
        assert path is not None and path.parent == cache
        for op in ("low_rank_linear", "low_rank_mlp", "low_rank_attention"):
            for training in (False, True):
                assert backends.pick(op, x, training) == expected
            assert (backends.direct_kernel(op, x) is None) == (expected == "reference")
        assert backends.pick("gated_low_rank_linear", x) == "reference"  # was not measured
    measured.keep(CPU, self_measurement.measure(CPU, costs(cpp=2.0, reference=1.0)))
    with backends.use_backend("cpp"):
        assert backends.pick("low_rank_linear", x) == "cpp"
    with backends.prefer_backend("cpp"):
        assert backends.pick("low_rank_linear", x) == "cpp"


@needs_cpp
def test_inference_and_training_are_measured_apart(cache):
    x = torch.randn(3, 8)
    times = {measured.key("low_rank_mlp", torch.float32, training):
             {"cpp": 1.0, "reference": 0.5 if training else 2.0} for training in (False, True)}
    measured.keep(CPU, times)
    assert backends.pick("low_rank_mlp", x) == "cpp"
    assert backends.pick("low_rank_mlp", x, True) == "reference"
    assert backends.pick("low_rank_mlp", x.bfloat16(), True) == "cpp"  # was not measured


@needs_cpp
@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:50], lambda text: "[]",
    lambda text: json.dumps(json.loads(text) | {"machine": {}}),
    lambda text: json.dumps(json.loads(text) | {"milliseconds": 3}),
    lambda text: text.replace("2.0", "-2.0"), lambda text: text.replace("2.0", '"2"')])
def test_a_damaged_file_measures_nothing(damage, cache):
    path = measured.keep(CPU, self_measurement.measure(CPU, costs(cpp=2.0, reference=1.0)))
    assert backends.pick("low_rank_mlp", torch.randn(3, 8)) == "reference"
    path.write_text(damage(path.read_text()))
    measured._ranked.cache_clear()
    assert backends.pick("low_rank_mlp", torch.randn(3, 8)) == "cpp"


@needs_cpp
def test_every_op_with_a_choice_is_measured_in_both_directions():
    """The calls themselves run: inference, and gradients of all tensors, on each backend."""
    called = []

    def timer(runs):
        for name, run in runs.items():
            called.append(name)
            run()
        return dict.fromkeys(runs, 1.0)

    times = self_measurement.measure(CPU, timer)
    ops_measured = {key.split()[0] for key in times}
    assert ops_measured == {"low_rank_linear", "low_rank_mlp", "dense_mlp", "low_rank_attention",
                            "batched_svd", "gated_mlp", "rotary_attention"}
    assert {key.split()[2] for key in times} == {"inference", "training"}
    assert len(times) == 2 * (4 * 3 + 2) + 2 * 3 and set(called) == {"cpp", "reference"}


@needs_cpp
def test_doctor_measures_and_shows_it(cache, run_json, run, monkeypatch):
    from adacomcat.cli.commands import doctor
    assert run_json("doctor")["measured"] == {}
    monkeypatch.setattr(doctor, "measure", lambda device: self_measurement.measure(
        device, costs(cpp=2.0, reference=1.0)))
    found = run_json("doctor", "--measure")["measured"]
    assert len(found) == 1 and list(cache.iterdir())
    assert next(iter(found.values()))["low_rank_mlp float32 inference"] == {
        "cpp": 2.0, "reference": 1.0}
    assert "reference 1, cpp 2" in run("doctor")[1]


@needs_cpp
def test_doctor_says_where_it_cannot_keep(cache, run, monkeypatch):
    from adacomcat.cli.commands import doctor
    monkeypatch.setattr(doctor, "measure", lambda device: {})
    cache.parent.write_text("no folder")
    code, _, err = run("doctor", "--measure")
    assert code == 2 and "cannot keep what was measured" in err and "XDG_CACHE_HOME" in err
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    code, _, err = run("doctor", "--measure")
    assert code == 2 and "there is no home" in err
