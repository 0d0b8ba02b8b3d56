"""Every picture is seen as timm sees it: found, opened, resized, cropped and normalised alike."""

import struct
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from helpers.pictures import RGB_32, write_pictures
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor

from adacomcat import cli
from adacomcat.data import Batches, datasets, folder, image_tensor_files, pictures_under
from adacomcat.data.folder import ImageFormat, labelled_pictures, picture_files
from adacomcat.errors import UserError

EXACT = {"input_size": (3, 20, 20), "mean": (0.0,) * 3, "std": (1.0,) * 3}


def scene(width: int, height: int, channels: int = 3) -> np.ndarray:
    """Smooth stripes with a bright corner, so that crops and squashes of it differ."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 100 * np.sin(x / (5 + c) + y / (9 - c)) for c in range(channels)]
    pixels = np.stack(planes, -1)
    pixels[:height // 5, :width // 6] = 255
    return pixels.astype(np.uint8)


def distinct_configurations() -> list[dict]:
    """The data configurations of all tags of timm, each once."""
    found: dict[tuple, dict] = {}
    for name in timm.list_models(pretrained=True):
        config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
        found.setdefault(tuple(sorted((key, str(value)) for key, value in config.items())), config)
    return list(found.values())


def test_pixels_are_those_of_timm_for_every_configuration() -> None:
    configurations = distinct_configurations()
    assert len(configurations) > 100
    assert {config["crop_mode"] for config in configurations} == {"center", "squash", "border"}
    for config in configurations:
        config["input_size"] = (config["input_size"][0], *(max(16, side // 4) for side in
                                                           config["input_size"][1:]))
        ours = ImageFormat.from_config(config).transform()
        timms = create_transform(**config, is_training=False)
        for width, height in ((90, 50), (31, 120)):
            picture = Image.fromarray(scene(width, height))
            torch.testing.assert_close(ours(picture), timms(picture), rtol=0, atol=0)


def as_timm_reads(root: Path) -> list[tuple[Tensor, int]]:
    return list(create_dataset("", root=str(root), transform=create_transform(
        **EXACT, crop_pct=1.0, is_training=False)))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of timm's reader
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr",
                                  "palette with alpha"])
def test_every_kind_of_picture_is_opened_as_timm_does(tmp_path: Path, mode: str) -> None:
    (tmp_path / "cat").mkdir()
    picture = Image.fromarray(scene(24, 20))
    if mode == "palette with alpha":
        picture = picture.quantize(16)
        picture.info["transparency"] = bytes(range(0, 256, 16))
    else:
        picture = picture.convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(scene(24, 20, 1)[..., 0]))
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    picture.save(tmp_path / "cat" / f"0.{suffix}", **(
        {"transparency": picture.info["transparency"]} if mode.startswith("palette") else {}))
    [(expected, _)] = as_timm_reads(tmp_path)
    assert torch.equal(image_tensor_files(tmp_path, EXACT)[0], expected)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    """The test formats are asked for directly: extensions of folders are timm's."""
    grey = np.linspace(0, 65535, 400).round().astype(np.uint16).reshape(20, 20)
    path = tmp_path / f"0.{suffix}"
    Image.fromarray(grey).save(path)
    for channels in (1, 3):
        image_format = ImageFormat((channels, 20, 20), (0.0,) * channels, (1.0,) * channels)
        pixels = np.asarray(folder.open_picture(path, image_format)).reshape(20, 20, channels)
        for channel in range(channels):
            assert np.abs(pixels[..., channel] - grey / 65535 * 255).max() <= 1


def test_pixels_without_a_known_white_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "0.tif"
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(path)
    with pytest.raises(UserError, match="0.tif.*mode 'F'"):
        folder.open_picture(path, ImageFormat.from_config(EXACT))


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(tmp_path: Path, channels: int) -> None:
    write_pictures(tmp_path / "a", 1, 0)
    config = {"input_size": (channels, 20, 20), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UserError, match=f"takes {channels} channels"):
        pictures_under(tmp_path, config)


def header_only(path: Path, width: int, height: int) -> None:
    """A PNG whose header promises this size and that has no pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
        ">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b""))


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_huge_picture_is_refused_by_its_header(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    header_only(tmp_path / "huge.png", 30_000, 30_000)
    decoded = mock.Mock()
    monkeypatch.setattr(Image.Image, "convert", decoded)
    with pytest.raises(UserError, match="huge.png.*pixels.*mend or remove it") as error:
        image_tensor_files(tmp_path, RGB_32)
    assert "\n" not in str(error.value) and not decoded.called


def test_links_are_followed_by_all_readers(tmp_path: Path) -> None:
    write_pictures(tmp_path / "all" / "cat", 3, 0)
    write_pictures(tmp_path / "all" / "dog" / "deep", 2, 1)
    some = tmp_path / "some"
    write_pictures(some / "owl", 2, 2)
    for name in ("cat", "dog"):
        (some / name).symlink_to(tmp_path / "all" / name)
    (some / "owl" / "linked.png").symlink_to(tmp_path / "all" / "cat" / "0.png")
    files = picture_files(some)
    assert len(files) == 8 == len(pictures_under(some, RGB_32)) and files == sorted(files)
    samples, classes = labelled_pictures(some)
    assert sorted(path for path, _ in samples) == files
    assert classes == {"cat": 0, "deep": 1, "owl": 2}


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    write_pictures(tmp_path / "cat", 2, 0)
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    (tmp_path / "cat" / "self").symlink_to(tmp_path / "cat")
    assert len(picture_files(tmp_path)) == 2


def test_classes_and_their_order_are_those_of_timm(tmp_path: Path) -> None:
    for seed, name in enumerate(("class10", "class9", "Owl", "b/deep")):
        write_pictures(tmp_path / name, 12, seed, size=4)
    reader = timm.data.create_reader("", root=str(tmp_path))
    samples, classes = labelled_pictures(tmp_path)
    assert classes == reader.class_to_idx
    assert [(str(path), label) for path, label in samples] == reader.samples


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "cat", 1, 0)

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(folder.os, "scandir", refuse)
    with pytest.raises(UserError, match=f"cannot read the folder {tmp_path}"):
        pictures_under(tmp_path, RGB_32)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_decoding_process_is_one_line(tmp_path: Path, workers: int) -> None:
    for split in ("train", "val"):
        write_pictures(tmp_path / split / "cat", 4, 0)
    (tmp_path / "train" / "cat" / "2.png").write_text("no picture")
    train, _ = datasets.train_and_test("folder", tmp_path, RGB_32)
    batches = Batches(train, 2, shuffle=False, seed=0, epoch=0, num_workers=workers)
    with pytest.raises(UserError) as error:
        list(batches)
    assert str(error.value).startswith("cannot read the picture")
    assert "2.png" in str(error.value) and "\n" not in str(error.value)


def test_calibration_decodes_only_what_it_uses(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path / "pictures", 12, 0)
    opened: list[Path] = []
    original = folder.open_picture
    monkeypatch.setattr(folder, "open_picture", lambda path, image_format: opened.append(path)
                        or original(path, image_format))
    command = ["compress", "-m", "vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "3",
               "--model-kwargs", "patch_size=8", "embed_dim=48", "depth=1", "num_heads=3",
               "--calibration-dir", str(tmp_path / "pictures"), "--calibration-images", "3",
               "--keep-params", "0.7", "-o", str(tmp_path / "small")]
    assert cli.main(command) == 0
    assert len(set(opened)) == len(opened) == 3
