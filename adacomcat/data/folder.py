"""Picture files as a model sees them: as they are, or augmented from a seed."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, get_img_extensions
from torch import Tensor
from torch.utils.data import Dataset

from adacomcat.errors import UserError
from adacomcat.utils.checksum import checksum


@dataclass(frozen=True)
class ImageFormat:
    """A model's input: the size (C, H, W), and (pixel - mean) / std for each channel."""

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

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
        )

    def transform(self, is_training: bool) -> Any:
        """timm's transform from a PIL image to a normalised tensor (C, H, W)."""
        return create_transform(self.input_size, is_training=is_training,
                                interpolation=self.interpolation, mean=self.mean, std=self.std,
                                crop_pct=self.crop_pct)

    def pil_mode(self) -> str:
        """PIL's name for this number of channels."""
        return "L" if self.input_size[0] == 1 else "RGB"


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
    """

    def __init__(self, samples: list[tuple[str | Path, int]], indices: Tensor,
                 image_format: ImageFormat) -> None:
        self.samples, self.indices, self.image_format = samples, indices, image_format
        self.transforms = {flag: image_format.transform(flag) for flag in (False, True)}

    @classmethod
    def of(cls, samples: list[tuple[str | Path, int]], image_format: ImageFormat) -> "FolderImages":
        """A dataset of all samples, in their order."""
        return cls(samples, torch.arange(len(samples)), image_format)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | tuple[int, int | None]) -> tuple[Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, None)
        path, label = self.samples[int(self.indices[index])]
        picture = open_picture(path, self.image_format)
        if seed is None:
            return self.transforms[False](picture), label
        return _seeded(seed, lambda: self.transforms[True](picture)), label

    def checksum(self) -> str:
        """The checksum of the pictures' names and labels, wherever their folder lies."""
        chosen = [self.samples[i] for i in self.indices.tolist()]
        root = os.path.commonpath([os.path.dirname(path) for path, _ in chosen]) if chosen else ""
        return checksum([(str(path)[len(root):], label) for path, label in chosen])

    def subset(self, indices: Tensor) -> "FolderImages":
        return FolderImages(self.samples, self.indices[indices], self.image_format)


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
    """The picture in the channels of ``image_format``.

    Raises:
        UserError: the file is no picture that PIL can read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert(image_format.pil_mode())
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"cannot read the picture {path}: {error}; mend or remove it") from error


def pictures_under(folder: str | Path, model_cfg: dict[str, Any]) -> FolderImages:
    """Every picture under a folder, in the order of the paths; all labels are 0.

    Args:
        folder: it and the folders in it are searched.
        model_cfg: what ``model_data_config`` gives.

    Raises:
        UserError: there is no picture.
    """
    root = Path(folder).expanduser()
    extensions = get_img_extensions(as_set=True)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in extensions)
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
