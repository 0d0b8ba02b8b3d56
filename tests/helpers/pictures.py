"""Picture files of noise, and a data configuration to read them with."""

from pathlib import Path

import numpy as np
from PIL import Image

RGB_32 = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def write_pictures(folder: Path, count: int, seed: int, size: int = 40) -> list[Path]:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture).save(path)
    return paths
