"""Recovery without labels: the loss, what it reaches, when it ends, the command."""

import itertools
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import adacomcat
from adacomcat import cli
from adacomcat.distill import recovery
from adacomcat.distill.losses import relative_error
from adacomcat.distill.recovery import RecoveryConfig, feature_error, recover
from adacomcat.errors import UserError

SIZES = {"img_size": 32, "num_classes": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}


def dense():
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def pictures(count=32):
    """Smooth random pictures: noise teaches nothing that carries over."""
    coarse = torch.randn(count, 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")


@pytest.fixture
def pair():
    teacher = dense()
    return adacomcat.compress(teacher, keep_params=0.5), teacher


def test_relative_error_against_numpy():
    teacher, student = torch.randn(3, 5, 8), torch.randn(3, 5, 8).bfloat16()
    t = teacher.double().reshape(15, 8).numpy()
    s = student.double().reshape(15, 8).numpy()
    expected = ((s - t) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert relative_error(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert relative_error(teacher, teacher) == 0
    mean = teacher.mean((0, 1)).expand_as(teacher)
    assert relative_error(mean, teacher).item() == pytest.approx(1, rel=1e-5)


def test_recovers_on_pictures_it_has_not_seen(pair):
    student, teacher = pair
    unseen = pictures(64)
    before, weights = feature_error(student, teacher, unseen), student.state_dict()
    kept = {name: value.clone() for name, value in weights.items()}
    found = recover(student, teacher, [pictures(16) for _ in range(20)],
                    RecoveryConfig(steps=60, lr=1e-3))
    assert feature_error(found, teacher, unseen) < 0.6 * before
    assert found.rank_plan.ranks == student.rank_plan.ranks and not found.training
    assert all(torch.equal(kept[name], value) for name, value in student.state_dict().items())
    moved = {name for name, value in found.state_dict().items()
             if not torch.equal(kept[name], value)}
    matrices = {name for name, parameter in found.named_parameters() if parameter.ndim == 2}
    assert moved == matrices and all(p.requires_grad for p in found.parameters())
    assert not any(len(block._forward_hooks) for block in found.blocks)


def test_labels_are_left_aside_and_runs_repeat(pair):
    batches = [pictures(8) for _ in range(3)]
    labelled = [(images, torch.zeros(8)) for images in batches]
    first, second = (recover(*pair, given, RecoveryConfig(steps=5)).state_dict()
                     for given in (batches, labelled))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_average_of_the_weights_is_kept(pair):
    batches = [pictures(8)]
    plain = recover(*pair, batches, RecoveryConfig(steps=4)).state_dict()
    averaged = recover(*pair, batches, RecoveryConfig(steps=4, ema_decay=0.9)).state_dict()
    start = pair[0].state_dict()
    moved = {name: ((averaged[name] - start[name]).norm(), (plain[name] - start[name]).norm())
             for name in start}
    assert any(0 < less < more for less, more in moved.values())


def test_every_block_and_output_counts(pair):
    student, teacher = pair
    images = pictures(4)
    job = recovery._Recovery(student, teacher, RecoveryConfig(block_weight=0.3))
    with torch.no_grad():
        loss = job._loss(images)
        streams = []
        for model in (student, teacher):
            stream, outputs = model._pos_embed(model.patch_embed(images)), []
            for block in model.blocks:
                stream = block(stream)
                outputs.append(stream)
            streams.append((outputs, model.norm(stream), model(images)))
    (ours, tokens, logits), (theirs, wanted, labels) = streams
    expected = relative_error(tokens, wanted)
    expected += (logits - labels).square().sum() / labels.square().sum()
    expected += 0.3 * sum(map(relative_error, ours, theirs)) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_minutes_end_it_and_steer_the_learning_rate(pair, monkeypatch):
    clock = itertools.count(step=6.0)  # seconds between two looks at it
    monkeypatch.setattr(recovery.time, "perf_counter", lambda: float(next(clock)))
    rates = []
    step = recovery._Recovery._step

    def watched(self, images, index):
        rates.append(self.optimizer.param_groups[0]["lr"])
        step(self, images, index)
    monkeypatch.setattr(recovery._Recovery, "_step", watched)
    recover(*pair, [pictures(2)], RecoveryConfig(minutes=2.0, lr=1e-3))
    assert len(rates) == 19  # looks at 6, 12 … 114 s; 120 s is the end
    assert max(rates) == pytest.approx(1e-3, rel=0.02)
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] < 5e-5


@pytest.mark.parametrize("batches, message", [
    ([], "no images"), (iter([torch.zeros(2, 3, 32, 32)]), "gone through again")])
def test_batches_that_end(pair, batches, message):
    with pytest.raises(UserError, match=message):
        recover(*pair, batches, RecoveryConfig(steps=3))


@pytest.mark.parametrize("changes", [{"minutes": 0.0}, {"steps": -1}])
def test_no_time(pair, changes):
    with pytest.raises(UserError):
        recover(*pair, [pictures(2)], RecoveryConfig(**changes))


def test_command(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, picture in enumerate(pictures(10)):
        pixels = picture.sub(picture.amin()).div(picture.amax() - picture.amin()).mul(255)
        image = np.asarray(pixels.permute(1, 2, 0), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{index}.png")
    teacher = dense()
    save_file(teacher.state_dict(), tmp_path / "dense.safetensors")
    model = ["vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "7", "--model-kwargs",
             "embed_dim=48", "depth=3", "num_heads=3"]
    weights = ["--checkpoint", str(tmp_path / "dense.safetensors")]
    assert cli.main(["compress", "-m", *model, *weights, "--keep-params", "0.5",
                     "--calibration-dir", str(folder), "-o", str(tmp_path / "small")]) == 0
    adacomcat.save(teacher, tmp_path / "teacher")
    capsys.readouterr()
    command = ["recover", "-m", str(tmp_path / "small"), "--images", str(folder), "--steps", "4",
               "-b", "4", "-o", str(tmp_path / "recovered"), "--json"]
    assert cli.main([*command, "--teacher", str(tmp_path / "teacher")]) == 0
    found = json.loads(capsys.readouterr().out)
    recovered = adacomcat.load(tmp_path / "recovered")
    assert recovered.rank_plan.ranks == adacomcat.load(tmp_path / "small").rank_plan.ranks
    images = adacomcat.data.image_tensor_files(
        folder, adacomcat.data.model_data_config(recovered))
    after = feature_error(recovered, teacher, images)
    assert found["error_after"] == pytest.approx(after, rel=1e-4)
    assert found["images"] == 10

    assert cli.main([*command, "--teacher", str(tmp_path / "nowhere")]) == 2
    assert cli.main([*command[:3], *command[5:], "--teacher", str(tmp_path / "teacher")]) == 2
