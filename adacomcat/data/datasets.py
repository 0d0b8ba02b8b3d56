"""Labelled images: scikit-learn's digits, Fashion-MNIST, and folders in ImageNet's layout."""

import gzip
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from adacomcat.data.augmentation import Augmentation
from adacomcat.data.folder import (
    FolderImages,
    ImageFormat,
    PictureAugmentation,
    labelled_pictures,
)
from adacomcat.data.named import NamedImages, Splits, is_named, named_images
from adacomcat.errors import UserError
from adacomcat.utils.checksum import checksum
from adacomcat.utils.model import class_count, input_size
from adacomcat.utils.text import parse_json, read_text

ARRAY_DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MOST_COMPRESSION = 1032  # DEFLATE makes a file at most this many times smaller
FASHION_MNIST_CACHE = Path("~/.cache/adacomcat/fashion-mnist")


class TensorImages(Dataset):
    """Grey images in memory; an item is (normalised image (C, H, W), label).

    Args:
        images: (N, 1, H, W), from 0 (black) to ``white``.
        labels: (N,).
        white: the value of a white pixel.
        flips: whether a mirrored image keeps its label, so that augmentation may mirror it.
        image_format: the size and the normalisation that the model wants.
    """

    def __init__(self, images: Tensor, labels: Tensor, white: int, flips: bool,
                 image_format: ImageFormat) -> None:
        self.images, self.labels = images, labels
        self.white, self.flips, self.image_format = white, flips, image_format

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def subset(self, indices: Tensor) -> "TensorImages":
        images, labels = self.images[indices], self.labels[indices]
        return TensorImages(images, labels, self.white, self.flips, self.image_format)

    def augmented_by(self, augmentation: PictureAugmentation) -> "TensorImages":
        """This dataset: its images have an augmentation of their own, ``Augmentation``."""
        return self

    def checksum(self) -> str:
        """The checksum of all images and labels."""
        return checksum([self.images, self.labels])

    def batch(self, indices: Tensor,
              augmentation: Augmentation | None = None) -> tuple[Tensor, Tensor]:
        """The chosen images (n, C, H, W) and their labels (n,).

        Images are augmented at the size they are stored in, then resized and normalised.
        """
        images = self.images[indices]
        if augmentation is not None:
            images = augmentation.apply(images)
        pixels = images.float() / self.white
        channels, height, width = self.image_format.input_size
        if pixels.shape[-2:] != (height, width):
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        mean = torch.tensor(self.image_format.mean).view(-1, 1, 1)
        std = torch.tensor(self.image_format.std).view(-1, 1, 1)
        return (pixels.expand(-1, channels, -1, -1) - mean) / std, self.labels[indices]


LabelledImages = TensorImages | FolderImages | NamedImages


def model_data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration of ``model``: input_size (C, H, W), mean, std, num_classes, …

    Channels, size and classes are the model's own. Its pretrained weights may have had others.
    """
    if getattr(model, "pretrained_cfg", None) is None:
        return _foreign_config(model)
    model_cfg = resolve_model_data_config(model) | {"num_classes": class_count(model)}
    channels, height, width = model_cfg["input_size"]
    embedding = getattr(model, "patch_embed", None)
    if embedding is not None:
        channels = getattr(getattr(embedding, "proj", None), "in_channels", channels)
        height, width = getattr(embedding, "img_size", None) or (height, width)
    return model_cfg | {"input_size": (channels, height, width)}


def _foreign_config(model: nn.Module) -> dict[str, Any]:
    """Of a model of another library: mean and std are those of the pre-processor beside its
    weights, where transformers wrote one, else timm's."""
    size = input_size(model)
    model_cfg = resolve_data_config({"input_size": size}) | {"num_classes": class_count(model)}
    file = Path(getattr(model, "name_or_path", "")) / "preprocessor_config.json"
    if file.is_file():
        known = parse_json(read_text(file))
        model_cfg |= {name: tuple(known[f"image_{name}"]) for name in ("mean", "std")
                      if f"image_{name}" in known}
    return model_cfg


