"""Collages: scenes of overlapping random blobs, filled with parts of given images.

Calibration overfits to few pictures. A collage puts their textures beside each other in ways that
no picture had. The scenes follow the dead-leaves model of natural images (Lee, Mumford and Huang,
2001), which Baradad et al. (arXiv 2106.05963) use for training images.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from adacomcat.utils.progress import progress

BLOBS = (1, 1, 2, 3, 6, 12)  # blobs of a scene: one of these numbers, at random
BLOB_SIDE = (0.25, 0.8)  # a blob's side ÷ the image's side
CORNERS = (3, 9)  # corners of a blob
RADIUS = (0.35, 1.0)  # a corner's distance from the blob's centre ÷ half the blob's side
RECOLOURED = 0.5  # probability that a texture changes its colours
SOFTNESS = 0.02  # width of a blob's soft edge ÷ the image's side
BACKGROUND_SCALE = (0.05, 0.6)  # area of the crop that fills a scene ÷ area of its image
TEXTURE_SCALE = (0.02, 0.5)  # area of the crop that fills a blob ÷ area of its image


def with_collages(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """The images and ``count`` collages of them, in random order: (N + count, C, H, W).

    The order is random because compression takes the first images for some of its measurements.

    Args:
        images: (N, C, H, W).
        count: the number of collages; 0 returns ``images`` itself.
        seed: decides the collages and the order.
    """
    if not count:
        return images
    mixed = torch.cat([images, collages(images, count, seed)])
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))]


def collages(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """Scenes made of parts of the images, in the images' range of values: (count, C, H, W).

    Args:
        images: (N, C, H, W).
        count: the number of scenes.
        seed: decides all that is random; torch's generator keeps its state.
    """
    if not count:
        return images[:0]
    # Scenes are made between 0 and 1, where colours can be jittered.
    low, high = (value.item() for value in images.aminmax())
    span = max(high - low, 1e-6)

    def texture(size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
        return _texture(images, low, span, size, scale)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        height, width = images.shape[-2:]
        scenes = [_scene((height, width), texture) for _ in progress(range(count), "collages")]
    return torch.stack(scenes) * span + low


def _scene(size: tuple[int, int], cut: Callable[..., Tensor]) -> Tensor:
    """(C, *size); ``cut(size, scale)`` gives a texture (C, *size)."""
    height, width = size
    scene = cut((height, width), BACKGROUND_SCALE)
    for _ in range(BLOBS[_integer(0, len(BLOBS) - 1)]):
        side = round(min(height, width) * _uniform(*BLOB_SIDE))
        texture = cut((side, side), TEXTURE_SCALE)
        mask = _blob(side, max(1.0, SOFTNESS * min(height, width)))
        _paste_(scene, texture, mask, *(_integer(-side // 3, extent - 2 * side // 3)
                                        for extent in (height, width)))
    return scene


def _paste_(scene: Tensor, texture: Tensor, mask: Tensor, top: int, left: int) -> None:
    """Blend a square texture into the scene; the part of it outside the scene is left out."""
    side = len(mask)
    rows, columns = (slice(max(first, 0), min(first + side, extent))
                     for first, extent in zip((top, left), scene.shape[-2:], strict=True))
    inside = (slice(rows.start - top, rows.stop - top),
              slice(columns.start - left, columns.stop - left))
    part = scene[:, rows, columns]
    part += mask[inside] * (texture[(slice(None), *inside)] - part)


def _texture(images: Tensor, low: float, span: float, size: tuple[int, int],
             scale: tuple[float, float]) -> Tensor:
    """A random part of a random image, (C, *size) from 0 to 1, at times in other colours."""
    image = (images[_integer(0, len(images) - 1)] - low) / span
    part = v2.RandomResizedCrop(size, scale=scale, antialias=True)(image)
    if _uniform(0, 1) < RECOLOURED and len(image) in (1, 3):
        hue = 0.5 if len(image) == 3 else 0.0
        part = v2.ColorJitter(0.5, 0.5, 0.6 if hue else 0.0, hue)(part.clamp(0, 1))
    return part.clone()


def _blob(side: int, softness: float) -> Tensor:
    """The mask of a star with random corners, (side, side): 1 inside, 0 outside, soft between."""
    corners = _integer(*CORNERS)
    radii = torch.empty(corners).uniform_(*RADIUS)
    radii = torch.cat([radii, radii[:1]])
    axis = torch.arange(side) - (side - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn = (torch.atan2(y, x) / (2 * math.pi) + 0.5) * corners
    corner = turn.long().clamp_max(corners - 1)
    radius = torch.lerp(radii[corner], radii[corner + 1], turn - corner) * side / 2
    return ((radius - torch.hypot(y, x)) / softness).add(0.5).clamp(0, 1)


def _uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


def _integer(low: int, high: int) -> int:
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))
