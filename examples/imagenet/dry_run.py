"""The recipes with a tiny model on generated pictures: to see that all of it runs, not learns."""

import argparse
import tempfile
from pathlib import Path

from torchvision.datasets import FakeData

from adacomcat import cli

RECIPES = ("deit_small", "deit_base")
CLASSES, SIZE, BATCH = 4, 32, 8
MODEL = ("depth=2", "embed_dim=128", "num_heads=2", "patch_size=8")  # heads of 64, as DeiT's
HELD_OUT = 2  # times the images of the steps, so that the search has some of its own


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each epoch")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("-o", "--output", metavar="DIR",
                        help="keep the checkpoints there; default: nowhere")
    return parser.parse_args()


def write_pictures(folder: Path, count: int) -> None:
    """ImageNet's layout: train/CLASS/*, val/CLASS/*."""
    for part, size in (("train", count), ("val", 2 * CLASSES)):
        for index, (picture, _) in enumerate(FakeData(size, (3, SIZE, SIZE))):
            path = folder / part / f"class{index % CLASSES}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def flags(recipe: str, pictures: Path, output: Path, steps: int) -> list[str]:
    """The recipe as it is, but for size and time."""
    changed = {"data": pictures, "img-size": SIZE, "num-classes": CLASSES, "batch-size": BATCH,
               "steps": steps, "epochs": 1, "finetune-epochs": 1, "search-steps": 2,
               "calibration-images": 16, "workers": 0, "output": output}
    config = Path(__file__).with_name(f"{recipe}.yaml")
    return ["train", "-c", str(config), "--no-pretrained", "--model-kwargs", *MODEL,
            *(f"--{name}={value}" for name, value in changed.items())]


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch) / "pictures", HELD_OUT * args.steps * BATCH)
        for recipe in args.recipes:
            output = Path(args.output or scratch) / recipe
            code = cli.main(flags(recipe, Path(scratch) / "pictures", output, args.steps))
            if code:
                return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
