"""Photographs that installed packages bundle, split by file: some calibrate, the others test.

Each Python or Debian package that is installed contributes. Debian's tuxpaint-stamps-default has
cut-out animals, plants, vehicles and things, which are pasted on half of the calibration crops.
"""

import importlib.util
import random
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

# Python package → (folder, files). This project needs the first three packages anyway; the others
# can be installed without their dependencies.
PHOTOGRAPHS = {
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png",
                         "rocket.jpg")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
    "foolbox": ("data", (
        "imagenet_00_243.jpg", "imagenet_01_559.jpg", "imagenet_02_438.jpg", "imagenet_03_990.jpg",
        "imagenet_04_949.jpg", "imagenet_05_853.jpg", "imagenet_06_609.jpg", "imagenet_07_609.jpg",
        "imagenet_08_915.jpg", "imagenet_09_455.jpg", "imagenet_10_541.jpg", "imagenet_11_630.jpg",
        "imagenet_12_741.jpg", "imagenet_13_471.jpg", "imagenet_14_129.jpg", "imagenet_15_99.jpg",
        "imagenet_16_251.jpg", "imagenet_17_22.jpg", "imagenet_18_317.jpg",
        "imagenet_19_305.jpg")),
    "gradio": ("media_assets/images", ("cheetah.jpg", "cheetah1.jpg", "lion.jpg", "tower.jpg")),
    "imgaug": ("", ("quokka.jpg",)),
    "mahotas": ("demos/data", ("luispedro.jpg",)),
    "ultralytics": ("assets", ("bus.jpg",)),
}
# Folder → photographs (jpg) of Debian's mate-backgrounds, lomiri-wallpapers-16.04, opencv-doc,
# scratch and kphotoalbum: one for each scene.
INSTALLED = {
    "/usr/share/backgrounds/mate/nature": (
        "Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops",
        "Storm", "TwoWings", "Wood", "YellowFlower"),
    "/usr/share/backgrounds": (
        "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace",
        "Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi",
        "analogpattern_by_Peter_Nerlich", "free_by_Peter_Nerlich", "friends_by_Aitzol_Berasategi",
        "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt",
        "sunset_by_Aitzol_Berasategi", "umang_by_Abhishek_Mudgal"),
    "/usr/share/doc/opencv-doc/examples/data": (
        "aero1", "aero3", "aloeL", "apple", "baboon", "board", "building", "butterfly",
        "ela_original", "fruits", "home", "left", "leuvenA", "licenseplate_motion", "messi5",
        "orange", "squirrel_cls", "stuff"),
    "/usr/share/scratch/Media/Backgrounds/Nature": (
        "beach-malibu", "canyon", "flower-bed", "forest", "garden-rock", "grand-canyon",
        "gravel-desert", "hill", "lake", "pathway", "tree", "water-and-rocks", "wave"),
    "/usr/share/scratch/Media/Backgrounds/Sports": (
        "baseball-field", "basketball-court1-a", "football-field", "playing-field",
        "tennis-backboard"),
    "/usr/share/scratch/Media/Backgrounds/Outdoors": (
        "all-sports-mural", "atom-playground", "bench-with-view", "boardwalk", "brick-wall2",
        "brick-wall-and-stairs", "building-at-mit", "building-fireproof", "castle",
        "city-with-water", "driveway", "hallway_outdoors", "hay_field", "houses", "mansion",
        "mural-faro", "parking-ramp", "pool", "route66", "silos", "the-movies", "train-tracks1",
        "village", "wooden-house"),
    "/usr/share/scratch/Media/Backgrounds/Indoors": (
        "chalkboard", "clothing-store", "hall", "kitchen", "the-movies-inside"),
    "/usr/share/kphotoalbum/demo": (
        "anne_helene", "bar55", "blackie", "cold_water", "donna", "grand_canyon_1", "jesper",
        "new_wave_1", "pool_2", "skagen", "snow", "spiff", "sunset", "wayne"),
}
# Textures, microscopy and astronomy, which calibrate and never test.
OTHERS = {
    "skimage": ("data", ("brick.png", "camera.png", "cell.png", "coins.png", "grass.png",
                         "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
                         "retina.jpg")),
}
CUTOUTS = Path("/usr/share/tuxpaint/stamps")
CUTOUT_KINDS = ("animals", "clothes", "food", "hobbies", "household", "people", "plants", "sports",
                "town/houses", "town/monuments", "vehicles")
