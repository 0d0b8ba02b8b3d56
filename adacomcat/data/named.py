"""Datasets by the names that timm's ``create_dataset`` has for them: 'torch/cifar10', 'hfds/…'.

Those that it only streams ('wds/', 'tfds/', 'hfids/') have no order to shuffle, resume or split by
a seed, on which all runs here rely.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset

from adacomcat.data.folder import FolderImages, ImageFormat, eight_bits
from adacomcat.errors import UserError, reason

INDEXED, STREAMS = ("torch", "hfds"), ("wds", "tfds", "hfids")


@dataclass(frozen=True)
class Splits:
    """Which parts of a named dataset are taken.

    Args:
        train: its name of the training images.
        test: its name of the images that judge.
        download: fetch it where it is missing.
    """

    train: str = "train"
    test: str = "validation"
    download: bool = False


class NamedImages(FolderImages):
    """The pictures of a dataset of timm's or torchvision's; see ``FolderImages`` for its items."""

    def _picture(self, index: int) -> tuple[Image.Image, int]:
        try:
            picture, label = self.samples[index]
            return eight_bits(picture).convert(self.image_format.pil_mode()), int(label)
        except Exception as error:  # each reader has errors of its own
            raise UserError(f"cannot read picture {index} of the dataset: {reason(error)}"
                            ) from error

    def _identity(self) -> list[Any]:
        """Its kind, its size and what is taken of it: reading all of it would take too long."""
        return [type(self.samples).__name__, len(self.samples), self.indices]


def is_named(name: str) -> bool:
    """Whether ``name`` has the form of a dataset that timm makes."""
    kind, slash, rest = name.partition("/")
    return bool(slash and rest) and kind.lower() in INDEXED + STREAMS


def named_images(name: str, data_dir: str | Path | None, image_format: ImageFormat,
                 splits: Splits) -> tuple[int | None, NamedImages, NamedImages]:
    """(number of classes, where it is known, training set, test set).

    Raises:
        UserError: it is a stream, or timm cannot make it.
    """
    if name.partition("/")[0].lower() in STREAMS:
        raise UserError(f"{name} is a stream, which cannot be shuffled, split and resumed by a "
                        "seed; take the same data by hfds/… or as a folder")
    train, test = (_made(name, data_dir, split, splits.download)
                   for split in (splits.train, splits.test))
    return (_class_count(train), NamedImages.of(train, image_format),
            NamedImages.of(test, image_format))


def _made(name: str, data_dir: str | Path | None, split: str, download: bool) -> Any:
    root = None if data_dir is None else str(Path(data_dir).expanduser())
    try:
        return create_dataset(name, root=root, split=split, download=download)
    except Exception as error:  # of readers, of the network, of packages that are missing
        raise UserError(f"timm cannot make the part {split!r} of {name}: {reason(error)}; "
                        "--data-dir, --dataset-download, --train-split and --val-split say more"
                        ) from error


def _class_count(dataset: Any) -> int | None:
    classes = getattr(dataset, "classes", None)
    if classes is None:
        classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return len(classes) if classes else None
