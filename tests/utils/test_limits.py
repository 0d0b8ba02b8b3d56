"""What numbers may be: the table itself, and flags and settings that follow it alike."""

import math
from fractions import Fraction

import pytest

from adacomcat.cli.arguments import build_parser
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.recovery import RecoveryConfig
from adacomcat.errors import UserError
from adacomcat.utils.limits import RECOVERY, TRAINING, Limit

NEVER = ("nan", "inf", "-inf", "-1", "x", "", "1e400", "0x10")
# Setting → texts that it takes, and texts that it refuses beside those of NEVER.
VALUES = {
    "lr": (["1e-5", "3"], ["0", "-0.0"]),
    "weight_decay": (["0", "0.05"], ["-1e-9"]),
    "clip_grad": (["0", "1.5"], ["-0.5"]),
    "smoothing": (["0", "0.1", "99%"], ["1", "2"]),
    "ema_decay": (["0", "0.9998"], ["1", "1.5"]),
    "kd_alpha": (["0", "1", "0.5"], ["5", "1.0001"]),
    "kd_temperature": (["0.5"], ["0"]),
    "warmup_epochs": (["0", "2.5"], ["-2"]),
    "mixup": (["0", "0.8"], ["101"]),
    "cutmix": (["0", "1"], ["101"]),
    "seed": (["0", str(2**63 - 1)], [str(2**63), str(2**64), "1.5"]),
    "epochs": (["0", "3"], ["1.5", str(2**31)]),
    "steps": (["1"], ["0"]),
    "batch_size": (["1"], ["0", str(10**20)]),
    "search_fraction": (["0.1", "10%"], ["0", "1"]),
    "keep_params": (["1", "50%"], ["0", "150%"]),
    "workers": (["0"], ["5000"]),
}


def flag_takes(command: str, name: str, text: str) -> bool:
    spelled = {"ema_decay": "model-ema-decay"}.get(name, name.replace("_", "-"))
    try:
        build_parser().parse_args([command, f"--{spelled}={text}"])
    except UserError as error:
        assert "must be" in str(error)
        return False
    return True


def setting_takes(kind: type, name: str, text: str) -> bool:
    """The number goes in as it is, so that the text's own rules do not help."""
    limit = (RECOVERY if kind is RecoveryConfig else TRAINING)[name]
    try:
        value = int(text) if limit.whole else float(Fraction(text.rstrip("%"))) / (
            100 if text.endswith("%") else 1)
    except (ValueError, OverflowError):
        value = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}.get(text, text)
    try:
        kind(**{name: value}).checked()
    except UserError as error:
        assert str(error).startswith(f"{name} must be")
        return False
    return True


@pytest.mark.parametrize("name", VALUES)
def test_flag_and_setting_judge_alike(name):
    good, bad = VALUES[name]
    for texts, taken in ((good, True), ((*bad, *NEVER), False)):
        for text in texts:
            assert flag_takes("train", name, text) == taken, text
            assert setting_takes(TrainConfig, name, text) == taken, text


@pytest.mark.parametrize("name", ["minutes", "lr", "block_weight", "ema_decay", "seed", "steps"])
def test_recovery_follows_its_own_table(name):
    for text in ("0", "0.5", "1", "7", "1.5", *NEVER):
        assert flag_takes("recover", name, text) == setting_takes(RecoveryConfig, name, text), text


def test_every_numeric_setting_has_a_limit():
    for kind, limits in ((TrainConfig, TRAINING), (RecoveryConfig, RECOVERY)):
        numbers = {name for name, value in vars(kind()).items() if type(value) in (int, float)}
        assert numbers <= limits.keys()


@pytest.mark.parametrize("value", [True, "1", None, [1], 1j, object()])
def test_what_is_no_number_is_refused(value):
    assert not Limit(0).holds(value) and not Limit(0, whole=True).holds(value)


def test_mixing_without_a_distribution_is_refused():
    TrainConfig(mixup=1e-6, cutmix=0.0).checked()
    with pytest.raises(UserError, match="cutmix must be 0 or at least 1e-06; got 5e-324"):
        TrainConfig(cutmix=5e-324).checked()


@pytest.mark.parametrize("name", ["kd_temperature", "warmup_lr", "align_weight"])
@pytest.mark.parametrize("value", [10**20, 1e10, 1e300])
def test_a_number_that_float32_cannot_multiply_is_refused(name, value):
    with pytest.raises(UserError, match=f"{name} must be a number in .0, 1e.09.; got"):
        TrainConfig(**{name: value}).checked()


@pytest.mark.parametrize(("limit", "text"), [
    (Limit(0, above=True), "a number above 0"), (Limit(0), "a number of at least 0"),
    (Limit(0, 1, below=True), "a fraction in [0, 1), like 0.5 or 50%"),
    (Limit(0, 100), "a number in [0, 100]"), (TRAINING["steps"], "a whole number of at least 1"),
    (TRAINING["workers"], "a whole number from 0 to 1024")])
def test_the_line_says_what_would_do(limit, text):
    assert str(limit) == text


def test_clipping_is_off_at_zero_and_none():
    """As in timm. A norm of zero would stop every weight."""
    parse = build_parser().parse_args
    for text in ("0", "0.0", "none", "None"):
        assert TrainConfig(clip_grad=parse(["train", f"--clip-grad={text}"]).clip_grad).clip_grad \
            is None
    assert TrainConfig(clip_grad=0).identity() == TrainConfig(clip_grad=None).identity()


@pytest.mark.parametrize(("changes", "says"), [
    ({"opt": "foo"}, "opt 'foo' cannot train"), ({"opt": "adahessian"}, "opt 'adahessian'"),
    ({"opt": 3}, "opt must be a word"), ({"sched": "foo"}, "sched 'foo' cannot run"),
    ({"sched": "plateau"}, "sched 'plateau'"), ({"sched": "none"}, "sched 'none'"),
    ({"amp": "no"}, "amp must be True or False"), ({"kd": ["soft"]}, "unknown kd"),
    ({"tau_per": "step"}, "unknown tau_per"), ({"align_blocks": 3}, "align_blocks must be"),
    ({"align_blocks": ("1",)}, "align_blocks must be"), ({"steps": True}, "steps must be")])
def test_other_settings_are_judged_before_the_run(changes, says):
    with pytest.raises(UserError, match=says):
        TrainConfig.preset("adacomcat", **changes)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly", "constant"])
def test_the_schedules_of_timm_serve(sched):
    assert TrainConfig(sched=sched, warmup_epochs=1.5).checked().sched == sched
