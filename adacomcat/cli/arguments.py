"""The flags of every command, in timm's spelling.

This module imports neither torch nor timm, so that --help answers at once. ``COMMANDS`` lists the
groups of flags that each command has, ``REQUIRED`` those it cannot do without.
"""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from adacomcat.cli import budget_flags, training_flags
from adacomcat.cli.calibration_flags import calibration, elastic, keeping, kept
from adacomcat.cli.customize_flags import (
    adapter_flags,
    concept_flags,
    picture_flags,
    pipeline_flags,
)
from adacomcat.cli.values import keeps, key_value, number, path, pattern
from adacomcat.errors import UserError
from adacomcat.utils.limits import (
    BACKENDS,
    CHOICES,
    COUNT,
    EXPORT_DTYPES,
    EXPORT_FORMATS,
    FRACTION,
    NUMBER,
    PERCENT,
    POSITIVE,
    PROCESSES,
    SEED,
    WAITING,
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage; flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split()):.400} (see {self.prog} --help)")


def build_parser() -> Parser:
    """The parser of the whole command line, with a subparser for each command."""
    parser = Parser(prog="adacomcat", description="Make pretrained Vision Transformers smaller "
                    "and faster by low-rank factors.")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (summary, groups) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("-c", "--config", type=path, metavar="FILE.yaml",
                             help="values of these flags; the command line wins")
        command.add_argument("--json", action="store_true",
                             help="print one JSON object on stdout, and nothing else there")
        for add in groups:
            add(command)
    return parser


def _model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="NAME|DIR",
                       help="timm architecture, a checkpoint folder, or hf:DIR, which "
                            "transformers wrote")
    group.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=False,
                       help="use timm's pretrained weights")
    group.add_argument("--checkpoint", type=path, metavar="FILE|URL",
                       help="weights of the architecture: .safetensors, or .pth, which is "
                            "read with weights_only=True; or their https address")
    group.add_argument("--no-verify", action="store_true",
                       help="load a checkpoint folder without comparing its checksums")
    _model_size(group)


def _model_size(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--num-classes", type=number(COUNT), metavar="N",
                       help="classes of the model (default: the architecture's)")
    group.add_argument("--img-size", type=number(NUMBER), metavar="N",
                       help="side of the images, in pixels (default: the architecture's)")
    group.add_argument("--in-chans", type=number(NUMBER), metavar="N",
                       help="channels of the images (default: the architecture's)")
    group.add_argument("--model-kwargs", type=key_value, nargs="*", default=[], metavar="K=V",
                       help="further arguments of the timm architecture, like depth=6")


def _device(parser: Parser) -> None:
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU where there is one)")
    parser.add_argument("--backend", choices=BACKENDS,
                        help="run every op on this backend, as ADACOMCAT_BACKEND does (default: "
                             "the fastest for each op)")


def _timeout(parser: Parser) -> None:
    parser.add_argument("--timeout", type=number(WAITING), default=300.0, metavar="S",
                        help="of several processes, end where one keeps the others waiting for S "
                             "seconds (default: %(default)s)")


def _parallel(parser: Parser) -> None:
    parser.add_argument("--parallel", choices=CHOICES["parallel"],
                        help="how several processes share a step: they average gradients in one "
                             "go, or while these are computed (ddp), or hold shards of model and "
                             "optimiser (fsdp) (default: average)")


def _data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="digits|fashion-mnist|FOLDER|torch/NAME|hfds/NAME",
                       help="a dataset, one of timm's like torch/cifar10, or a folder with "
                            "train/CLASS/* and val/CLASS/*")
    group.add_argument("--data-dir", type=path, metavar="FOLDER",
                       help="where the files of the dataset lie")
    group.add_argument("--dataset-download", action="store_true",
                       help="fetch a dataset of timm's that is not there")
    for part, default in (("train", "train"), ("val", "validation")):
        group.add_argument(f"--{part}-split", default=default, metavar="NAME",
                           help=f"part of a dataset of timm's (default: {default})")
    group.add_argument("--crop-pct", type=number(FRACTION), metavar="F",
                       help="share of the resized picture's side that is seen; with 1 the shorter "
                            "side is resized to the model's (default: the model's)")
    group.add_argument("-j", "--workers", type=number(PROCESSES), default=0, metavar="N",
                       help="processes that decode pictures (default: %(default)s)")


