"""The YAML file of -c and the values of --model-kwargs: text that flags judge, nothing endless."""

import pytest
import timm
from helpers.command_line import ARCHITECTURE, MODEL

from adacomcat.cli.config_file import value_of
from adacomcat.cli.main import parse
from adacomcat.errors import UserError


@pytest.fixture
def parsed(tmp_path):
    """The arguments of `train` with this file."""
    def call(text, *argv):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        base = ["train", "-m", ARCHITECTURE, "--data", "digits", "-o", "x"]
        return parse([*base, "-c", str(tmp_path / "run.yaml"), *argv])
    return call


def test_words_of_yaml_are_words_of_flags(parsed):
    args = parsed("search: off\nopt: no\nstate-dir: 2001-01-01\nlr: 1e-4\nsmoothing: 10%\n"
                  "seed: 010\n")
    assert (args.search, args.opt, args.state_dir) == ("off", "no", "2001-01-01")
    assert (args.lr, args.smoothing, args.seed) == (1e-4, 0.1, 10)


@pytest.mark.parametrize("nothing", ["~", "null", "", '""'])
def test_nothing_leaves_the_default(nothing, parsed):
    assert parsed(f"epochs: {nothing}\nkeep-params: 0.5\n").epochs is None


@pytest.mark.parametrize(("word", "value"), [("true", True), ("on", True), ("Yes", True),
                                             ("false", False), ("off", False), ("no", False)])
def test_flags_without_a_value(word, value, parsed):
    assert parsed(f"amp: {word}\npretrained: {word}\n").amp is value
    assert parsed(f"pretrained: {word}\n").pretrained is value


def test_lists_and_mappings_reach_the_model(parsed):
    args = parsed("model-kwargs:\n  depths: [1, 2]\n  init_values: 1e-5\n  act_layer: gelu\n")
    assert {key: value_of(text) for key, text in args.model_kwargs} == {
        "depths": [1, 2], "init_values": 1e-5, "act_layer": "gelu"}


def test_the_command_line_replaces_the_budget_of_the_file(parsed):
    args = parsed("keep-params: 0.5\nepochs: 3\n", "--plan", "p.json")
    assert (args.keep_params, args.plan, args.epochs) == (None, "p.json", 3)


LAUGHS = "model-kwargs:\n- &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(("text", "says"), [
    (LAUGHS, "aliases"), ("a: &a [*a]", "aliases"), ("[" * 20_000, "nested too deeply"),
    ("- " * 20_000, "nested too deeply"), ("x" * 70_000, "more than 65,536 bytes"),
    ("a: [", "cannot read"), ("? [a]\n: b", "cannot read"), ("- a", "'flag: value' lines"),
    ("seed: " + "9" * 5000, "--seed: must be"), ("seed: 2001-02-30", "--seed: must be"),
    ("lr: .nan", "--lr: must be"), ("lr: .inf", "--lr: must be"), ("amp: 3", "no value of --amp"),
    ("amp: [true]", "no value of --amp"), ("keep-params: true", "--keep-params: must be"),
    ("learning-rate: 1", "has no --learning-rate"), ("config: other.yaml", "has no --config")])
def test_what_is_refused(text, says, parsed):
    with pytest.raises(UserError, match=says):
        parsed(text)


@pytest.mark.parametrize(("text", "value"), [
    ("6", 6), ("1e-5", 1e-5), ("-2.5E+3", -2500.0), ("true", True), ("[1, [2, 3]]", [1, [2, 3]]),
    ("gelu", "gelu"), ("nan", "nan"), ("{a: 1}", {"a": 1}), ("~", None), ("'1'", 1.0)])
def test_values_of_model_arguments(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize("text", ["[", "'", "!!python/name:os.system", "!!bool x", "!!timestamp x",
                                  "2001-01-01", "2001-02-30", "9" * 5000, ".nan", "[.inf]",
                                  "!!set {a}", "&a [*a]", "[" * 100, "{[1]: 2}", "!!binary aGk="])
def test_values_that_no_model_can_have(text, run):
    with pytest.raises(ValueError):
        value_of(text)
    code, _, err = run("inspect", *MODEL, f"drop_rate={text}")
    assert code == 2 and "--model-kwargs drop_rate=" in err and err.count("\n") == 1


@pytest.mark.parametrize(("value", "says"), [
    ("norm_layer=x", "cannot make"), ("patch_size=33", "cannot make"),
    ("patch_size=0", "cannot make"), ("patch_size=[1,1,1]", "a kernel of 3 sizes"),
    ("num_heads=0", "cannot make"),
    ("num_heads=-1", "cannot make"), ("num_heads=on", "num_heads must be a number; got True"),
    ("in_chans=0", "cannot make"),
    ("depth=9000", "more than 10,000 modules"), ("embed_dim=1000000", "GiB"),
    ("features_only=true", "cannot make"), ("checkpoint_path=x", "no argument of a model"),
    ("pretrained_cfg=x", "no argument of a model")])
def test_models_that_cannot_be(value, says, run):
    code, out, err = run("inspect", *MODEL, value)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["depth=1000000000", "num_layers=1000000000"])
def test_numbers_of_blocks_are_judged_before_timm_lists_them(name, run, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: pytest.fail("asked timm"))
    code, _, err = run("inspect", *MODEL, name)
    assert code == 2 and "makes more than 10,000 modules" in err


def test_a_small_number_in_scientific_notation_is_taken(run):
    assert run("inspect", *MODEL, "init_values=1e-5")[0] == 0
