"""Whole commands and training runs on inputs that are partly strange."""

import warnings

import pytest
import torch
from helpers.command_line import ARCHITECTURE
from helpers.fuzzing import NUMBERS, WORDS, accepted, command, fuzzed
from helpers.models import dense_model
from hypothesis import given
from hypothesis import strategies as st

from adacomcat import data, train
from adacomcat.distill.config import TrainConfig

MODEL = ["-m", ARCHITECTURE, "--img-size", "16", "--in-chans", "1", "--num-classes", "10",
         "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=2"]
ARGUMENTS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
             "init_values", "global_pool", "class_token", "pos_embed", "drop_rate", "norm_layer",
             "act_layer", "dynamic_img_size", "features_only", "checkpoint_path", "pretrained_cfg",
             "cache_dir",
             "weight_init", "fc_norm", "reg_tokens", "x")


def is_quick(word: str) -> bool:
    """No width or depth that this machine has the memory for, and that takes long to fill."""
    return "\0" not in word and not (word.isdecimal() and 100 < int(word[:20]) < 10**8)


# Widths and depths that are taken when they can be made, without hours of work.
SMALL = st.one_of(st.integers(-3, 40).map(str), WORDS.filter(is_quick),
                  st.lists(st.integers(-1, 20), max_size=3).map(str))


@fuzzed(2)
@given(changes=st.dictionaries(st.sampled_from(ARGUMENTS), SMALL, min_size=1, max_size=2))
def test_arguments_of_models(changes, capsys):
    command(capsys, "inspect", *MODEL, *(f"{name}={value}" for name, value in changes.items()))


@pytest.fixture(scope="module")
def pair():
    model = dense_model(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=2,
                        num_classes=10)
    images, _ = data.train_and_test("digits", None, data.model_data_config(model))
    return model, images.subset(torch.arange(32))


MODERATE = st.one_of(NUMBERS, st.floats(0, 1), st.floats(0, 0.1))
SETTINGS = {
    "lr": MODERATE, "weight_decay": MODERATE, "clip_grad": st.one_of(st.none(), MODERATE),
    "mixup": MODERATE, "cutmix": MODERATE, "smoothing": MODERATE, "kd_alpha": MODERATE,
    "kd_temperature": MODERATE, "align_weight": MODERATE, "warmup_epochs": MODERATE,
    "warmup_lr": MODERATE, "min_lr": MODERATE, "ema_decay": st.one_of(st.none(), MODERATE),
    "seed": NUMBERS, "kd": st.sampled_from(("soft", "hard", "none", "x", 3)),
    "align": st.sampled_from(("mse", "manifold", "none", None)),
    "opt": st.sampled_from(("adamw", "sgd", "lion", "lamb", "adafactor", "muon", "x", "", None)),
    "sched": st.sampled_from(("cosine", "tanh", "step", "poly", "plateau", "none", "x", 3)),
    "augment": st.sampled_from((True, False, "x")), "steps": st.sampled_from((1, 2, 0, None, "1")),
    "batch_size": st.sampled_from((16, 8, 3, 0, 10**20, 1.5)),
    "opt_betas": st.sampled_from((None, (0.9, 0.99), [0.0, 0.5], (0.9,), (2, 3), "x")),
    "opt_eps": st.one_of(st.none(), MODERATE), "momentum": MODERATE, "mixup_prob": MODERATE,
    "mixup_switch_prob": MODERATE, "mixup_mode": st.sampled_from(("batch", "pair", "elem", 3)),
    "cutmix_minmax": st.sampled_from((None, (0.2, 0.8), (0.8, 0.2), (0.1, 0.11), (0, 0), "x")),
    "drop_path": st.one_of(st.none(), MODERATE), "bce_loss": st.sampled_from((True, False, "x")),
    "repeated_aug": st.sampled_from((1, 3, 0, 10**6)), "lr_base": st.sampled_from((None, 0, 512)),
    "amp": st.booleans(), "amp_dtype": st.sampled_from(("bfloat16", "float16", "int8")),
}


@fuzzed(1.5)
@given(changes=st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: SETTINGS[name] for name in names})))
def test_a_setting_that_is_taken_trains(changes, pair):
    """Without a fault: weights stay finite, or the run says that they did not."""
    model, images = pair

    def run():
        config = TrainConfig(**{"epochs": 1, "steps": 1, "batch_size": 16} | changes).checked()
        return train.run(model, config, images, images, teacher=model).model

    trained = accepted(run)
    assert trained is None or all(p.isfinite().all() for p in trained.parameters())


@fuzzed(0.5)
@given(flags=st.lists(st.sampled_from((
    "--keep-params=0.9", "--keep-params=0.01", "--keep-macs=0.9", "--rank-multiple=3",
    "--rank-multiple=1000000000", "--seed=9223372036854775807", "--calibration-images=2",
    "--refine=1", "--data=digits", "--data=/nowhere", "--data=/dev/null",
    "--calibration-dir=/proc/1", "--plan=/dev/null", "--checkpoint=/dev/null",
    "--checkpoint=/etc/hostname", "--device=meta",
    "--device=cuda:99", "--gauge", "--num-classes=0", "--no-report")), max_size=4))
def test_compressions(flags, capsys, tmp_path_factory):
    place = tmp_path_factory.mktemp("out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command(capsys, "compress", *MODEL[:-1], "num_heads=2", *flags, "-o", str(place / "m"))
