"""Flags, YAML, plans and ranks: taken as they are meant, or refused by one line."""

import json
import math
import sys

import pytest
import yaml
from helpers.command_line import ARCHITECTURE
from helpers.fuzzing import JSON, NUMBERS, WORDS, accepted, altered, damaged, fuzzed
from helpers.models import dense_model
from hypothesis import given
from hypothesis import strategies as st

from adacomcat.checkpoint.comcat import read_ranks
from adacomcat.cli.arguments import COMMANDS, build_parser
from adacomcat.cli.commands import recover, train
from adacomcat.cli.config_file import value_of
from adacomcat.cli.main import parse
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan

PARSER = build_parser()
PARSERS = PARSER._subparsers._group_actions[0].choices
FLAGS = {command: [action for action in PARSERS[command]._actions
                   if action.option_strings and action.dest not in ("help", "config")]
         for command in COMMANDS}
NEEDED = ["--model", ARCHITECTURE, "--data", "digits", "--output", "x", "--teacher", "y",
          "--ranks", "r", "--checkpoint", "c"]


@pytest.fixture(autouse=True, scope="module")
def one_parser():
    """Making it takes longer than most inputs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["adacomcat.cli.main"], "build_parser", lambda: PARSER)
        yield


def needed(command):
    """What every command wants, of those that this one has."""
    names = {name for action in FLAGS[command] for name in action.option_strings}
    return [word for flag, value in zip(NEEDED[::2], NEEDED[1::2], strict=True)
            if flag in names for word in (flag, value)]


@st.composite
def command_lines(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    words = [command, *needed(command)]
    for action in draw(st.lists(st.sampled_from(FLAGS[command]), max_size=5)):
        flag = draw(st.sampled_from(action.option_strings))
        words += [flag] if action.nargs == 0 else [f"{flag}={draw(WORDS)}"]
    return words


def require_usable(args):
    """Numbers are finite, and settings are what a run takes."""
    assert all(math.isfinite(value) for value in vars(args).values()
               if isinstance(value, float | int))
    if args.command == "train":
        accepted(lambda: train._config(args, "state"))
    if args.command == "recover":
        assert accepted(lambda: recover._config(args)) is not None


@fuzzed(4)
@given(words=command_lines())
def test_flags(words):
    args = accepted(lambda: parse(words))
    if args is not None:
        require_usable(args)


TRAINING = {action.dest: "1" for action in FLAGS["train"]}


@fuzzed(2)
@given(text=st.one_of(
    st.dictionaries(st.sampled_from(sorted(TRAINING)), JSON, max_size=4).map(
        lambda entries: yaml.safe_dump(entries)),
    st.dictionaries(st.sampled_from(sorted(TRAINING)), WORDS, max_size=4).map(
        lambda entries: "\n".join(f"{key}: {value}" for key, value in entries.items())),
    st.text(st.characters(codec="utf-8"), max_size=60)).map(
        lambda text: text.encode("utf-8", "surrogateescape")))
def test_yaml_of_flags(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text)
    args = accepted(lambda: parse(["train", *needed("train"), "-c", str(path)]))
    if args is not None:
        require_usable(args)


@fuzzed()
@given(content=damaged(b"keep-params: 50%\nmodel-kwargs: {depth: 2, a: [1, 2]}\namp: true\n"))
def test_damaged_yaml(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(content)
    accepted(lambda: parse(["train", *needed("train"), "-c", str(path)]))


@fuzzed(2)
@given(text=st.one_of(WORDS, JSON.map(repr), st.text(max_size=40)))
def test_values_of_model_arguments(text):
    try:
        value = value_of(text)
    except ValueError:
        return
    json.dumps(value, allow_nan=False)


@pytest.fixture(scope="module")
def model():
    return dense_model()


PLAN = {"ranks": {"blocks.0.attn.qk": 5, "blocks.1.mlp.fc1": 12, "head": "dense"}}


@fuzzed(2)
@given(content=st.one_of(
    altered(PLAN).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
    damaged(json.dumps(PLAN).encode())))
def test_plans(content, model, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plan.json"
    path.write_bytes(content)
    plan = accepted(lambda: RankPlan.load(path))
    if plan is None:
        return
    if accepted(lambda: plan.validate(model)) is not None:
        assert RankPlan.from_json(plan.to_json()) == plan
        assert plan.params(plan.sites(model)) > 0


@fuzzed()
@given(content=st.one_of(
    damaged(b"28,19,20,24,48,21,7,9,5\n"),
    st.lists(NUMBERS, min_size=9, max_size=9).map(lambda row: ",".join(map(str, row)).encode())))
def test_ranks(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "ranks.txt"
    path.write_bytes(content)
    ranks = accepted(lambda: read_ranks(path, 2))
    assert ranks is None or (len(ranks) in (8, 9) and all(1 <= rank < 10**9 for rank in ranks))


def test_the_check_itself_can_fail():
    with pytest.raises(AssertionError):
        accepted(lambda: (_ for _ in ()).throw(UserError("endless " * 1000)))
    with pytest.raises(ZeroDivisionError):
        accepted(lambda: 1 // 0)
