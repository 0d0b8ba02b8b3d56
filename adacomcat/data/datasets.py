"""Image classification data: bundled digits, Fashion-MNIST, and folders in ImageNet's layout.

Everything random is a function of (seed, epoch, step) for the whole global batch, of which a
process then takes its rows: a resumed run and a run on several processes see the same pixels.
"""

import gzip
import math
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_dataset, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adacomcat.data.augmentation import Augmentation
from adacomcat.data.folder import FolderImages, ImageFormat
from adacomcat.errors import UserError

ARRAY_DATASETS = ("digits", "fashion-mnist")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CACHE = Path("~/.cache/adacomcat/fashion-mnist")


class TensorImages(Dataset):
    """Images (N, 1, H, W) in memory, 0 to white; items are (normalised (C, H, W), label)."""

    def __init__(
        self, images: Tensor, labels: Tensor, white: int, flips: bool, image_format: ImageFormat
    ) -> None:
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

    def batch(
        self, indices: Tensor, augmentation: Augmentation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels of the chosen images, augmented at their own size, then resized, normalised."""
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


def model_data_config(model: nn.Module) -> dict[str, Any]:
    """timm's data configuration, with the channels, size and classes the model was built with."""
    model_cfg = resolve_model_data_config(model) | {"num_classes": model.num_classes}
    channels, height, width = model_cfg["input_size"]
    embedding = getattr(model, "patch_embed", None)
    if embedding is not None:
        channels = getattr(getattr(embedding, "proj", None), "in_channels", channels)
        height, width = getattr(embedding, "img_size", None) or (height, width)
    return model_cfg | {"input_size": (channels, height, width)}


def train_and_test(
    name: str, data_dir: str | Path | None, model_cfg: dict[str, Any]
) -> tuple[Dataset, Dataset]:
    """Training and test set as the model wants them.

    name: 'digits', 'fashion-mnist', or 'folder' (data_dir holds train/ and val/ or validation/);
    model_cfg: timm's data configuration (input_size, mean, std), and num_classes to be checked.
    """
    image_format = ImageFormat.from_config(model_cfg)
    if name == "digits":
        classes, (train, test) = 10, _digits(image_format)
    elif name == "fashion-mnist":
        classes, (train, test) = 10, _fashion_mnist(data_dir, image_format)
    elif name == "folder":
        classes, train, test = _folder(data_dir, image_format)
    else:
        known = ", ".join((*ARRAY_DATASETS, "folder"))
        raise UserError(f"unknown dataset '{name}'; known are {known}")
    wanted = model_cfg.get("num_classes", classes)
    if wanted != classes:
        raise UserError(
            f"the model has {wanted} classes, the dataset '{name}' has {classes}; "
            f"pass --num-classes {classes} or a model that was trained on this dataset"
        )
    return train, test


def _digits(image_format: ImageFormat) -> list[TensorImages]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
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
    """The Debian package's folder if it is installed, else a download into the cache."""
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
                "dataset-fashion-mnist, or pass --data-dir with its four .gz files"
            ) from error
        if not cache.exists():
            (Path(scratch) / "FashionMNIST" / "raw").rename(cache)
    return cache


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """An IDX file of bytes: 0 0 8 ndim, then ndim big-endian sizes, then the bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path}: {error}; --data-dir must hold Fashion-MNIST's four .gz files"
        ) from error
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic or len(content) != header + math.prod(shape):
        raise UserError(f"{path} is no IDX file of bytes with {dimensions} dimensions")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def _folder(
    data_dir: str | Path | None, image_format: ImageFormat
) -> tuple[int, FolderImages, FolderImages]:
    if data_dir is None:
        raise UserError("the dataset 'folder' needs --data-dir")
    root = Path(data_dir).expanduser()
    train = _read_split(root, ("train",))
    test = _read_split(root, ("val", "validation"))
    if train.class_to_idx != test.class_to_idx:
        differing = sorted(train.class_to_idx.keys() ^ test.class_to_idx.keys())
        raise UserError(
            f"{root}: training and validation have different classes ({', '.join(differing[:5])})"
        )
    parts = [FolderImages(r.samples, torch.arange(len(r)), image_format) for r in (train, test)]
    return len(train.class_to_idx), parts[0], parts[1]


def _read_split(root: Path, names: tuple[str, ...]) -> Any:
    """timm's reader of the first folder that exists among root/names."""
    found = [root / name for name in names if (root / name).is_dir()]
    if not found:
        raise UserError(
            f"no folder {' or '.join(names)} in the data folder {root}; "
            "it must hold train/CLASS/* and val/CLASS/*"
        )
    try:
        reader = create_dataset("", root=str(found[0]), search_split=False).reader
    except (RuntimeError, OSError) as error:
        raise UserError(f"no readable pictures in class folders under {found[0]}") from error
    if "" in reader.class_to_idx:
        raise UserError(f"{found[0]} holds pictures outside class folders; move or remove them")
    return reader


