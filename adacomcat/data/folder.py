"""Picture files as a model sees them: as they are, or augmented from a seed.

All that reads pictures finds them by ``picture_files`` and opens them by ``open_picture``.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from adacomcat.errors import UserError, reason
from adacomcat.utils.checksum import checksum

# Larger pictures are refused before they are decoded; the same number at which PIL refuses.
MOST_PIXELS = 178_956_970


@dataclass(frozen=True)
class ImageFormat:
    """A model's input: the size (C, H, W), and (pixel - mean) / std for each channel."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"  # 'squash' keeps all of the picture, 'border' pads what is too small

    @classmethod
    def from_config(cls, model_cfg: dict[str, Any]) -> "ImageFormat":
        """From timm's data configuration; one channel gets the mean of RGB's statistics."""
        channels = model_cfg["input_size"][0]
        return cls(
            input_size=tuple(model_cfg["input_size"]),
            mean=_per_channel(model_cfg["mean"], channels),
            std=_per_channel(model_cfg["std"], channels),
            interpolation=model_cfg.get("interpolation") or "bicubic",
            crop_pct=model_cfg.get("crop_pct") or 1.0,
            crop_mode=model_cfg.get("crop_mode") or "center",
        )

    def transform(self) -> Any:
        """timm's transform from a PIL image to a normalised tensor (C, H, W)."""
        return create_transform(self.input_size, interpolation=self.interpolation, mean=self.mean,
                                std=self.std, crop_pct=self.crop_pct, crop_mode=self.crop_mode)

    def pil_mode(self) -> str:
        """PIL's name for this number of channels.

        Raises:
            UserError: pictures do not have so many.
        """
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise UserError(f"the model takes {channels} channels, and pictures have 1 or 3; give "
                            "images as tensors in Python, or another model")
        return "L" if channels == 1 else "RGB"


@dataclass(frozen=True)
class PictureAugmentation:
    """How training pictures are augmented, in the words of timm's ``create_transform``.

    Args:
        aa: RandAugment, AugMix or AutoAugment, like 'rand-m9-mstd0.5-inc1'; None: none.
        color_jitter: change of brightness, contrast and saturation; ``aa`` leaves it out.
        reprob: probability of random erasing.
        remode: what it fills with: 'pixel', 'rand' or 'const'.
        recount: regions that it erases.
        train_interpolation: 'bilinear', 'bicubic' or 'random'; None: that of the model.
    """

    aa: str | None = None
    color_jitter: float = 0.4
    reprob: float = 0.0
    remode: str = "const"
    recount: int = 1
    train_interpolation: str | None = None

    def transform(self, image_format: ImageFormat) -> Any:
        """timm's random transform from a PIL image to a normalised tensor (C, H, W).

        Raises:
            UserError: timm does not know one of the words.
        """
        try:
            return create_transform(
                image_format.input_size, is_training=True, mean=image_format.mean,
                std=image_format.std, auto_augment=self.aa, color_jitter=self.color_jitter,
                interpolation=self.train_interpolation or image_format.interpolation,
                re_prob=self.reprob, re_mode=self.remode, re_count=self.recount)
        except Exception as error:  # timm asserts, or looks words up in tables
            raise UserError(f"timm cannot augment by {self}: {reason(error)}") from error


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


