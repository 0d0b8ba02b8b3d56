"""Flags about images that calibrate, and about what is kept of them.

This module imports neither torch nor timm, so that --help answers at once.
"""

import argparse
from collections.abc import Callable

from adacomcat.cli.values import number, numbers, path
from adacomcat.utils.limits import COUNT, FRACTION


def calibration(default: int) -> Callable[[argparse.ArgumentParser], None]:
    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group("calibration (without images, weights alone decide)")
        group.add_argument("--calibration-images", type=number(COUNT), default=default, metavar="N",
                           help="take N random training images (default: %(default)s)")
        group.add_argument("--calibration-dir", type=path, metavar="FOLDER",
                           help="take them from the pictures under this folder")
        group.add_argument("--collages", type=number(COUNT), default=0, metavar="N",
                           help="add N collages of these images; they help where pictures are "
                                "few")
    return add


def keeping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=path, metavar="CAL",
                        help="file to write, .safetensors; compress takes it as --calibration")
    parser.add_argument("--images", action=argparse.BooleanOptionalAction, default=True,
                        help="keep the images in the file, so that compress fits blocks to them "
                             "(default)")


def kept(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a kept calibration")
    group.add_argument("--calibration", type=path, metavar="CAL",
                       help="what adacomcat calibrate wrote, instead of images")
    group.add_argument("--refit", action=argparse.BooleanOptionalAction, default=None,
                       help="fit the blocks one after the other to the images, which loses the "
                            "least; --no-refit takes seconds (default: where there are images)")


def elastic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--elastic", type=numbers(FRACTION), metavar="FRACTION,…",
                        help="write a folder of every size, from which adacomcat.load cuts one at "
                             "a budget; these sizes are fitted to the images, each for itself")
