"""The flags of `train`: each sets its field of TrainConfig, over what the preset has."""

from dataclasses import fields

import pytest
import timm
import torch
from helpers.command_line import GRAY, MODEL
from helpers.pictures import write_pictures

import adacomcat
from adacomcat import data
from adacomcat.cli.arguments import build_parser
from adacomcat.cli.commands import inputs, train
from adacomcat.cli.main import parse
from adacomcat.distill.config import TrainConfig
from adacomcat.errors import UserError
from adacomcat.utils.presets import PRESETS

MINIMAL = ["train", "-m", "x", "--data", "pictures", "--keep-params", "0.5", "-o", "out"]
# Words of the command line → what they make of TrainConfig.
SET = {
    "--aa rand-m9-mstd0.5-inc1": {"aa": "rand-m9-mstd0.5-inc1"},
    "--color-jitter 0.3": {"color_jitter": 0.3}, "--reprob 0.25": {"reprob": 0.25},
    "--remode pixel": {"remode": "pixel"}, "--recount 2": {"recount": 2},
    "--train-interpolation random": {"train_interpolation": "random"},
    "--repeated-aug 3": {"repeated_aug": 3}, "--grad-accum-steps 2": {"grad_accum_steps": 2},
    "--no-augment": {"augment": False},
    "--mixup-prob 0.5": {"mixup_prob": 0.5}, "--mixup-switch-prob 0.1": {"mixup_switch_prob": 0.1},
    "--mixup-mode elem": {"mixup_mode": "elem"},
    "--cutmix-minmax 0.2 0.8": {"cutmix_minmax": (0.2, 0.8)},
    "--bce-loss --smoothing 0": {"bce_loss": True, "smoothing": 0.0},
    "--opt-eps 1e-7": {"opt_eps": 1e-7}, "--opt-betas 0.8 0.99": {"opt_betas": (0.8, 0.99)},
    "--opt sgd --momentum 0.8": {"opt": "sgd", "momentum": 0.8},
    "--clip-grad none": {"clip_grad": None}, "--clip-grad 0": {"clip_grad": None},
    "--lr-base 512": {"lr_base": 512}, "--lr-base none": {"lr_base": None},
    "--sched-per epoch": {"sched_per": "epoch"}, "--drop-path 0.1": {"drop_path": 0.1},
    "--amp --amp-dtype float16": {"amp": True, "amp_dtype": "float16"},
    "--search-batch-size 64": {"search_batch_size": 64}, "--search-beta 2": {"beta": 2.0},
    "--search-steps all": {"search_steps": None},
    "--search-images validation": {"search_images": "validation"},
    "--rank-multiple 4": {"rank_multiple": 4}, "--kd-reduction mean": {"kd_reduction": "mean"},
    "--align comcat": {"align": "comcat"},
    "--no-attention-biases": {"finetune_attention_biases": False},
    "--model-ema": {"ema_decay": train.EMA_DECAY}, "--model-ema-decay 0.9": {"ema_decay": 0.9},
}


def image_folder(root, test: str = "val"):
    """Two classes of noise in ImageNet's layout; the test part has this name."""
    for part in ("train", test):
        for label in range(2):
            write_pictures(root / part / f"class{label}", 3, seed=10 * label + (part == "train"))
    return root


def config_of(*words: str) -> TrainConfig:
    return train._config(parse([*MINIMAL, *words]), "state")


@pytest.mark.parametrize("words", SET)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_flag_wins_over_the_preset(words, preset):
    found = config_of("--preset", preset, *words.split())
    plain = TrainConfig.preset(preset, keep_params=0.5, state_dir="state")
    assert found == plain.with_(**SET[words])
    if preset == "adacomcat" and not words.startswith(("--clip-grad 0", "--lr-base none")):
        assert found != plain or words == "--no-attention-biases"


def test_aa_of_a_preset_can_be_left_out():
    assert config_of("--preset", "comcat").aa == "rand-m9-mstd0.5-inc1"
    assert config_of("--preset", "comcat", "--aa", "none").aa is None


def test_help_lists_what_the_presets_set(run):
    code, out, _ = run("train", "--help")
    assert code == 0
    told = " ".join(out.split())
    for name, value in PRESETS["comcat"].items():
        assert f"{name} {value}" in told
    assert "adaptive-comcat sets the same with search adaptive" in told


def test_every_preset_is_made_of_settings():
    known = {field.name for field in fields(TrainConfig)}
    assert all(settings.keys() <= known for settings in PRESETS.values())


@pytest.mark.parametrize("flag", ["--aa=v0", "--reprob=0.1", "--color-jitter=0.1",
                                  "--train-interpolation=random"])
def test_arrays_take_no_augmentation_of_pictures(flag, tmp_path, run):
    code, _, err = run("train", *GRAY, "--data", "digits", "--dense", flag, "-o", tmp_path / "out")
    assert code == 2 and f"leave out {flag.partition('=')[0]}" in err


def test_a_wrong_augmentation_is_one_line(tmp_path, run):
    folder = image_folder(tmp_path / "data")
    code, _, err = run("train", *MODEL, "--num-classes", "2", "--data", folder, "--dense",
                       "--aa", "dreams", "-b", "2", "-o", tmp_path / "out")
    assert code == 2 and "timm cannot augment by" in err and err.count("error") == 1


@pytest.mark.parametrize(("words", "says"), [
    ("--bce-loss", "give smoothing 0"), ("--opt-betas 0.9", "2 to 3 numbers"),
    ("--cutmix-minmax 0.9 1.5", "must be"), ("--momentum 1", "must be"),
    ("--amp-dtype int8", "invalid choice"), ("--search-steps some", "must be")])
