"""Batches of a dataset, and its random split, as functions of a seed.

A random choice depends on (seed, epoch, step) and is made for the global batch, of which a process
then takes its rows: a resumed run and a run on several processes see the same pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from adacomcat.data.augmentation import Augmentation
from adacomcat.data.datasets import LabelledImages, TensorImages
from adacomcat.data.folder import FolderImages
from adacomcat.errors import UserError
from adacomcat.utils.random import derived_generator


@dataclass(frozen=True)
class Batches:
    """One epoch of (images (n, C, H, W), labels (n,)), of which this process gets its rows.

    Args:
        dataset: what ``train_and_test`` or ``pictures_under`` gives.
        batch_size: images of a step, over all processes.
        shuffle: another order for each (seed, epoch), without a last batch that is not full.
        seed: with ``epoch`` it decides all that is random.
        epoch: the number of the epoch.
        rank: which process this is; it gets the rows rank::world_size of each batch.
        world_size: the number of processes.
        augment: other augmentations for each (seed, epoch, step).
        repeats: how often each image of a shuffled epoch stands in it, one after the other, with
            another augmentation each time; the epoch then sees so many images fewer.
        start_step: steps to leave out, which an interrupted run has behind it.
        num_workers: processes that decode pictures; 0 decodes in this one.
        steps: end the epoch after this many; None: after all images.

    Raises:
        UserError: a shuffled batch has fewer images than there are processes, or more than the
            dataset.
    """

    dataset: LabelledImages
    batch_size: int
    _: KW_ONLY
    shuffle: bool
    seed: int
    epoch: int
    rank: int = 0
    world_size: int = 1
    augment: bool = False
    repeats: int = 1
    start_step: int = 0
    num_workers: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle and self.batch_size < self.world_size:
            raise UserError(f"--batch-size {self.batch_size} leaves some of the "
                            f"{self.world_size} processes without an image")
        if self.shuffle and self.batch_size > len(self.dataset):
            raise UserError(f"--batch-size {self.batch_size} is larger than the training set "
                            f"({len(self.dataset)} images)")

    def __len__(self) -> int:
        """The number of steps that are left."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        total = whole + (rest > 0 and not self.shuffle)
        if self.steps is not None:
            total = min(total, self.steps)
        return max(0, total - self.start_step)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.dataset, TensorImages):
            return self._tensor_batches(self.dataset)
        return self._folder_batches(self.dataset)

    def _global_batches(self) -> Iterator[tuple[Tensor, torch.Generator]]:
        """For each step: the indices of the global batch, and the generator of its augmentation."""
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(order), generator=derived_generator(self.seed, self.epoch))
            order = order.repeat_interleave(self.repeats)[:len(order)]
        batches = order.split(self.batch_size)
        for step in range(self.start_step, self.start_step + len(self)):
            yield batches[step], derived_generator(self.seed, self.epoch, step)

    def _tensor_batches(self, dataset: TensorImages) -> Iterator[tuple[Tensor, Tensor]]:
        rows = slice(self.rank, None, self.world_size)
        height, width = dataset.images.shape[-2:]
        for indices, generator in self._global_batches():
            augmentation = None
            if self.augment:
                augmentation = Augmentation.draw(len(indices), (height, width), dataset.flips,
                                                 generator).shard(rows)
            yield dataset.batch(indices[rows], augmentation)

    def _folder_batches(self, dataset: FolderImages) -> Iterator[tuple[Tensor, Tensor]]:
        """An index goes to the decoding process with the seed of its picture's augmentation."""
        batches = []
        for indices, generator in self._global_batches():
            seeds: Sequence[int | None] = [None] * len(indices)
            if self.augment:
                seeds = torch.randint(2**32, (len(indices),), generator=generator).tolist()
            batch = list(zip(indices.tolist(), seeds, strict=True))
            batches.append(batch[self.rank::self.world_size])
        return _loaded(DataLoader(dataset, batch_sampler=batches, num_workers=self.num_workers,
                                  generator=derived_generator(self.seed, self.epoch)))


def _loaded(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; an error of a decoding process is the line that it was there.

    torch puts the other process's traceback in front of it.
    """
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().rpartition("UserError: ")[2]) from error


@dataclass
class EndlessBatches:
    """Shuffled epochs one after the other: every ``iter`` begins the next.

    Args:
        dataset: what ``train_and_test`` or ``pictures_under`` gives.
        batch_size: images of a step.
        seed: with the number of the epoch it decides all that is random.
        augment: whether pictures are augmented.
        num_workers: processes that decode pictures; 0 decodes in this one.
        epoch: the number of the latest epoch that was begun.
    """

    dataset: LabelledImages
    batch_size: int
    seed: int
    augment: bool = True
    num_workers: int = 0
    epoch: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return iter(Batches(self.dataset, self.batch_size, shuffle=True, seed=self.seed,
                            epoch=self.epoch, augment=self.augment, num_workers=self.num_workers))


def split_holdout(dataset: LabelledImages, fraction: float,
                  seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Two random parts of a training set without common images: (train, holdout).

    Args:
        dataset: what ``train_and_test`` gives.
        fraction: the holdout's share of the images.
        seed: decides which images the holdout gets.

    Raises:
        UserError: one of the parts would be empty.
    """
    count = round(len(dataset) * fraction)
    if not 0 < count < len(dataset):
        raise UserError(
            f"a holdout of {fraction} of {len(dataset)} training images leaves one part empty")
    order = torch.randperm(len(dataset), generator=derived_generator(seed))
    return dataset.subset(order[count:]), dataset.subset(order[:count])