def split_holdout(dataset: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Random disjoint parts (train, holdout) of a training set; fraction goes to the holdout."""
    count = round(len(dataset) * fraction)
    if not 0 < count < len(dataset):
        raise UserError(
            f"a holdout of {fraction} of {len(dataset)} training images leaves one part empty"
        )
    order = torch.randperm(len(dataset), generator=_generator(seed))
    return dataset.subset(order[count:]), dataset.subset(order[:count])


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


@dataclass(frozen=True)
class Batches:
    """One epoch of batches; iterating gives this process's rows rank::world_size of each."""

    dataset: TensorImages | FolderImages
    batch_size: int
    shuffle: bool
    seed: int
    epoch: int
    rank: int
    world_size: int
    augment: bool
    start_step: int
    num_workers: int
    steps: int | None

    def __len__(self) -> int:
        """Steps that are left. Shuffled epochs drop the last batch if it is not full."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        total = whole + (rest > 0 and not self.shuffle)
        if self.steps is not None:
            total = min(total, self.steps)
        return max(0, total - self.start_step)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset, TensorImages):
            return self._tensor_batches(self.dataset)
        return self._folder_batches()

    def _steps(self) -> Iterator[tuple[int, Tensor]]:
        """Step number and the global batch's indices."""
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(order), generator=_generator(self.seed, self.epoch))
        batches = order.split(self.batch_size)
        end = self.start_step + len(self)
        return ((step, batches[step]) for step in range(self.start_step, end))

    def _tensor_batches(self, dataset: TensorImages) -> Iterator[tuple[Tensor, Tensor]]:
        rows = slice(self.rank, None, self.world_size)
        for step, indices in self._steps():
            augmentation = None
            if self.augment:
                generator = _generator(self.seed, self.epoch, step)
                size = dataset.images.shape[-2:]
                drawn = Augmentation.draw(len(indices), size, dataset.flips, generator)
                augmentation = drawn.shard(rows)
            yield dataset.batch(indices[rows], augmentation)

    def _folder_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = []
        for step, indices in self._steps():
            seeds: Sequence[int | None] = [None] * len(indices)
            if self.augment:
                generator = _generator(self.seed, self.epoch, step)
                seeds = torch.randint(2**32, (len(indices),), generator=generator).tolist()
            batch = list(zip(indices.tolist(), seeds, strict=True))
            samples.append(batch[self.rank :: self.world_size])
        return iter(
            DataLoader(
                self.dataset,
                batch_sampler=samples,
                num_workers=self.num_workers,
                generator=_generator(self.seed, self.epoch),
            )
        )


def loader(
    dataset: TensorImages | FolderImages,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    augment: bool = False,
    start_step: int = 0,
    num_workers: int = 0,
    steps: int | None = None,
) -> Batches:
    """Batches of one epoch, a function of (seed, epoch) alone; batch_size counts all processes.

    steps: the epoch ends after so many.
    """
    if shuffle and batch_size % world_size:
        raise UserError(f"--batch-size {batch_size} does not divide by {world_size} processes")
    if shuffle and batch_size > len(dataset):
        raise UserError(
            f"--batch-size {batch_size} is larger than the training set ({len(dataset)} images)"
        )
    return Batches(
        dataset,
        batch_size,
        shuffle,
        seed,
        epoch,
        rank,
        world_size,
        augment,
        start_step,
        num_workers,
        steps,
    )


@dataclass
class EndlessBatches:
    """Augmented, shuffled epochs one after the other: every ``iter`` begins the next."""

    dataset: TensorImages | FolderImages
    batch_size: int
    seed: int
    augment: bool = True
    num_workers: int = 0
    epoch: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return iter(loader(self.dataset, self.batch_size, shuffle=True, seed=self.seed,
                           epoch=self.epoch, augment=self.augment, num_workers=self.num_workers))
