"""The subjects of the comparison: a pretrained backbone on photographs, and a classifier."""

import argparse
from pathlib import Path
from typing import Any

import paths
import torch
from methods import Subject
from torch import nn

from adacomcat import data
from adacomcat.checkpoint import folder
from adacomcat.cli.arguments import number
from adacomcat.data import with_collages
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.errors import UserError
from adacomcat.train import calibration_images
from adacomcat.utils.distributed import Processes
from adacomcat.utils.limits import at_least

WEIGHTS = paths.ROOT / "examples/fashion_mnist/weights"


def dinov2(crops: int, photographs: int, test_crops: int, cutouts: bool, seed: int,
           scenes: int = 0) -> Subject:
    """DINOv2 ViT-S/14, measured by its final tokens on photographs that do not calibrate.

    Args:
        crops: images that calibrate.
        photographs: the most files that they are cut from.
        test_crops: images that test.
        cutouts: paste cut-outs on half of the calibration crops.
        seed: decides all crops.
        scenes: how many of the calibration crops are collages of the others.
    """
    import photos
    from backbone import load_backbone
    from fidelity import compare, tokens

    model = load_backbone()
    calibration_files, test_files = photos.split([], others=False)
    calibration_files = photos.spread(calibration_files, photographs)
    make = photos.calibration_crops if cutouts else photos.crops
    calibration = with_collages(make(calibration_files, crops - scenes, seed), scenes, seed)
    test = photos.crops(test_files, test_crops, seed + 1)
    dense = tokens(model, test)

    def measure(compressed: nn.Module) -> dict[str, float]:
        error, cosine = compare(dense, tokens(compressed, test))
        return {"error": error, "cls_cosine": cosine}

    print(f"{crops} crops of {min(crops - scenes, len(calibration_files))} photographs, "
          f"{scenes} of them collages, calibrate, "
          f"{test_crops} of {min(test_crops, len(test_files))} others test")
    return Subject(model, calibration, measure)


def classifier(model: nn.Module, train_set: Any, test_set: Any, config: TrainConfig) -> Subject:
    """A classifier, measured by top-1 on the test set.

    ``config`` has the settings that all methods share which train.
    """
    calibration = calibration_images(train_set, config.calibration_images, config.seed,
                                     Processes())

    if calibration is None:
        raise UserError("the methods need images to calibrate; raise calibration_images")

    def measure(compressed: nn.Module) -> dict[str, float]:
        return {"top1": evaluate(compressed, test_set, 4 * config.batch_size, Processes())["top1"]}

    training = {name: getattr(config, name) for name in ("epochs", "batch_size", "lr", "seed")}
    return Subject(model, calibration, measure, train_set, training)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=number(at_least(1)), default=3,
                        help="epochs of the methods that train")
    parser.add_argument("--batch-size", type=number(at_least(1)), default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weights", type=Path, default=WEIGHTS,
                        help="folder of the dense Fashion-MNIST model")
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--train-images", type=number(at_least(1)), metavar="N",
                        help="train on the first N images (default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))


def trained_settings(args: argparse.Namespace) -> str:
    """The settings that the key of a run names beside method, keep and seed."""
    images = "all" if args.train_images is None else args.train_images
    return f"{args.epochs} epochs of {images} images, batch {args.batch_size}, lr {args.lr:g}"


def fashion_mnist(args: argparse.Namespace, seed: int) -> Subject:
    """The small ViT of examples/fashion_mnist."""
    model = folder.load(args.weights).eval()
    train_set, test_set = data.train_and_test("fashion-mnist", args.data_dir,
                                              data.model_data_config(model))
    if args.train_images is not None:
        train_set = train_set.subset(torch.arange(min(args.train_images, len(train_set))))
    return classifier(model, train_set, test_set, TrainConfig(
        epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=seed))
