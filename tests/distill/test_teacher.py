"""Which models can teach another: folders as they are, equal classes, images of one size."""

import pytest
import timm
import torch
from helpers.command_line import SMALL
from helpers.models import dense_model

import adacomcat
from adacomcat import data, train
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError

GRAY = {"img_size": 16, "in_chans": 1, "num_classes": 10, "patch_size": 8, **SMALL}
FLAGS = ["--img-size", "16", "--in-chans", "1", "--num-classes", "10", "--model-kwargs",
         *(f"{key}={GRAY[key]}" for key in ("patch_size", *SMALL))]
QUICK = ["--data", "digits", "--dense", "--epochs", "1", "--steps", "1", "-b", "32", "--no-report"]


def gray(**changes):
    return dense_model(**GRAY | changes)


@pytest.fixture
def trained(tmp_path, run):
    """(exit code, error line) of a short training with the teacher of this folder."""
    def call(teacher, *flags):
        adacomcat.save(teacher, tmp_path / "teacher")
        code, _, err = run("train", "-m", "vit_tiny_patch16_224", *FLAGS, *QUICK, "--teacher",
                           tmp_path / "teacher", "-o", tmp_path / "out", *flags)
        return code, err
    return call


def test_a_teacher_is_its_folder_whatever_the_flags_of_the_model(trained):
    code, err = trained(gray(embed_dim=96))
    assert code == 0 and err.count("their Gram matrices are aligned, as by manifold") == 1


def test_a_teacher_of_other_patches_teaches_by_its_outputs(trained):
    code, err = trained(gray(patch_size=4))
    assert code == 0 and err.count("no features are aligned") == 1


@pytest.mark.parametrize("architecture", ["resnet10t", "regnetx_002", "efficientnet_lite0",
                                          "crossvit_9_240"])
def test_teachers_of_every_kind(architecture, tmp_path, run):
    """Networks without blocks, with blocks of pixels, and with blocks of several branches."""
    size = 240 if "crossvit" in architecture else 32
    teacher = timm.create_model(architecture, num_classes=10, in_chans=1).eval()
    adacomcat.save(teacher, tmp_path / "teacher")
    flags = ["--img-size", str(size), "--in-chans", "1", "--num-classes", "10", "--model-kwargs",
             "patch_size=16", *(f"{key}={value}" for key, value in SMALL.items())]
    code, _, err = run("train", "-m", "vit_tiny_patch16_224", *flags, *QUICK, "--teacher",
                       tmp_path / "teacher", "-o", tmp_path / "out", "-b", "4")
    assert code == 0 and err.count("no features are aligned") == 1


def test_a_wider_teacher_is_aligned_by_gram_matrices(trained):
    code, err = trained(gray(embed_dim=96), "--align", "manifold")
    assert code == 0 and "aligned" not in err


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_classes": 37}, "outputs are [(37,)] and the model's [(10,)]"),
    ({"in_chans": 3}, "does not take the model's images of (1, 16, 16)"),
    ({"img_size": 32}, "does not take the model's images")])
def test_a_teacher_of_other_classes_or_images_is_refused(changes, says, trained, tmp_path):
    code, err = trained(gray(**changes))
    assert code == 2 and says in err and not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path, run):
    for command in ("train", "recover"):
        base = ["-m", "vit_tiny_patch16_224", *FLAGS, "--data", "digits", "-o", tmp_path / "out"]
        code, _, err = run(command, *base, "--teacher", "runs/typo",
                           *(["--dense"] if command == "train" else []))
        assert code == 2 and "there is no checkpoint folder runs/typo" in err


def test_a_teacher_in_python_is_judged_too():
    student = gray()
    images, _ = data.train_and_test("digits", None, data.model_data_config(student))
    config = TrainConfig(epochs=1, steps=1, batch_size=32)
    with pytest.raises(UserError, match="take a teacher of the same classes"):
        train.run(student, config, images, teacher=gray(num_classes=3))


@pytest.mark.parametrize(("changes", "says"), [
    ({"embed_dim": 96}, "classes and width"), ({"num_classes": 3}, "classes and width"),
    ({"depth": 3}, "3 blocks and the model 2")])
def test_recovery_needs_the_dense_model(changes, says):
    with pytest.raises(UserError, match=says):
        adacomcat.recover(gray(), gray(**changes), [torch.zeros(2, 1, 16, 16)],
                          adacomcat.RecoveryConfig(steps=1))


def test_both_keep_their_modes_and_random_numbers():
    student, teacher = gray().train(), gray()
    state = torch.get_rng_state()
    require_teacher(student, teacher)
    assert student.training and not teacher.training and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("architecture", ["resnet10t", "regnetx_002"])
def test_an_architecture_of_timm_teaches_whatever_the_students_arguments(architecture, tmp_path,
                                                                         run):
    """It has the model's classes and channels; the size and the arguments are a ViT's."""
    teacher = timm.create_model(architecture, num_classes=10, in_chans=1)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    code, _, err = run("train", "-m", "vit_tiny_patch16_224", *FLAGS, *QUICK, "--teacher",
                       architecture, "--teacher-checkpoint", tmp_path / "teacher.pth",
                       "-o", tmp_path / "out", "-b", "8")
    assert code == 0 and err.count("no features are aligned") == 1, err


def test_a_wider_architecture_has_arguments_of_its_own(tmp_path, run):
    wide = timm.create_model("vit_small_patch16_224", **GRAY | {"embed_dim": 96})
    torch.save(wide.state_dict(), tmp_path / "teacher.pth")
    code, _, err = run("train", "-m", "vit_tiny_patch16_224", *FLAGS, *QUICK, "--teacher",
                       "vit_small_patch16_224", "--teacher-checkpoint", tmp_path / "teacher.pth",
                       "--teacher-kwargs", "patch_size=8", "embed_dim=96", "depth=2",
                       "num_heads=2", "-o", tmp_path / "out")
    assert code == 0 and err.count("their Gram matrices are aligned") == 1, err
