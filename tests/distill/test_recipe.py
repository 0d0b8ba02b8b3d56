"""What the settings of the published recipe do, one by one, against timm and plain PyTorch."""

import copy
import signal

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.pictures import RGB_32, write_pictures
from helpers.runs import make_model, make_sets, small_config, small_run
from timm.data import create_transform
from timm.layers import DropPath
from torch import nn

from adacomcat import data, train
from adacomcat.data import Batches, PictureAugmentation, TensorImages
from adacomcat.data.folder import open_picture
from adacomcat.distill import trainer
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.objective import BatchMixing, Objective
from adacomcat.distill.start import set_drop_path_
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes

MIXED = {"mixup": 0.8, "cutmix": 0.0, "smoothing": 0.0}


def mixed(world_size=1, **changes):
    """(images, mixed images, probabilities) of eight constant images 0 … 7 with labels 0 … 7."""
    config = TrainConfig(batch_size=8, **MIXED | changes).checked()
    images = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 16, 16)
    model = make_model()
    mixing = BatchMixing(config, model, Processes(0, world_size))
    return images, *mixing.mix(images, torch.arange(8), (1, 2))


def shares(targets):
    """The largest probability of each image."""
    return targets.max(1).values


def test_mixup_prob_leaves_batches_as_they_are():
    images, same, targets = mixed(mixup_prob=0.0)
    assert torch.equal(images, same)
    assert torch.equal(targets, F.one_hot(torch.arange(8), 10).float())
    assert not torch.equal(*mixed()[:2])


def test_mixup_switch_prob_chooses_between_the_two():
    """Mixup of constant images is constant, CutMix has two values."""
    constant = [len(mixed(cutmix=1.0, mixup_switch_prob=p)[1][0].unique()) == 1 for p in (0.0, 1.0)]
    assert constant == [True, False]


def test_cutmix_minmax_bounds_the_box():
    _, images, targets = mixed(mixup=0.0, cutmix_minmax=(0.45, 0.5))
    cut = (images != images[:, :, :1, :1]).float().mean((1, 2, 3))
    assert ((7 / 16) ** 2 <= cut).all() and (cut <= 0.25).all()  # whole pixels of 16
    torch.testing.assert_close(shares(targets), 1 - cut)


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.5, 0.5), (0.2, 0.21)])
def test_shares_without_a_box_are_refused(shares):
    with pytest.raises(UserError, match="leaves no side of a box in images of 16 x 16 pixels"):
        mixed(mixup=0.0, cutmix_minmax=shares)


def test_mixup_mode_elem_mixes_every_image_by_itself():
    assert len(shares(mixed(mixup_mode="batch")[2]).unique()) == 1
    assert len(shares(mixed(mixup_mode="elem")[2]).unique()) > 2


def test_modes_of_one_process_are_refused_on_several():
    with pytest.raises(UserError, match="mixup_mode elem draws for the images of one process"):
        mixed(2, mixup_mode="elem")


def loss_of(config, targets, logits=None):
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)) \
        if logits is None else logits

    class Fixed(nn.Module):
        def forward(self, images):
            return logits

    return Objective(config, Fixed(), None).loss(torch.zeros(4, 1), targets, 1, torch.Generator())


def test_bce_counts_the_classes_of_an_image_alike():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(bce_loss=True, smoothing=0.0, kd="none", align="none").checked()
    labels = torch.tensor([1, 2, 3, 4])
    present = F.one_hot(labels, 10).double()

    def exact(present):
        p = logits.double().sigmoid()
        return -(present * p.log() + (1 - present) * (1 - p).log()).mean()

    torch.testing.assert_close(loss_of(config, labels).double(), exact(present))
    both = 0.3 * present + 0.7 * F.one_hot(labels + 1, 10)
    torch.testing.assert_close(loss_of(config, both.float()).double(), exact((both > 0).double()))


