"""Flags that say how small a model becomes, and what its numbers are.

This module imports neither torch nor timm, so that --help answers at once.
"""

import argparse

from adacomcat.cli import training_flags
from adacomcat.cli.values import number, numbers
from adacomcat.utils.limits import (
    DEPLOYMENTS,
    FLOAT_BITS,
    FRACTION,
    NUMBER,
    POSITIVE,
    QUANTIZATIONS,
    WEIGHT_BITS,
)


def budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget (one of)")
    training_flags.keep_params_or_plan(group)
    group.add_argument("--keep-macs", type=number(FRACTION), metavar="FRACTION",
                       help="share of the model's multiply-accumulates to keep")
    group.add_argument("--keep-bytes", type=number(FRACTION), metavar="FRACTION",
                       help="share of the bytes of the model's weights to keep; ranks and bits are "
                            "chosen together")
    group.add_argument("--max-latency-ms", type=number(POSITIVE), metavar="MS",
                       help="latency of the compressed model after adacomcat.optimize, or of the "
                            "model itself where no CPU kernels are built; measured on this machine "
                            "with torch's number of threads")
    known = ", ".join(map(str, (*FLOAT_BITS, *WEIGHT_BITS)))
    parser.add_argument("--bits", type=numbers(NUMBER), metavar="BITS",
                        help=f"what numbers may have under --keep-bytes, of {known}, like 16,8,4 "
                             "(default: floats as the model has them, and 8)")
    parser.add_argument("--latency-batch", type=number(NUMBER), default=1, metavar="N",
                        help="images of the batch that --max-latency-ms is measured on "
                             "(default: %(default)s)")
    parser.add_argument("--rank-multiple", type=number(NUMBER), default=8, metavar="N",
                        help="ranks per head are multiples of N, other ranks of 2 N "
                             "(default: %(default)s)")
    parser.add_argument("--deploy", choices=DEPLOYMENTS, default="any",
                        help="choose ranks that a runtime's fused attention takes: PyTorch's flash "
                             "attention, or TensorRT's (default: %(default)s)")


def quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quantize", choices=QUANTIZATIONS,
                        help="quantise the result, as the command quantize does, with the images "
                             "that calibrate; int8 with --max-latency-ms plans with times of int8")


def number_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=QUANTIZATIONS, default="int8",
                        help="int8: weights and activations; int4: weights alone, for a small "
                             "file that runs as float (default: %(default)s)")
