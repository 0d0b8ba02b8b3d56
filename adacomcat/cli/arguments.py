"""The flags of every command, in timm's spelling.

This module imports neither torch nor timm, so that --help answers at once. ``COMMANDS`` lists the
groups of flags that each command has, ``REQUIRED`` those it cannot do without.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from adacomcat.cli.customize_flags import (
    adapter_flags,
    concept_flags,
    picture_flags,
    pipeline_flags,
)
from adacomcat.cli.values import key_value, norm_or_none, number, path, pattern
from adacomcat.errors import UserError
from adacomcat.utils.limits import (
    CHOICES,
    COUNT,
    DEPLOYMENTS,
    EXPORT_DTYPES,
    EXPORT_FORMATS,
    FRACTION,
    NUMBER,
    PERCENT,
    POSITIVE,
    PROCESSES,
    RECOVERY,
    SEED,
    TRAINING,
    WAITING,
    Limit,
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
                       help="timm architecture, or a checkpoint folder")
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


def _timeout(parser: Parser) -> None:
    parser.add_argument("--timeout", type=number(WAITING), default=300.0, metavar="S",
                        help="of several processes, end where one keeps the others waiting for S "
                             "seconds (default: %(default)s)")


def _data(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="digits|fashion-mnist|FOLDER",
                       help="a dataset, or a folder with train/CLASS/* and val/CLASS/*")
    group.add_argument("--data-dir", type=path, metavar="FOLDER",
                       help="where the files of the dataset lie")
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


def _output(parser: Parser) -> None:
    parser.add_argument("-o", "--output", type=path, metavar="DIR",
                        help="checkpoint folder to write, absent or empty")
    parser.add_argument("--gauge", action="store_true",
                        help="leave redundant numbers out of the file: r² for each "
                             "factorisation of rank r")


def _report(parser: Parser) -> None:
    parser.add_argument("--no-report", action="store_true",
                        help="write no report.html beside the checkpoint")


def _budget(parser: Parser) -> None:
    group = parser.add_argument_group("budget (one of)")
    _keep_params_or_plan(group)
    group.add_argument("--keep-macs", type=number(FRACTION), metavar="FRACTION",
                       help="share of the model's multiply-accumulates to keep")
    group.add_argument("--max-latency-ms", type=number(POSITIVE), metavar="MS",
                       help="latency of the compressed model after adacomcat.optimize, or of the "
                            "model itself where no CPU kernels are built; measured on this machine "
                            "with torch's number of threads")
    parser.add_argument("--latency-batch", type=number(NUMBER), default=1, metavar="N",
                        help="images of the batch that --max-latency-ms is measured on "
                             "(default: %(default)s)")
    parser.add_argument("--rank-multiple", type=number(NUMBER), default=8, metavar="N",
                        help="ranks per head are multiples of N, other ranks of 2 N "
                             "(default: %(default)s)")
    parser.add_argument("--deploy", choices=DEPLOYMENTS, default="any",
                        help="choose ranks that a runtime's fused attention takes: PyTorch's flash "
                             "attention, or TensorRT's (default: %(default)s)")


def _keep_params_or_plan(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--keep-params", type=number(FRACTION), metavar="FRACTION",
                       help="share of the model's parameters to keep: 0.5 or 50%%")
    group.add_argument("--plan", type=path, metavar="FILE", help="a rank plan, as JSON")


def _filters(parser: Parser) -> None:
    group = parser.add_argument_group("what may be compressed (names as inspect lists them)")
    for flag, text in (("--include", "only these"), ("--exclude", "not these; they stay dense")):
        group.add_argument(flag, type=pattern, nargs="*", metavar="PATTERN",
                           help=f"{text}: globs like 'blocks.*.mlp', or re: and a regular "
                                "expression")


def _calibration(default: int) -> Callable[[Parser], None]:
    def add(parser: Parser) -> None:
        group = parser.add_argument_group("calibration (without images, weights alone decide)")
        group.add_argument("--calibration-images", type=number(COUNT), default=default, metavar="N",
                           help="take N random training images (default: %(default)s)")
        group.add_argument("--calibration-dir", type=path, metavar="FOLDER",
                           help="take them from the pictures under this folder")
        group.add_argument("--collages", type=number(COUNT), default=0, metavar="N",
                           help="add N collages of these images; they help where pictures are "
                                "few")
    return add


def _refine(parser: Parser) -> None:
    parser.add_argument("--refine", type=number(NUMBER), default=0, metavar="N",
                        help="try N more plans at the budget, and keep the one with the least "
                             "loss on held-out images")


def _train(parser: Parser) -> None:
    """A flag that is not given stays None, and TrainConfig or the preset decides."""
    group = parser.add_argument_group("budget (one of)")
    _keep_params_or_plan(group)
    group.add_argument("--dense", action="store_true", help="train the model as it is")
    _add(parser.add_argument_group("training"), {
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
    for flag, text in (("--model-ema", "average the weights, and save the average"),
                       ("--no-augment", "train on the images as they are"),
                       ("--amp", "bfloat16 autocast"),
                       ("--resume", "go on from the training state of an interrupted run")):
        parser.add_argument(flag, action="store_true", help=text)


def _search(parser: Parser) -> None:
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
    _teacher(group, "timm architecture, or a checkpoint folder (default: the model itself)")
    _add(group, {
        "--kd-alpha": ("A", "weight of distillation (default: 0.5)"),
        "--kd-temperature": ("T", "temperature of soft distillation (default: 2.0)"),
        "--align-weight": ("W", "weight of the alignment (default: 1.0)"),
        "--search-steps": ("N", "batches of one search (default: 50)"),
        "--search-fraction": ("F", "share of the training images that is held out for the search "
                                   "(default: 0.1)"),
        "--calibration-images": ("N", "training images that calibrate; with 0, weights alone "
                                      "decide (default: 256)"),
    })


def _recovery(parser: Parser) -> None:
    group = parser.add_argument_group("recovery")
    _teacher(group, "the dense model: timm architecture, or a checkpoint folder")
    group.add_argument("--images", type=path, metavar="FOLDER",
                       help="pictures to train on, without labels; --data instead takes the "
                            "training images of a dataset")
    _add(group, {
        "--minutes": ("N", "minutes of training (default: 15.0)"),
        "--steps": ("N", "end after N steps, and not after minutes"),
        "--lr": ("LR", "the highest learning rate (default: 3e-05)"),
        "--block-weight": ("W", "weight of the blocks' features beside the final tokens "
                                "(default: 0.5)"),
        "--model-ema-decay": ("D", "average the weights with this decay, and save the average"),
    }, RECOVERY)
    group.add_argument("--amp", action="store_true", help="bfloat16 autocast")


def _teacher(group: argparse._ArgumentGroup, default: str) -> None:
    _add(group, {
        "--teacher": ("NAME|DIR", default),
        "--teacher-checkpoint": ("FILE|URL",
                                 "the teacher's weights (default: timm's pretrained ones)"),
    })


def _add(group: argparse._ArgumentGroup, flags: dict[str, tuple[str, str]],
         limits: Mapping[str, Limit] = TRAINING) -> None:
    """Add flags: names → (metavar, help). ``limits`` says which are numbers, and which ones."""
    for names, (metavar, text) in flags.items():
        name = names.split()[-1].removeprefix("--").removeprefix("model-").replace("-", "_")
        kind = _SPELLED.get(name) or (number(limits[name]) if name in limits else str)
        group.add_argument(*names.split(), type=kind, metavar=metavar, help=text)


# Flags of ``_add`` that have more spellings than a number or a word.
_SPELLED = {"clip_grad": norm_or_none, "state_dir": path, "teacher_checkpoint": path}


def _gate(parser: Parser) -> None:
    parser.add_argument("--min-accuracy", type=number(PERCENT), metavar="PERCENT",
                        help="exit with code 3 where top-1 is below")


def _repeats(parser: Parser) -> None:
    parser.add_argument("--repeats", type=number(NUMBER), default=20, metavar="N",
                        help="timed passes of each model (default: %(default)s)")


def _export(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="DIR",
                        help="the same as --model DIR")
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
    "doctor": ("Say what is installed and what runs here.", ()),
    "inspect": ("List where ranks are chosen in a model, and what truncation costs there.",
                (_model, _filters, _data, _calibration(0), _seed, _device)),
    "compress": ("Compress a model without training.",
                 (_model, _budget, _filters, _refine, _data, _calibration(256), _output, _report,
                  _seed, _device)),
    "train": ("Search ranks, train and distil; or train a model as it is.",
              (_model, _data, _train, _refine, _search, _output, _report, _seed, _device,
               _timeout)),
    "recover": ("Distil the dense model's features into a compressed model, without labels.",
                (_model, _data, _recovery, _batch(16), _output, _seed, _device)),
    "evaluate": ("Measure accuracy on a dataset's test images.",
                 (_model, _data, _batch(256), _gate, _device, _timeout)),
    "profile": ("Measure parameters, MACs and latency, dense against compressed.",
                (_model, _budget, _filters, _batch(1), _repeats, _device)),
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
    "doctor": (), "inspect": ("model",), "compress": ("model", "output"),
    "train": ("model", "data", "output"), "evaluate": ("model", "data"), "profile": ("model",),
    "recover": ("model", "teacher", "output"), "export": ("model", "format"),
    "import-comcat": ("checkpoint", "model", "output"),
    "customize": ("model", "instance_images", "instance_prompt", "output"),
    "generate": ("model", "prompt", "output"),
}
# Destinations of the budget's flags; at most one of them is given.
EXCLUSIVE = ("keep_params", "keep_macs", "max_latency_ms", "plan")