def _batch(default: int) -> Callable[[Parser], None]:
    def add(parser: Parser) -> None:
        parser.add_argument("-b", "--batch-size", type=number(NUMBER), default=default,
                            metavar="N",
                            help="images per step over all processes (default: %(default)s)")
    return add


def _seed(parser: Parser) -> None:
    parser.add_argument("--seed", type=number(SEED), default=0, metavar="N",
                        help="seed of all random choices (default: %(default)s)")


def _folder(parser: Parser) -> None:
    parser.add_argument("-o", "--output", type=path, metavar="DIR",
                        help="checkpoint folder to write, absent or empty")


def _output(parser: Parser) -> None:
    _folder(parser)
    parser.add_argument("--gauge", action="store_true",
                        help="leave redundant numbers out of the file: r² for each "
                             "factorisation of rank r")


def _report(parser: Parser) -> None:
    parser.add_argument("--no-report", action="store_true",
                        help="write no run.json and report.html beside the checkpoint")


def _filters(parser: Parser) -> None:
    group = parser.add_argument_group("what may be compressed (names as inspect lists them)")
    for flag, text in (("--include", "only these"), ("--exclude", "not these; they stay dense")):
        group.add_argument(flag, type=pattern, nargs="*", metavar="PATTERN",
                           help=f"{text}: globs like 'blocks.*.mlp', or re: and a regular "
                                "expression")


def _sensitivity(parser: Parser) -> None:
    group = parser.add_argument_group("which site hurts")
    group.add_argument("--sensitivity", action="store_true",
                       help="measure the damage of each site's ranks alone on the final features, "
                            "and show the order in which the allocation takes them")
    group.add_argument("--images", type=path, metavar="FOLDER",
                       help="the same as --calibration-dir; one half calibrates, the other judges")
    group.add_argument("--ranks", type=number(NUMBER), default=4, metavar="N",
                       help="ranks of each site that are measured (default: %(default)s)")


def _refine(parser: Parser) -> None:
    parser.add_argument("--refine", type=number(NUMBER), default=0, metavar="N",
                        help="try N more plans at the budget, and keep the one with the least "
                             "loss on held-out images")


def _self_measurement(parser: Parser) -> None:
    parser.add_argument("--measure", action="store_true",
                        help="time every op's backends on this machine, about a minute, and take "
                             "the fastest from now on")


def _accuracy(parser: Parser) -> None:
    group = parser.add_argument_group("accuracy without a head")
    group.add_argument("--knn", action="store_true",
                       help="classify by the 20 nearest training images")
    group.add_argument("--linear-probe", action="store_true",
                       help="classify by a logistic regression on the training images' features")
    group.add_argument("--train-images", type=number(NUMBER), metavar="N",
                       help="take N random training images for both (default: all)")
    group.add_argument("--test-images", type=number(NUMBER), metavar="N",
                       help="judge by N random test images (default: all)")
    group = parser.add_argument_group("agreement with the dense model")
    training_flags.teacher(group, "the dense model: timm architecture, or a checkpoint folder")
    group.add_argument("--images", type=path, metavar="FOLDER",
                       help="compare on the pictures under this folder, without labels, in place "
                            "of --data")


def _record(parser: Parser) -> None:
    parser.add_argument("--record", type=path, metavar="DIR",
                        help="write the result into this folder, too, where `adacomcat report` "
                             "reads it")


def _gate(parser: Parser) -> None:
    parser.add_argument("--min-accuracy", type=number(PERCENT), metavar="PERCENT",
                        help="exit with code 3 where top-1 is below")


def _repeats(parser: Parser) -> None:
    parser.add_argument("--repeats", type=number(NUMBER), default=20, metavar="N",
                        help="timed passes of each model (default: %(default)s)")