class FolderImages(Dataset):
    """Picture files; an item is (normalised image (C, H, W), label).

    An index is a whole number i, for the picture as it is, or (i, seed), for the picture augmented
    with that seed.

    Args:
        samples: (path, label) of every file.
        indices: which of the samples belong to this dataset, in its order.
        image_format: the size and the normalisation that the model wants.
        augmentation: that of training pictures.

    Raises:
        UserError: the model takes another number of channels than pictures have, or timm does not
            know the augmentation.
    """

    def __init__(self, samples: Any, indices: Tensor, image_format: ImageFormat,
                 augmentation: PictureAugmentation = PictureAugmentation()) -> None:
        image_format.pil_mode()
        self.samples, self.indices, self.image_format = samples, indices, image_format
        self.augmentation = augmentation
        self.as_it_is, self.augmented = image_format.transform(), augmentation.transform(
            image_format)

    @classmethod
    def of(cls, samples: Any, image_format: ImageFormat) -> Self:
        """A dataset of all samples, in their order."""
        return cls(samples, torch.arange(len(samples)), image_format)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int | None]) -> tuple[Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, None)
        picture, label = self._picture(int(self.indices[index]))
        if seed is None:
            return self.as_it_is(picture), label
        return _seeded(seed, lambda: self.augmented(picture)), label

    def _picture(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return open_picture(path, self.image_format), label

    def checksum(self) -> str:
        """The checksum of what is read."""
        return checksum(self._identity())

    def _identity(self) -> list[Any]:
        """The pictures' names and labels, wherever their folder lies."""
        chosen = [self.samples[i] for i in self.indices.tolist()]
        root = os.path.commonpath([os.path.dirname(path) for path, _ in chosen]) if chosen else ""
        return [(str(path)[len(root):], label) for path, label in chosen]

    def subset(self, indices: Tensor) -> Self:
        return type(self)(self.samples, self.indices[indices], self.image_format,
                          self.augmentation)

    def augmented_by(self, augmentation: PictureAugmentation) -> Self:
        """The same pictures with another augmentation.

        Raises:
            UserError: timm does not know it.
        """
        return type(self)(self.samples, self.indices, self.image_format, augmentation)


def _seeded(seed: int, function: Callable[[], Tensor]) -> Tensor:
    """``function()`` with all generators seeded that transforms draw from; their states return."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        result = function()
    random.setstate(states[0])
    np.random.set_state(states[1])
    return result


def open_picture(path: str | Path, image_format: ImageFormat) -> Image.Image:
    """The picture in the channels of ``image_format``, of eight bits each; no alpha.

    Raises:
        UserError: the file is no picture that PIL can read, or it is too large.
    """
    mode = image_format.pil_mode()
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise ValueError(f"{width} × {height} pixels are more than {MOST_PIXELS}")
            return eight_bits(picture).convert(mode)
    except Exception as error:  # PIL's plugins raise what they like on damaged files
        raise UserError(f"cannot read the picture {path}: {error}; mend or remove it") from error


def eight_bits(picture: Image.Image) -> Image.Image:
    """A picture that ``convert`` changes to grey or RGB without clipping.

    Of 16 bits the upper eight are kept, as PIL does by itself for coloured pictures.

    Raises:
        ValueError: nothing says which of its values is white.
    """
    wide = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if wide or picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels have PIL's mode {picture.mode!r}; 8 or 16 bits are known")
    if picture.mode == "P" and "transparency" in picture.info:
        return picture.convert("RGBA")
    return picture


def picture_files(root: Path) -> list[Path]:
    """Every picture under a folder, linked files and folders included, in the order of the paths.

    A link to a folder that it lies in is not followed.

    Raises:
        UserError: a folder cannot be read.
    """
    extensions = get_img_extensions(as_set=True)
    try:
        return sorted(Path(file) for file in _files_under(str(root), frozenset())
                      if os.path.splitext(file)[1].lower() in extensions)
    except OSError as error:
        raise UserError(f"cannot read the folder {root}: {error}") from error


def _files_under(folder: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files_under(entry.path, above | {real})
            else:
                yield entry.path


def labelled_pictures(root: Path) -> tuple[list[tuple[str | Path, int]], dict[str, int]]:
    """((path, label) of every picture, class → label), as timm's reader orders them.

    The folder that a picture lies in is its class, '' for those in ``root`` itself.
    """
    files = sorted(picture_files(root), key=lambda file: natural_key(str(file)))
    classes = ["" if file.parent == root else file.parent.name for file in files]
    labels = {name: label for label, name in enumerate(sorted(set(classes), key=natural_key))}
    return [(file, labels[name]) for file, name in zip(files, classes, strict=True)], labels


def pictures_under(folder: str | Path, model_cfg: dict[str, Any]) -> FolderImages:
    """Every picture under a folder, in the order of the paths; all labels are 0.

    Args:
        folder: it and the folders in it are searched.
        model_cfg: what ``model_data_config`` gives.

    Raises:
        UserError: there is no picture.
    """
    root = Path(folder).expanduser()
    files = picture_files(root) if root.is_dir() else []
    if not files:
        raise UserError(f"no pictures in the folder {root}; give one that holds some")
    return FolderImages.of([(file, 0) for file in files], ImageFormat.from_config(model_cfg))


def image_tensor_files(folder: str | Path, model_cfg: dict[str, Any]) -> Tensor:
    """Every picture under a folder as one tensor (N, C, H, W), in the order of the paths.

    Args:
        folder: it and the folders in it are searched.
        model_cfg: what ``model_data_config`` gives.

    Raises:
        UserError: there is no picture, or a file cannot be read.
    """
    return torch.stack([picture for picture, _ in pictures_under(folder, model_cfg)])