def test_the_optimiser_gets_its_settings(monkeypatch):
    made = []
    real = trainer.create_optimizer_v2
    monkeypatch.setattr(trainer, "create_optimizer_v2",
                        lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    small_run(keep_params=None, epochs=1, steps=1, opt_betas=(0.5, 0.6), opt_eps=1e-3)
    small_run(keep_params=None, epochs=1, steps=1, opt="sgd", momentum=0.3)
    groups = [optimizer.param_groups[0] for optimizer in made]
    assert groups[0]["betas"] == (0.5, 0.6) and groups[0]["eps"] == 1e-3
    assert groups[1]["momentum"] == 0.3


def test_an_optimiser_that_lacks_a_setting_is_named():
    with pytest.raises(UserError, match="opt 'lamb' cannot train here"):
        TrainConfig(opt="lamb", opt_betas=(0.9, 0.99, 0.999)).checked()


def rates(model):
    return [getattr(block, name).drop_prob if isinstance(getattr(block, name), DropPath) else 0.0
            for block in model.blocks for name in ("drop_path1", "drop_path2")]


def test_drop_path_is_timms():
    made = timm.create_model("vit_tiny_patch16_224", depth=4, drop_path_rate=0.3)
    ours = set_drop_path_(timm.create_model("vit_tiny_patch16_224", depth=4), 0.3)
    assert rates(ours) == rates(made) and max(rates(ours)) == pytest.approx(0.3)
    assert max(rates(set_drop_path_(ours, None))) == pytest.approx(0.3)
    assert max(rates(set_drop_path_(ours, 0.0))) == 0


@pytest.mark.parametrize("keep", [None, 0.4])
def test_a_run_drops_paths_of_the_student_alone(keep, monkeypatch):
    seen = {}
    monkeypatch.setattr(trainer.Trainer, "train", lambda self, *args: seen.update(
        student=rates(self.student), teacher=self.objective.teacher))
    monkeypatch.setattr(train, "_results", lambda *args: {})
    small_run(keep_params=keep, drop_path=0.2, epochs=1)
    assert max(seen["student"]) == pytest.approx(0.2)
    assert seen["teacher"] is None or max(rates(seen["teacher"])) == 0


def test_repeated_augmentation_shows_an_image_several_times_in_a_row():
    """Each time with another augmentation, and so many images fewer in an epoch."""
    train_set, _ = make_sets(make_model())
    labels, images = [], []
    for batch, found in Batches(train_set, 60, shuffle=True, seed=1, epoch=1, augment=True,
                                repeats=3):
        images.append(batch)
        labels.append(found)
    shown = torch.cat(images).unflatten(0, (-1, 3))
    assert (torch.cat(labels).view(-1, 3) == torch.cat(labels).view(-1, 3)[:, :1]).all()
    changed = (shown[:, 0] != shown[:, 1]).flatten(1).any(1).float().mean()
    assert 0.1 < changed < 1  # a quarter is erased somewhere, and digits are not mirrored


def test_repeats_reach_the_training(monkeypatch):
    seen = []
    real = trainer.Batches
    monkeypatch.setattr(trainer, "Batches",
                        lambda *args, **kwargs: seen.append(kwargs) or real(*args, **kwargs))
    small_run(keep_params=None, epochs=1, steps=1, repeated_aug=3)
    assert seen[0]["repeats"] == 3


AUGMENTED = {"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "reprob": 1.0, "remode": "pixel",
             "recount": 2, "train_interpolation": "bilinear"}


def seeded(transform, picture):
    import random
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return transform(picture)


def test_pictures_are_augmented_as_by_timm(tmp_path):
    write_pictures(tmp_path / "pictures", 2, seed=0)
    plain = data.pictures_under(tmp_path / "pictures", RGB_32)
    settings = PictureAugmentation(**AUGMENTED)
    found = plain.augmented_by(settings)
    expected = create_transform(
        (3, 32, 32), is_training=True, mean=RGB_32["mean"], std=RGB_32["std"],
        auto_augment=AUGMENTED["aa"], color_jitter=0.3, interpolation="bilinear", re_prob=1.0,
        re_mode="pixel", re_count=2)
    picture = open_picture(plain.samples[0][0], plain.image_format)
    assert torch.equal(found[0, 7][0], seeded(expected, picture))
    assert not torch.equal(found[0, 7][0], plain[0, 7][0])
    assert torch.equal(found[0][0], plain[0][0])  # pictures that judge stay as they are
    assert found.subset(torch.tensor([1])).augmentation == settings


@pytest.mark.parametrize("change", AUGMENTED)
def test_every_setting_of_pictures_changes_them(change, tmp_path):
    """Erasing and jitter are seen one by one: ``aa`` leaves the jitter out."""
    write_pictures(tmp_path / "pictures", 1, seed=0)
    base = {"reprob": 1.0, "remode": "const"} if change in ("remode", "recount") else {}
    plain = data.pictures_under(tmp_path / "pictures", RGB_32).augmented_by(
        PictureAugmentation(**base))
    other = plain.augmented_by(PictureAugmentation(**base | {change: AUGMENTED[change]}))
    assert any(not torch.equal(plain[0, seed][0], other[0, seed][0]) for seed in range(4))


def test_a_run_augments_its_pictures(monkeypatch):
    seen = []
    monkeypatch.setattr(TensorImages, "augmented_by",
                        lambda self, settings: seen.append(settings) or self)
    small_run(keep_params=None, epochs=0, **AUGMENTED)
    assert seen == [PictureAugmentation(**AUGMENTED)]


# Half precision


def scale_after(scaled: float, **changes) -> tuple[dict, list]:
    """(state of the scaler, weights) after one step whose loss is multiplied by ``scaled``."""
    model = make_model()
    config = small_config(keep_params=None, epochs=1, steps=1, amp=True, ema_decay=None, mixup=0.0,
                          align="none", kd="none", **changes)
    run = trainer.Trainer(model, config, make_sets(model)[0], Processes())
    real = run.objective.loss
    run.objective.loss = lambda *args: scaled * real(*args)
    run.train()
    return run.scaler.state_dict(), [p.detach().clone() for p in model.parameters()]


def test_float16_scales_the_loss_and_leaves_out_a_step_that_overflows():
    before = list(make_model().parameters())
    state, weights = scale_after(1.0, amp_dtype="float16")
    assert state["scale"] == 65536 and not torch.equal(weights[0], before[0])
    state, weights = scale_after(1e36, amp_dtype="float16")
    assert state["scale"] == 32768
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert scale_after(1.0)[0] == {}  # bfloat16 needs none


def stopping_after(*where):
    """A patch of the trainer that is asked to stop after a step of an epoch."""
    patch = pytest.MonkeyPatch()
    real, position = trainer.Trainer._after_step, []

    def after(self):
        position[:] = [self.epoch, self.step]
        real(self)

    patch.setattr(trainer.Trainer, "_after_step", after)
    patch.setattr(trainer, "asked_to_stop",
                  lambda: signal.SIGTERM if position == [*where] else None)
    return patch


def test_the_scale_goes_on_in_a_resumed_run(tmp_path):
    settings = {"keep_params": None, "epochs": 2, "steps": 3, "amp": True, "amp_dtype": "float16"}
    whole = small_run(**settings)
    model, config = make_model(), small_config(**settings, state_dir=str(tmp_path / "state"))
    patch = stopping_after(1, 2)
    with pytest.raises(trainer.Stopped):
        train.run(copy.deepcopy(model), config, *make_sets(model))
    patch.undo()
    again = train.run(model, config.with_(resume=True), *make_sets(model))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_the_best_epoch_outlives_an_interruption(tmp_path, monkeypatch):
    """The last epoch is worse, and is not told as the best by a run that began after it."""
    measured = []
    monkeypatch.setattr(trainer, "evaluate", lambda *args: {
        "top1": measured.append(0) or [50.0, 80.0, 60.0][len(measured) - 1], "loss": 1.0})
    settings = {"keep_params": None, "epochs": 3, "steps": 3, "ema_decay": None}
    model, config = make_model(), small_config(**settings, state_dir=str(tmp_path / "state"))
    told = []
    patch = stopping_after(3, 1)
    with pytest.raises(trainer.Stopped):
        train.run(copy.deepcopy(model), config, *make_sets(model), on_best=told.append)
    patch.undo()
    monkeypatch.setattr(train, "evaluate", lambda *args: {"top1": 60.0, "loss": 1.0})
    again = train.run(model, config.with_(resume=True), *make_sets(model), on_best=told.append)
    assert again.results["best"] == {"epoch": 2, "top1": 80.0} and len(told) == 2


# Students with a distillation token


def test_the_distillation_token_learns_from_the_teacher():
    torch.manual_seed(0)
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4,
                                in_chans=1, embed_dim=48, depth=2, num_heads=2, num_classes=10)
    teacher = make_model().eval()
    config = TrainConfig(kd="hard", kd_alpha=0.3, align="none", smoothing=0.0).checked()
    objective = Objective(config, student.train(), teacher)
    images, labels = torch.randn(4, 1, 16, 16), torch.arange(4)
    found = objective.loss(images, labels, 1, torch.Generator())
    features = student.forward_features(images)
    ce = F.cross_entropy(student.head(features[:, 0]), labels)
    kd = F.cross_entropy(student.head_dist(features[:, 1]), teacher(images).argmax(-1))
    torch.testing.assert_close(found, 0.7 * ce + 0.3 * kd)
    assert isinstance(student.eval()(images), torch.Tensor)


def test_a_distilled_student_is_searched_and_trained():
    torch.manual_seed(0)
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=16, patch_size=4,
                                in_chans=1, embed_dim=48, depth=2, num_heads=2, num_classes=10)
    config = small_config(epochs=2, steps=2, align="none")
    found = train.run(student, config, *make_sets(student), teacher=make_model())
    assert found.results["keep"] <= 0.4
    assert isinstance(found.model.train()(torch.randn(2, 1, 16, 16)), torch.Tensor)


def test_rank_multiple_is_the_step_of_ranks():
    multiples = {}
    for multiple in (2, 8):
        plan = small_run(epochs=1, steps=1, mlp="ranks", keep_params=0.8,
                         rank_multiple=multiple).results["plan"]
        multiples[multiple] = {rank for rank in plan.values() if rank != "dense"}
    assert all(rank % 8 == 0 or rank == 24 for rank in multiples[8])  # 24 is a whole head
    assert any(rank % 8 for rank in multiples[2])
