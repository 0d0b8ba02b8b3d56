"""Pictures of a user's, with what the dense and the compressed model attend to and find near."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import AttentionExtract
from torch import Tensor, nn

from adacomcat.data.datasets import model_data_config
from adacomcat.data.folder import FolderImages, pictures_under
from adacomcat.errors import UserError
from adacomcat.evaluation.neighbours import nearest_others
from adacomcat.evaluation.passes import embedding
from adacomcat.utils.model import copied, evaluating

NEAR = 3  # neighbours that are shown
MOST = 48  # pictures that are searched for neighbours: their thumbnails are in the file
SIDE, SMALL_SIDE = 128, 48  # of thumbnails, in pixels
# Dark to light for attention; blue, white, red for its difference.
RAMP = np.array([[13, 8, 60], [110, 20, 120], [220, 70, 80], [253, 190, 90], [252, 253, 191]])
DIVERGING = np.array([[33, 102, 172], [247, 247, 247], [178, 24, 43]])


@torch.inference_mode()
def compared_pictures(model: nn.Module, dense: nn.Module, folder: str, count: int,
                      seed: int) -> dict[str, Any]:
    """The content of pictures.json: ``count`` pictures, their maps, and their nearest others.

    Args:
        model: the compressed model.
        dense: the dense model.
        folder: holds pictures; at most ``MOST`` random ones are looked at.
        count: the pictures that are shown.
        seed: decides which.

    Raises:
        UserError: there are fewer than two pictures.
    """
    found = pictures_under(folder, model_data_config(model))
    if len(found) < 2:
        raise UserError(f"{folder} holds one picture; neighbours need at least two")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:MOST]
    chosen = found.subset(order)
    images = torch.stack([chosen[index][0] for index in range(len(chosen))])
    images = images.to(next(model.parameters()))
    features = {name: torch.cat([embedding(of, part).cpu() for part in images.split(16)])
                for name, of in (("dense", dense.eval()), ("compressed", model.eval()))}
    near = {name: nearest_others(rows, NEAR) for name, rows in features.items()}
    cosine = F.cosine_similarity(features["dense"], features["compressed"], dim=1)
    shown = range(min(count, len(chosen)))
    maps = _maps(model, dense, images[:len(shown)])
    return {"layer": "the last block", "thumbnails": _thumbnails(chosen, SMALL_SIDE),
            "images": [{"name": Path(_path(chosen, at)).name, "cosine": cosine[at].item(),
                        "thumbnail": _thumbnail(_path(chosen, at), SIDE),
                        "maps": None if maps is None else maps[at],
                        "neighbours": {name: rows[at].tolist() for name, rows in near.items()}}
                       for at in shown]}


def _path(images: FolderImages, index: int) -> str | Path:
    return images.samples[int(images.indices[index])][0]


def _thumbnails(images: FolderImages, side: int) -> list[dict[str, str]]:
    return [{"name": Path(_path(images, at)).name, "data": _thumbnail(_path(images, at), side)}
            for at in range(len(images))]


def _thumbnail(path: str | Path, side: int) -> str:
    with Image.open(path) as picture:
        square = picture.convert("RGB")
    short = min(square.size)
    left, top = (square.width - short) // 2, (square.height - short) // 2
    square = square.crop((left, top, left + short, top + short)).resize((side, side))
    return _encoded(square, "JPEG")


def _encoded(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _maps(model: nn.Module, dense: nn.Module, images: Tensor) -> list[dict[str, str]] | None:
    """PNGs of each image; None where the model's last attention is no grid of patches."""
    before, after = _attention(dense, images), _attention(model, images)
    if before is None or after is None or before.shape != after.shape:
        return None
    return [{"dense": _heat(a), "compressed": _heat(b), "difference": _difference(b - a)}
            for a, b in zip(before, after, strict=True)]


def _attention(model: nn.Module, images: Tensor) -> Tensor | None:
    """(B, side, side): the class token's attention to patches, or the mean token's; sums to 1."""
    model = copied(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
    with evaluating(model):
        maps = AttentionExtract(model, method="hook")(images)
    if not maps:
        return None
    weights = list(maps.values())[-1]  # (B, heads, N, N)
    first = int(getattr(model, "num_prefix_tokens", 0))
    side = math.isqrt(weights.shape[-1] - first)
    if weights.ndim != 4 or len(weights) != len(images) or side * side + first != weights.shape[-1]:
        return None
    rows = weights.mean(1)[:, 0 if first else slice(None), first:].float().cpu()
    rows = rows if first else rows.mean(1)
    rows = rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)
    return rows.reshape(-1, side, side)


def _heat(grid: Tensor) -> str:
    return _coloured(grid / grid.max().clamp_min(1e-30), RAMP)


def _difference(grid: Tensor) -> str:
    return _coloured(0.5 + 0.5 * grid / grid.abs().max().clamp_min(1e-30), DIVERGING)


def _coloured(shares: Tensor, ramp: np.ndarray) -> str:
    """Values in [0, 1] → a PNG of one pixel each."""
    at, places = shares.numpy(), np.linspace(0, 1, len(ramp))
    pixels = np.stack([np.interp(at, places, ramp[:, channel]) for channel in range(3)], -1)
    return _encoded(Image.fromarray(pixels.round().astype(np.uint8)), "PNG")