def train_and_test(name: str, data_dir: str | Path | None, model_cfg: dict[str, Any],
                   splits: Splits | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Training set and test set, resized and normalised as the model wants them.

    Args:
        name: 'digits', 'fashion-mnist' or 'folder'; or what timm's ``create_dataset`` calls
            'torch/…' or 'hfds/…'.
        data_dir: where the files lie. 'folder' needs it, with train/CLASS/* and val/CLASS/* or
            validation/CLASS/* inside; 'fashion-mnist' looks in its usual places without it.
        model_cfg: what ``model_data_config`` gives; without num_classes the number of classes is
            not compared.
        splits: which parts of a dataset of timm's are taken.

    Raises:
        UserError: the name is unknown, files are missing or cannot be read, or the dataset has
            another number of classes than the model.
    """
    image_format = ImageFormat.from_config(model_cfg)
    classes: int | None
    train: LabelledImages
    test: LabelledImages
    if name == "digits":
        classes, (train, test) = 10, _digits(image_format)
    elif name == "fashion-mnist":
        classes, (train, test) = 10, _fashion_mnist(data_dir, image_format)
    elif name == "folder":
        classes, train, test = _folder(data_dir, image_format)
    elif is_named(name):
        classes, train, test = named_images(name, data_dir, image_format, splits or Splits())
    else:
        known = ", ".join((*ARRAY_DATASETS, "folder"))
        raise UserError(f"unknown dataset '{name}'; known are {known}, and timm's torch/… and "
                        "hfds/…")
    wanted = model_cfg.get("num_classes", classes)
    if classes is not None and wanted != classes:
        raise UserError(f"the model has {wanted} classes, the dataset '{name}' has {classes}; "
                        f"pass --num-classes {classes} or a model that was trained on this dataset")
    return train, test


def _digits(image_format: ImageFormat) -> list[TensorImages]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.2,
                             stratify=digits.target, random_state=0)
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    whole = TensorImages(images, labels, white=16, flips=False, image_format=image_format)
    return [whole.subset(torch.from_numpy(part)) for part in parts]


def _fashion_mnist(data_dir: str | Path | None, image_format: ImageFormat) -> list[TensorImages]:
    folder = Path(data_dir).expanduser() if data_dir is not None else _fashion_mnist_folder()
    datasets = []
    for part in ("train", "t10k"):
        images = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1).long()
        if len(images) != len(labels):
            raise UserError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        datasets.append(TensorImages(images[:, None], labels, 255, True, image_format))
    return datasets


def _fashion_mnist_folder() -> Path:
    """The Debian package's folder where it is installed, else the cache, filled by a download."""
    if FASHION_MNIST_FOLDER.is_dir():
        return FASHION_MNIST_FOLDER
    cache = FASHION_MNIST_CACHE.expanduser()
    if cache.is_dir():
        return cache
    from torchvision.datasets import FashionMNIST

    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        try:
            FashionMNIST(scratch, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download Fashion-MNIST ({error}); install the Debian package "
                "dataset-fashion-mnist, or pass --data-dir with its four .gz files") from error
        if not cache.exists():
            (Path(scratch) / "FashionMNIST" / "raw").rename(cache)
    return cache


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0 0 8 ndim, then ndim big-endian sizes, then the bytes."""
    magic = bytes((0, 0, 8, dimensions))
    try:
        # No more is read than the header promises, nor than a file of this size can hold.
        most = MOST_COMPRESSION * path.stat().st_size
        with gzip.open(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            shape = [int.from_bytes(header[start:start + 4], "big")
                     for start in range(4, len(header), 4)]
            size = math.prod(shape)
            content = file.read(size + 1) if header[:4] == magic and size <= most else b""
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; --data-dir must hold Fashion-MNIST's four "
                        ".gz files") from error
    if header[:4] != magic or len(shape) != dimensions or len(content) != size:
        raise UserError(f"{path} is no IDX file of bytes with {dimensions} dimensions")
    return torch.from_numpy(np.frombuffer(content, np.uint8).reshape(shape).copy())


def _folder(data_dir: str | Path | None,
            image_format: ImageFormat) -> tuple[int, FolderImages, FolderImages]:
    """(number of classes, training set, test set)."""
    if data_dir is None:
        raise UserError("the dataset 'folder' needs --data-dir")
    root = Path(data_dir).expanduser()
    train = _list_split(root, ("train",))
    test = _list_split(root, ("val", "validation"))
    (train_samples, classes), (test_samples, test_classes) = train, test
    if classes != test_classes:
        differing = sorted(classes.keys() ^ test_classes.keys())
        raise UserError(f"{root}: training and validation have different classes "
                        f"({', '.join(differing[:5])})")
    return (len(classes), FolderImages.of(train_samples, image_format),
            FolderImages.of(test_samples, image_format))


def _list_split(root: Path, names: tuple[str, ...]
                ) -> tuple[list[tuple[str | Path, int]], dict[str, int]]:
    """The pictures in root/NAME/CLASS/* and their classes, for the first name that exists."""
    found = [root / name for name in names if (root / name).is_dir()]
    if not found:
        raise UserError(f"no folder {' or '.join(names)} in the data folder {root}; "
                        "it must hold train/CLASS/* and val/CLASS/*")
    samples, classes = labelled_pictures(found[0])
    if not samples:
        raise UserError(f"no readable pictures in class folders under {found[0]}")
    if "" in classes:
        raise UserError(f"{found[0]} holds pictures outside class folders; move or remove them")
    return samples, classes
