"""Photos that are on every machine: those that scikit-image, scikit-learn and matplotlib bundle."""

import importlib.util
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

BUNDLED = {
    "skimage": ("data", ("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png",
                         "coffee.png", "coins.png", "grass.png", "gravel.png",
                         "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
                         "retina.jpg", "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
}
TEST_EVERY = 5  # every fifth photo is never calibrated on
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photo_files(folders: list[str]) -> list[Path]:
    """The bundled photos, then those of your own folders."""
    files = [Path(importlib.util.find_spec(package).origin).parent / folder / name
             for package, (folder, names) in BUNDLED.items() for name in names]
    for folder in folders:
        files += sorted(path for path in Path(folder).iterdir()
                        if path.suffix.lower() in (".jpg", ".jpeg"))
    return sorted(files, key=lambda path: path.name)


def split(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """(calibration, test), by file."""
    test = files[::TEST_EVERY]
    return [path for path in files if path not in test], test


def crops(files: list[Path], count: int, seed: int) -> Tensor:
    """(count, 3, 224, 224): random crops, flipped at random, the files in turn."""
    transform = v2.Compose([
        v2.RandomResizedCrop(224, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip(),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    photos = []
    for path in files:
        with Image.open(path) as photo:
            photo.draft("RGB", (1024, 1024))
            photo = photo.convert("RGB")
            photo.thumbnail((1024, 1024))
            photos.append(photo)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.stack([transform(photos[i % len(photos)]) for i in range(count)])