def _sweep(parser: Parser) -> None:
    parser.add_argument("--batches", type=number(NUMBER), nargs="+", metavar="N",
                        help="measure batches of these sizes (default: that of --batch-size)")
    parser.add_argument("--dtypes", choices=EXPORT_DTYPES, nargs="+", metavar="DTYPE",
                        help="measure weights and images in these dtypes (default: the model's)")


def _curve(parser: Parser) -> None:
    group = parser.add_argument_group("curve")
    group.add_argument("--keeps", type=keeps, default="0.9:0.3:7", metavar="FRACTIONS",
                       help="shares of the parameters: FIRST:LAST:COUNT, or some like 0.9,0.5 "
                            "(default: %(default)s)")
    group.add_argument("--search", type=number(NUMBER), metavar="EPOCHS",
                       help="at each size search ranks and distil, as train does")
    group.add_argument("--recover", type=number(POSITIVE), metavar="MINUTES",
                       help="at each size distil the dense model's features for so long")
    group.add_argument("--landmarks", nargs="+", default=[], metavar="NAME|DIR",
                       help="other models to draw: pretrained timm architectures, or folders")
    group.add_argument("--knn", action="store_true",
                       help="judge by the nearest training images, also where there is a head")
    group.add_argument("--train-images", type=number(NUMBER), default=2000, metavar="N",
                       help="training images that neighbours are taken from (default: %(default)s)")
    group.add_argument("--test-images", type=number(NUMBER), metavar="N",
                       help="judge by N random test images (default: all)")
    group.add_argument("--dtypes", choices=EXPORT_DTYPES, nargs="+", default=["float32"],
                       metavar="DTYPE", help="a curve for each (default: float32)")
    group.add_argument("--latency-batch", type=number(NUMBER), default=1, metavar="N",
                       help="images of the batch that is timed (default: %(default)s)")
    group.add_argument("--save-models", action="store_true",
                       help="save the model of each size in a folder of --output")
    parser.add_argument("-o", "--output", type=path, metavar="DIR",
                        help="folder for pareto.json and report.html")


def _pages(parser: Parser) -> None:
    parser.add_argument("folders", nargs="+", type=path, metavar="DIR",
                        help="folders that compress, train, recover or pareto wrote, or that "
                             "results were recorded into")
    parser.add_argument("-o", "--output", type=path, metavar="FILE",
                        help="the page (default: report.html in DIR, comparison.html in the first "
                             "of several)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    group = parser.add_argument_group("pictures to look at")
    training_flags.teacher(group, "the dense model: timm architecture, or a checkpoint folder")
    group.add_argument("--images", type=path, metavar="FOLDER",
                       help="show what both models attend to on pictures under this folder, and "
                            "which of these are nearest")
    group.add_argument("--count", type=number(NUMBER), default=4, metavar="N",
                       help="pictures that are shown (default: %(default)s)")


def _status(parser: Parser) -> None:
    parser.add_argument("folder", type=path, metavar="DIR",
                        help="the output of train, compress, recover or pareto")
    parser.add_argument("--state-dir", type=path, metavar="DIR",
                        help="where train keeps its state (default: DIR.state)")


def _named_folder(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="DIR",
                        help="the same as --model DIR")


def _export(parser: Parser) -> None:
    _named_folder(parser)
    group = parser.add_argument_group("export")
    group.add_argument("--format", choices=EXPORT_FORMATS, help="what is written")
    group.add_argument("-o", "--output", type=path, metavar="PATH",
                       help="file to write; for plain and dense an absent or empty folder "
                            "(default: beside DIR, with its name)")
    group.add_argument("--optimize", action="store_true",
                       help="export what adacomcat.optimize makes: norms folded, and in the last "
                            "block the class token only where the head reads no other")
    group.add_argument("--dynamic-batch", action="store_true",
                       help="take batches of every size (default: of --batch-size)")
    group.add_argument("--dtype", choices=EXPORT_DTYPES,
                       help="of weights and images in the file (default: the model's)")
    group.add_argument("--opset", type=number(NUMBER), metavar="N",
                       help="ONNX's opset (default: PyTorch's)")
    group.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                       help="compare the file with the model on random images (default)")
    group.add_argument("--bench", action="store_true",
                       help="measure the file beside the model and its optimized form")


