"""The recipes with a tiny model on generated pictures: they run to the end, and learn nothing."""

import argparse
import tempfile
from pathlib import Path

from torchvision.datasets import FakeData

from adacomcat import cli

RECIPES = ("deit_small", "deit_base")
CLASSES, SIZE, BATCH = 4, 32, 8
MODEL = ("depth=2", "embed_dim=128", "num_heads=2", "patch_size=8")  # heads of 64, like DeiT's
SURPLUS = 2  # training images ÷ images of the steps, so that some are left for the search


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each epoch")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("-o", "--output", metavar="DIR",
                        help="keep the checkpoints in this folder (default: delete them)")
    return parser.parse_args()


def write_pictures(folder: Path, count: int) -> None:
    """``count`` training pictures and some to test, in ImageNet's layout: PART/CLASS/*."""
    for part, size in (("train", count), ("val", 2 * CLASSES)):
        pictures = FakeData(size, (3, SIZE, SIZE))
        for index in range(size):
            path = folder / part / f"class{index % CLASSES}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pictures[index][0].save(path)


def flags(recipe: str, pictures: Path, output: Path, steps: int) -> list[str]:
    """The recipe's flags, with a smaller model, fewer images and fewer epochs."""
    changed = {"data": pictures, "img-size": SIZE, "num-classes": CLASSES, "batch-size": BATCH,
               "steps": steps, "epochs": 1, "finetune-epochs": 1, "search-steps": 2,
               "calibration-images": 16, "workers": 0, "output": output}
    config = Path(__file__).with_name(f"{recipe}.yaml")
    return ["train", "-c", str(config), "--no-pretrained", "--model-kwargs", *MODEL,
            *(f"--{name}={value}" for name, value in changed.items())]


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        write_pictures(Path(scratch) / "pictures", SURPLUS * args.steps * BATCH)
        for recipe in args.recipes:
            output = Path(args.output or scratch) / recipe
            code = cli.main(flags(recipe, Path(scratch) / "pictures", output, args.steps))
            if code:
                return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
