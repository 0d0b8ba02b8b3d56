"""The flags of training and recovery, and what the flags of all commands are made of.

This module imports neither torch nor timm, so that --help answers at once.
"""

import argparse
from collections.abc import Mapping
from typing import Any, NoReturn

from adacomcat.cli.values import norm_or_none, number, path
from adacomcat.errors import UserError
from adacomcat.utils.limits import CHOICES, FRACTION, RECOVERY, TRAINING, Limit


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage; flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split()):.400} (see {self.prog} --help)")


def keep_params_or_plan(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--keep-params", type=number(FRACTION), metavar="FRACTION",
                       help="share of the model's parameters to keep: 0.5 or 50%%")
    group.add_argument("--plan", type=path, metavar="FILE", help="a rank plan, as JSON")


def training(parser: Parser) -> None:
    """A flag that is not given stays None, and TrainConfig or the preset decides."""
    group = parser.add_argument_group("budget (one of)")
    keep_params_or_plan(group)
    group.add_argument("--dense", action="store_true", help="train the model as it is")
    add_flags(parser.add_argument_group("training"), {
        "-b --batch-size": ("N", "images per step over all processes (default: 128)"),
        "--epochs": ("N", "0 compresses without training (default: 10)"),
        "--finetune-epochs": ("N", "further epochs, at the ranks found (default: 0)"),
        "--steps": ("N", "end every epoch after N steps (default: after all images)"),
        "--opt": ("NAME", "timm's name of an optimiser (default: adamw)"),
        "--lr": ("LR", "the highest learning rate (default: 0.0005)"),
        "--weight-decay": ("W", "default: 0.05"),
        "--clip-grad": ("NORM", "the largest norm of the gradient; 0 or none: any (default: 1.0)"),
        "--sched": ("NAME", "timm's name of a schedule (default: cosine)"),
        "--warmup-epochs": ("N", "epochs until the highest learning rate (default: 0.0)"),
        "--warmup-lr": ("LR", "learning rate at the start of the warmup (default: 1e-06)"),
        "--min-lr": ("LR", "learning rate at the end (default: 1e-06)"),
        "--mixup": ("ALPHA", "α of mixup (default: 0.0)"),
        "--cutmix": ("ALPHA", "α of CutMix (default: 0.0)"),
        "--smoothing": ("S", "label smoothing (default: 0.1)"),
        "--model-ema-decay": ("D", "decay of the averaged weights (with --model-ema: 0.9998)"),
        "--checkpoint-steps": ("N", "write the training state every N steps, too "
                                    "(default: time decides)"),
        "--checkpoint-seconds": ("S", "write it when it is older than S seconds, too "
                                      "(default: 60.0)"),
        "--state-dir": ("DIR", "where the training state goes (default: OUTPUT.state)"),
    })
    group = parser.add_argument_group("what is told while it trains")
    group.add_argument("--metrics", type=path, metavar="FILE",
                       help="append every step, search and epoch to this file, a line of JSON each")
    group.add_argument("--tensorboard", type=path, metavar="DIR",
                       help="write scalars for TensorBoard (needs the package tensorboard)")
    for flag, text in (("--model-ema", "average the weights, and save the average"),
                       ("--no-augment", "train on the images as they are"),
                       ("--amp", "bfloat16 autocast"),
                       ("--resume", "go on from the training state of an interrupted run")):
        parser.add_argument(flag, action="store_true", help=text)


def rank_search(parser: Parser) -> None:
    group = parser.add_argument_group("rank search and distillation")
    group.add_argument("--preset", choices=CHOICES["preset"], default="adacomcat",
                       help="comcat: plain SVD without attention biases, a search every epoch")
    group.add_argument("--search", choices=CHOICES["search"],
                       help="when to search (default: adaptive)")
    group.add_argument("--mlp", choices=CHOICES["mlp"],
                       help="what is chosen of MLPs: how many hidden neurons stay, which needs "
                            "calibration images, or ranks (default: neurons)")
    group.add_argument("--kd", choices=CHOICES["kd"],
                       help="distillation of the teacher's outputs (default: soft)")
    group.add_argument("--align", choices=CHOICES["align"],
                       help="alignment of block outputs with the teacher's (default: mse)")
    teacher(group, "timm architecture, or a checkpoint folder (default: the model itself)")
    add_flags(group, {
        "--kd-alpha": ("A", "weight of distillation (default: 0.5)"),
        "--kd-temperature": ("T", "temperature of soft distillation (default: 2.0)"),
        "--align-weight": ("W", "weight of the alignment (default: 1.0)"),
        "--search-steps": ("N", "batches of one search (default: 50)"),
        "--search-fraction": ("F", "share of the training images that is held out for the search "
                                   "(default: 0.1)"),
        "--calibration-images": ("N", "training images that calibrate; with 0, weights alone "
                                      "decide (default: 256)"),
    })


def recovery(parser: Parser) -> None:
    group = parser.add_argument_group("recovery")
    teacher(group, "the dense model: timm architecture, or a checkpoint folder")
    group.add_argument("--images", type=path, metavar="FOLDER",
                       help="pictures to train on, without labels; --data instead takes the "
                            "training images of a dataset")
    add_flags(group, {
        "--minutes": ("N", "minutes of training (default: 15.0)"),
        "--steps": ("N", "end after N steps, and not after minutes"),
        "--lr": ("LR", "the highest learning rate (default: 3e-05)"),
        "--block-weight": ("W", "weight of the blocks' features beside the final tokens "
                                "(default: 0.5)"),
        "--model-ema-decay": ("D", "average the weights with this decay, and save the average"),
    }, RECOVERY)
    group.add_argument("--amp", action="store_true", help="bfloat16 autocast")


def teacher(group: argparse._ArgumentGroup, default: str) -> None:
    add_flags(group, {
        "--teacher": ("NAME|DIR", default),
        "--teacher-checkpoint": ("FILE|URL",
                                 "the teacher's weights (default: timm's pretrained ones)"),
    })


def add_flags(group: argparse._ArgumentGroup, flags: dict[str, tuple[str, str]],
         limits: Mapping[str, Limit] = TRAINING) -> None:
    """Add flags: names → (metavar, help). ``limits`` says which are numbers, and which ones."""
    for names, (metavar, text) in flags.items():
        name = names.split()[-1].removeprefix("--").removeprefix("model-").replace("-", "_")
        kind = _SPELLED.get(name) or (number(limits[name]) if name in limits else str)
        group.add_argument(*names.split(), type=kind, metavar=metavar, help=text)


# Flags of ``_add`` that have more spellings than a number or a word.
_SPELLED = {"clip_grad": norm_or_none, "state_dir": path, "teacher_checkpoint": path}