def _comcat(parser: Parser) -> None:
    parser.add_argument("--ranks", type=path, metavar="FILE", help="ComCAT's ranks.txt (default: "
                        "the shapes of the weights tell the ranks)")
    parser.add_argument("--checkpoint", type=path, metavar="FILE|URL",
                        help="ComCAT's checkpoint.pth")
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="NAME", help="timm architecture")
    _model_size(group)


# command → (summary, functions that add its flags)
COMMANDS: dict[str, tuple[str, tuple[Callable[[Parser], None], ...]]] = {
    "doctor": ("Say what is installed and what runs here.", (_self_measurement,)),
    "inspect": ("List where ranks are chosen in a model, and what truncation costs there.",
                (_model, _filters, _sensitivity, _data, calibration(0), _record, _seed,
                 _device)),
    "calibrate": ("Keep what images tell of a model, for any number of budgets.",
                  (_model, _filters, _data, calibration(256), keeping, _seed, _device)),
    "compress": ("Compress a model without training.",
                 (_model, budget_flags.budget, elastic, _filters, _refine, budget_flags.quantize,
                  kept, _data, calibration(256), _output, _report, _seed, _device)),
    "quantize": ("Round a model to int8 or int4, the last step before it runs.",
                 (_model, _named_folder, budget_flags.number_format, _data, calibration(64),
                  _folder, _seed, _device)),
    "train": ("Search ranks, train and distil; or train a model as it is.",
              (_model, _data, training_flags.train, training_flags.optimizer,
               training_flags.augmentation, training_flags.search, _refine, _output, _report,
               _seed, _device, _timeout, _parallel)),
    "recover": ("Distil the dense model's features into a compressed model, without labels.",
                (_model, _data, training_flags.recovery, _batch(16), _output, _report, _seed,
                 _device)),
    "evaluate": ("Measure accuracy on a dataset's test images, or agreement with a dense model.",
                 (_model, _data, _accuracy, _batch(256), _gate, _record, _seed, _device,
                  _timeout)),
    "profile": ("Measure parameters, MACs and latency, dense against compressed.",
                (_model, budget_flags.budget, _filters, _batch(1), _sweep, _repeats, _record,
                 _device)),
    "status": ("Say where a training run stands, and what a finished run gave.", (_status,)),
    "pareto": ("Compress to several sizes, and draw quality against size and speed.",
               (_model, _curve, _filters, _data, calibration(256), kept, _batch(128), _seed,
                _device)),
    "report": ("Make one page of finished runs: sizes, ranks, accuracy, latency, pictures.",
               (_pages, _seed, _device)),
    "export": ("Write a model for another runtime, or for timm alone.",
               (_model, _export, _batch(1))),
    "import-comcat": ("Make a checkpoint folder from ComCAT's released files.",
                      (_comcat, _output)),
    "customize": ("Teach a text-to-image model a concept by low-rank adapters, from a handful of "
                  "pictures.",
                  (pipeline_flags, concept_flags, adapter_flags, _seed, _device, _timeout)),
    "generate": ("Make a grid of pictures with a text-to-image model and adapters.",
                 (pipeline_flags, picture_flags, _seed, _device)),
}

# command → destinations of the flags that it needs, from the command line or the YAML file
REQUIRED = {
    "doctor": (), "inspect": ("model",), "calibrate": ("model", "output"),
    "compress": ("model", "output"), "quantize": ("model", "output"),
    "train": ("model", "data", "output"), "evaluate": ("model",), "profile": ("model",),
    "recover": ("model", "teacher", "output"), "export": ("model", "format"),
    "report": (), "status": (), "pareto": ("model", "output"),
    "import-comcat": ("checkpoint", "model", "output"),
    "customize": ("model", "instance_images", "instance_prompt", "output"),
    "generate": ("model", "prompt", "output"),
}
# Destinations of the budget's flags; at most one of them is given.
EXCLUSIVE = ("keep_params", "keep_macs", "keep_bytes", "max_latency_ms", "plan")