CUTOUT_LEAST = 120  # the shortest side of a cut-out that is used, in pixels
TEST_EVERY = 4  # every fourth photograph tests and never calibrates
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def split(folders: list[str], others: bool = True,
          first: int = 0) -> tuple[list[Path], list[Path]]:
    """(files that calibrate, files that test).

    Args:
        folders: folders whose .jpg files join the bundled photographs.
        others: calibrate on textures, microscopy and astronomy too.
        first: every fourth photograph from this one on tests.
    """
    photographs = _bundled(PHOTOGRAPHS)
    photographs += [path for folder, names in INSTALLED.items() for name in names
                    if (path := Path(folder, f"{name}.jpg")).exists()]
    for folder in folders:
        photographs += [path for path in Path(folder).iterdir()
                        if path.suffix.lower() in (".jpg", ".jpeg")]
    photographs.sort(key=lambda path: path.name)
    test = photographs[first::TEST_EVERY]
    calibration = [path for path in photographs if path not in test]
    return calibration + (_bundled(OTHERS) if others else []), test


def spread(files: list[Path], at_most: int) -> list[Path]:
    """At most this many of the files, evenly over the list."""
    count = min(at_most, len(files))
    return [files[index * len(files) // count] for index in range(count)]


def _bundled(packages: dict[str, tuple[str, tuple[str, ...]]]) -> list[Path]:
    """The files of those packages that are installed."""
    found = []
    for package, (folder, names) in packages.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            found += [Path(spec.origin).parent / folder / name for name in names]
    return found


def cutouts() -> list[Path]:
    """The cut-outs that are large enough; none where the package is not installed."""
    found = (path for kind in CUTOUT_KINDS for path in sorted((CUTOUTS / kind).rglob("*.png"))
             if "cartoon" not in path.parts)
    return [path for path in found if _large_enough(path)]


def _large_enough(path: Path) -> bool:
    with Image.open(path) as picture:
        return min(picture.size) >= CUTOUT_LEAST


def calibration_crops(files: list[Path], count: int, seed: int) -> Tensor:
    """(count, 3, 224, 224): crops of these photos, half of them with a cut-out if there are."""
    objects = cutouts()
    random.Random(seed).shuffle(objects)
    pasted = min(count // 2, len(objects))
    plain = crops(files, count - pasted, seed)
    if not pasted:
        return plain
    return torch.cat([plain, _crops_with(objects[:pasted], files, seed)])


def crops(files: list[Path], count: int, seed: int) -> Tensor:
    """(count, 3, 224, 224): random crops, mirrored at random, taken from the files in turn."""
    photos = [_open(path) for path in files]
    transform = _transform((0.2, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.stack([transform(photos[i % len(photos)]) for i in range(count)])


def _crops_with(objects: list[Path], files: list[Path], seed: int) -> Tensor:
    """(objects, 3, 224, 224): each object pasted near the middle of a crop of a photo."""
    place, side = random.Random(seed), 320
    background, transform = v2.RandomResizedCrop(side, scale=(0.2, 1.0)), _transform((0.5, 1.0))
    made = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for i, path in enumerate(objects):
            canvas = background(_open(files[i % len(files)]))
            with Image.open(path) as picture:
                thing = picture.convert("RGBA")
            factor = place.uniform(0.6, 1.1) * side / max(thing.size)
            thing = thing.resize([max(1, round(size * factor)) for size in thing.size])
            corner = tuple((side - size) // 2 + place.randint(-30, 30) for size in thing.size)
            canvas.paste(thing, corner, thing)
            made.append(transform(canvas))
    return torch.stack(made)


def _open(path: Path) -> Image.Image:
    with Image.open(path) as photo:
        photo.draft("RGB", (1024, 1024))
        photo = photo.convert("RGB")
        photo.thumbnail((1024, 1024))
        return photo


def _transform(scale: tuple[float, float]) -> v2.Transform:
    return v2.Compose([
        v2.RandomResizedCrop(224, scale=scale, antialias=True), v2.RandomHorizontalFlip(),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
