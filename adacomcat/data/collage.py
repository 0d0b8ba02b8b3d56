"""More images out of few: scenes of blobs whose colours and textures come from other images.

Calibration overfits to the pictures that it sees. Scenes of overlapping random shapes, as in the
dead-leaves model of natural images (Lee, Mumford and Huang, 2001; as training images: Baradad et
al., arXiv 2106.05963), put known textures beside each other in ways that no picture had.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2

from adacomcat.utils.progress import progress

BLOBS = (1, 1, 2, 3, 6, 12)  # of a scene
BLOB_SIDE = (0.25, 0.8)  # of the image's
CORNERS = (3, 9)
RADIUS = (0.35, 1.0)  # of a corner, of half the blob's side
RECOLOURED = 0.5  # of all textures
SOFTNESS = 0.02  # of an outline, of the image's side


def with_collages(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """The images and ``count`` collages of them, (N + count, C, H, W), shuffled, since compression
    takes the first ones for some of its measurements."""
    if not count:
        return images
    mixed = torch.cat([images, collages(images, count, seed)])
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))]


def collages(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` scenes made of images (N, C, H, W), in their value range: (count, C, H, W)."""
    if not count:
        return images[:0]
    # Colours are jittered between 0 and 1.
    low, high = (value.item() for value in images.aminmax())
    span = max(high - low, 1e-6)

    def texture(size: tuple[int, int], scale: tuple[float, float]) -> Tensor:
        return _texture(images, low, span, size, scale)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scenes = [_scene(images.shape[-2:], texture) for _ in progress(range(count), "collages")]
    return torch.stack(scenes) * span + low


def _scene(size: tuple[int, int], cut: Callable[..., Tensor]) -> Tensor:
    height, width = size
    scene = cut((height, width), (0.05, 0.6))
    for _ in range(BLOBS[_integer(0, len(BLOBS) - 1)]):
        side = round(min(height, width) * _uniform(*BLOB_SIDE))
        texture = cut((side, side), (0.02, 0.5))
        mask = _blob(side, max(1.0, SOFTNESS * min(height, width)))
        _paste_(scene, texture, mask, *(_integer(-side // 3, extent - 2 * side // 3)
                                        for extent in (height, width)))
    return scene


def _paste_(scene: Tensor, texture: Tensor, mask: Tensor, top: int, left: int) -> None:
    """The corner may lie outside: what sticks out is cut off."""
    side = len(mask)
    rows, columns = (slice(max(first, 0), min(first + side, extent))
                     for first, extent in zip((top, left), scene.shape[-2:], strict=True))
    inside = (slice(rows.start - top, rows.stop - top),
              slice(columns.start - left, columns.stop - left))
    part = scene[:, rows, columns]
    part += mask[inside] * (texture[(slice(None), *inside)] - part)


def _texture(images: Tensor, low: float, span: float, size: tuple[int, int],
             scale: tuple[float, float]) -> Tensor:
    """A random part of a random image, (C, *size) between 0 and 1, at times in other colours."""
    image = (images[_integer(0, len(images) - 1)] - low) / span
    part = v2.RandomResizedCrop(size, scale=scale, antialias=True)(image)
    if _uniform(0, 1) < RECOLOURED and len(image) in (1, 3):
        hue = 0.5 if len(image) == 3 else 0.0
        part = v2.ColorJitter(0.5, 0.5, 0.6 if hue else 0.0, hue)(part.clamp(0, 1))
    return part.clone()


def _blob(side: int, softness: float) -> Tensor:
    """(side, side): 1 inside a star of random corners, 0 outside, a soft edge between."""
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
    """From low to high, both included."""
    return int(torch.randint(low, high + 1, ()))