def test_wrong_values_are_named(words, says):
    with pytest.raises(UserError, match=says):
        config_of(*words.split())


def arguments(tmp_path, *words):
    return build_parser().parse_args(["evaluate", *MODEL, "--data-dir", str(tmp_path), *words])


def test_datasets_of_timm_by_their_names(tmp_path):
    """torchvision's ImageFolder through timm's create_dataset."""
    image_folder(tmp_path, "held")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    args = arguments(tmp_path, "--data", "torch/image_folder", "--val-split", "held")
    train_set, test_set = inputs.train_and_test(args, model)
    folder = data.train_and_test("folder", image_folder(tmp_path / "plain"),
                                 data.model_data_config(model))
    for named, plain in zip((train_set, test_set), folder, strict=True):
        assert len(named) == len(plain) > 0
        for (image, label), (expected, known) in zip(named, plain, strict=True):
            torch.testing.assert_close(image, expected)
            assert label == known


def test_datasets_of_hugging_face(tmp_path, monkeypatch):
    """A folder of pictures through the datasets library, by timm's reader 'hfds'."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = image_folder(tmp_path / "pictures")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    args = arguments(tmp_path, "--data", f"hfds/{root}")
    found = inputs.train_and_test(args, model)
    folder = data.train_and_test("folder", root, data.model_data_config(model))
    for named, plain in zip(found, folder, strict=True):
        assert [label for _, label in named] == [label for _, label in plain] != []
        order = sorted(range(len(plain)), key=lambda i: plain[i][0].sum().item())
        for at, index in enumerate(sorted(range(len(named)),
                                          key=lambda i: named[i][0].sum().item())):
            torch.testing.assert_close(named[index][0], plain[order[at]][0])


def test_a_folder_with_such_a_name_is_a_folder(tmp_path, monkeypatch):
    image_folder(tmp_path / "torch/cifar10")
    monkeypatch.chdir(tmp_path)
    assert inputs.dataset(arguments(tmp_path, "--data", "torch/cifar10")) == (
        "folder", "torch/cifar10")


@pytest.mark.parametrize(("name", "says"), [
    ("wds/imagenet", "is a stream"), ("tfds/cifar10", "is a stream"),
    ("torch/no_such_set", "timm cannot make the part 'train'")])
def test_datasets_that_do_not_serve(name, says, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    with pytest.raises(UserError, match=says):
        inputs.train_and_test(arguments(tmp_path, "--data", name), model)


def test_a_download_is_asked_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data.named, "create_dataset",
                        lambda name, **kwargs: seen.append(kwargs) or [])
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    for words in ([], ["--dataset-download"]):
        inputs.train_and_test(arguments(tmp_path, "--data", "torch/cifar10", *words), model)
    assert [kwargs["download"] for kwargs in seen] == [False, False, True, True]


def test_crop_pct_shows_all_of_the_picture(tmp_path):
    """With 1 the shorter side becomes the model's, as the reference evaluates."""
    image_folder(tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=2)
    for words, share in (([], 0.9), (["--crop-pct", "1"], 1.0)):
        args = arguments(tmp_path, "--data", str(tmp_path), *words)
        _, test_set = inputs.train_and_test(args, model)
        assert test_set.image_format.crop_pct == share


def test_the_best_epoch_is_kept_beside_the_last(tmp_path, run_json, monkeypatch):
    """Its weights are those of the epoch that did best, not those of the end."""
    from adacomcat.distill import trainer

    measured = iter([50.0, 80.0, 60.0])
    monkeypatch.setattr(trainer, "evaluate",
                        lambda *args: {"top1": next(measured), "top5": 1.0, "loss": 1.0})
    weights = []
    real = trainer.Trainer.finished
    monkeypatch.setattr(trainer.Trainer, "finished",
                        lambda self: weights.append(real(self)) or weights[-1])
    found = run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 3, "--steps", 1,
                     "-b", 64, "--keep-best", "-o", tmp_path / "out")
    assert found["best"] == {"epoch": 2, "top1": 80.0}
    best, last = adacomcat.load(tmp_path / "out/best"), adacomcat.load(tmp_path / "out")
    assert len(weights) == 3  # epochs 1 and 2, and the end
    assert torch.equal(best.head.weight, weights[1].head.weight)
    assert not torch.equal(best.head.weight, last.head.weight)
    assert not (tmp_path / "out.state").exists()


def test_without_the_flag_no_best_is_kept(tmp_path, run_json):
    run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 1, "--steps", 1,
             "-b", 64, "-o", tmp_path / "out")
    assert not (tmp_path / "out/best").exists()


def test_evaluate_gives_top5(tmp_path, run_json):
    """Against the ranks of the right classes, sorted by hand."""
    torch.manual_seed(0)
    run_json("train", *GRAY, "--data", "digits", "--dense", "--epochs", 0, "-o", tmp_path / "m")
    found = run_json("evaluate", "-m", tmp_path / "m", "--data", "digits")
    model = adacomcat.load(tmp_path / "m").eval()
    _, test_set = data.train_and_test("digits", None, data.model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in test_set]))
    labels = torch.tensor([label for _, label in test_set])
    ahead = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found["top5"] == pytest.approx(100 * (ahead < 5).double().mean().item())
    assert found["top1"] == pytest.approx(100 * (ahead < 1).double().mean().item())
