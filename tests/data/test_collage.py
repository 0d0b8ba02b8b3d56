"""Scenes of blobs: what they are made of, that they repeat, where outlines are."""

import json
import math

import pytest
import torch
from helpers.memory import allocation_peak

from adacomcat import cli
from adacomcat.data import collage
from adacomcat.data.collage import collages, with_collages


def flat(values):
    """Images of one value each: every texture of them is that value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 2, 40, 30).clone()


def test_values_are_those_of_the_images_or_between():
    values = [-2.0, -0.5, 0.3, 1.7]
    scenes = collages(flat(values), 40)
    assert scenes.shape == (40, 2, 40, 30) and scenes.isfinite().all()
    nearest = (scenes[..., None] - torch.tensor(values)).abs().amin(-1)
    assert scenes.amin() >= -2 - 1e-5 and scenes.amax() <= 1.7 + 1e-5
    assert (nearest < 1e-5).float().mean() > 0.8  # the rest are soft outlines
    shown = {round(v, 3) for v in scenes.flatten().tolist()}
    assert set(values) <= shown
    mixed = [scene for scene in scenes if scene.std() > 0.1]
    assert len(mixed) > 20  # most show more than one image


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_and_repeatable(channels):
    images = torch.randn(5, channels, 24, 24)
    state = torch.get_rng_state()
    first, second, other = (collages(images, 3, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (3, channels, 24, 24) and first.dtype == images.dtype
    assert len({scene.sum().item() for scene in first}) == 3


def test_none_are_asked_for():
    assert collages(torch.randn(2, 3, 8, 8), 0).shape == (0, 3, 8, 8)


def test_colours_change_only_where_there_are_colours():
    grey = torch.rand(4, 1, 32, 32).expand(-1, 3, -1, -1)
    coloured = torch.stack([torch.rand(32, 32), torch.zeros(32, 32), torch.zeros(32, 32)])[None]
    turned = collages(coloured, 30)
    assert turned[:, 1:].abs().amax() > 0.2  # red became another hue
    assert (collages(grey, 30).diff(dim=1).abs() < 1e-4).all()


def test_blob_is_the_star_of_its_corners(monkeypatch):
    radii = torch.tensor([0.4, 1.0, 0.7, 0.5])
    monkeypatch.setattr(collage, "_integer", lambda low, high: len(radii))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.copy_(radii))
    side = 64
    mask = collage._blob(side, softness=1.0)
    for _ in range(300):
        i, j = (int(v) for v in torch.randint(0, side, (2,)))
        y, x = i - (side - 1) / 2, j - (side - 1) / 2
        turn = (math.atan2(y, x) / (2 * math.pi) + 0.5) * 4
        before = int(turn) % 4
        share = turn - int(turn)
        outline = (radii[before] * (1 - share) + radii[(before + 1) % 4] * share).item() * side / 2
        expected = min(max(outline - math.hypot(y, x) + 0.5, 0), 1)
        assert mask[i, j].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("top, left", [(-3, -2), (0, 0), (5, 7), (-3, 7)])
def test_what_sticks_out_is_cut_off(top, left):
    scene, texture = torch.zeros(2, 10, 12), torch.rand(2, 8, 8) + 1
    mask = torch.ones(8, 8)
    expected = torch.zeros(2, 10, 12)
    for i in range(8):
        for j in range(8):
            if 0 <= top + i < 10 and 0 <= left + j < 12:
                expected[:, top + i, left + j] = texture[:, i, j]
    collage._paste_(scene, texture, mask, top, left)
    torch.testing.assert_close(scene, expected)


def test_with_collages_keeps_every_image_and_mixes():
    images = torch.randn(30, 3, 16, 16)
    mixed = with_collages(images, 30)
    assert len(mixed) == 60 and with_collages(images, 0) is images
    given = {image.sum().item() for image in images}
    where = [image.sum().item() in given for image in mixed]
    assert sum(where) == 30 and 5 < sum(where[:30]) < 25


def test_command_counts_them(tmp_path, capsys):
    command = ["compress", "-m", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "10",
               "--model-kwargs", "embed_dim=48", "depth=2", "num_heads=2", "--keep-params", "0.7",
               "--data", "digits", "--calibration-images", "12", "--collages", "20", "--json"]
    assert cli.main([*command, "-o", str(tmp_path / "small")]) == 0
    assert json.loads(capsys.readouterr().out)["calibration_images"] == 32


def test_memory_is_that_of_the_scenes_and_not_of_all_images():
    """A step of recovery makes a few scenes of hundreds of images."""
    photos = torch.rand(200, 3, 32, 32)
    peak, _ = allocation_peak(lambda: collages(photos, 2))
    assert peak < photos.nbytes / 4
