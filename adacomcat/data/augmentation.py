"""Augmentation of a batch of images that lies in memory, in a few tensor operations.

``Batches`` draws the parameters for the global batch and applies its own rows of them.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

ERASE_PROBABILITY = 0.25


@dataclass(frozen=True)
class Augmentation:
    """One row of parameters for each of n images.

    Args:
        flip: (n,), whether to mirror the image.
        shift: (n, 2), pixels down and to the right.
        erase: (n, 4), the box to erase: top, left, bottom, right; the last two are outside of it.
    """

    flip: Tensor
    shift: Tensor
    erase: Tensor

    @classmethod
    def draw(cls, count: int, size: tuple[int, int], flips: bool,
             generator: torch.Generator) -> "Augmentation":
        """Random parameters for ``count`` images of ``size`` (H, W).

        A shift is at most 1/28 of the side and an erased box at most a third of it: with more, a
        run of few epochs learns more slowly.
        """
        sides = torch.tensor(size)
        reach = sides // 28
        coin, erased = torch.rand(2, count, generator=generator)
        shift = torch.rand(count, 2, generator=generator) * (2 * reach + 1)
        lengths = (torch.rand(count, 2, generator=generator) * (sides // 3)).long() + 1
        corner = (torch.rand(count, 2, generator=generator) * (sides - lengths + 1)).long()
        lengths = lengths * (erased < ERASE_PROBABILITY).long()[:, None]
        return cls(flip=(coin < 0.5) & flips, shift=shift.long() - reach,
                   erase=torch.cat([corner, corner + lengths], dim=1))

    def shard(self, rows: slice) -> "Augmentation":
        """The parameters of these images alone."""
        return Augmentation(*(getattr(self, field.name)[rows] for field in fields(self)))

    def apply(self, images: Tensor) -> Tensor:
        """Images (n, C, H, W) shifted, mirrored, then erased; what has no pixel becomes 0."""
        count, channels, height, width = images.shape
        reach = int(self.shift.abs().amax()) if count else 0
        padded = F.pad(images, (reach,) * 4)
        y, x = torch.arange(height), torch.arange(width)
        rows = y + self.shift[:, :1] + reach  # (n, H)
        columns = torch.where(self.flip[:, None], x.flip(0), x) + self.shift[:, 1:] + reach
        n = torch.arange(count)[:, None, None, None]
        c = torch.arange(channels)[:, None, None]
        moved = padded[n, c, rows[:, None, :, None], columns[:, None, None, :]]
        top, left, bottom, right = self.erase.unbind(1)
        in_rows = (y >= top[:, None]) & (y < bottom[:, None])  # (n, H)
        in_columns = (x >= left[:, None]) & (x < right[:, None])  # (n, W)
        return moved.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0)
