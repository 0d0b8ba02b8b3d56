"""The flags of ``customize`` and ``generate``, in the spelling of diffusers' DreamBooth script.

This module imports neither torch nor diffusers, so that --help answers at once.
"""

import argparse

from adacomcat.cli.values import number, path
from adacomcat.utils.limits import CUSTOMIZATION, INITS, NOT_NEGATIVE, NUMBER, Limit


def _numbers(group: argparse._ArgumentGroup, flags: dict[str, tuple[str, str]]) -> None:
    """Flags without a default: the settings have one."""
    for names, (metavar, text) in flags.items():
        name = names.split()[-1].removeprefix("--").replace("-", "_")
        group.add_argument(*names.split(), type=number(CUSTOMIZATION[name]), metavar=metavar,
                           help=text)


def pipeline_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="DIR|NAME",
                        help="diffusers pipeline: a folder, or a name on the hub")


def concept_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learnt")
    group.add_argument("--instance-images", type=path, metavar="FOLDER",
                       help="the pictures to learn, four or more")
    group.add_argument("--instance-prompt", metavar="TEXT",
                       help="describes them, with the token in it: 'a photo of a sks dog'")
    group.add_argument("--token", metavar="WORD", help="calls what was learnt (default: sks)")
    group.add_argument("--class-prompt", metavar="TEXT",
                       help="describes what they are a kind of, which the model then keeps: "
                            "'a photo of a dog'")
    group.add_argument("--class-images", type=path, metavar="FOLDER",
                       help="pictures of the class; the model makes those that are missing "
                            "(default: OUTPUT.state/class)")
    _numbers(group, {
        "--num-class-images": ("N", "pictures of the class (default: 100)"),
        "--prior-weight": ("W", "weight of the class in the loss (default: 1.0)"),
        "--resolution": ("N", "side of the pictures in pixels (default: the model's)"),
    })


def adapter_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters and training")
    group.add_argument("--targets", nargs="*", metavar="GLOB",
                       help="only attentions with such names, like '*.attn2' (default: all)")
    group.add_argument("--init", choices=INITS,
                       help="zero begins at what the model computes; linear is the published "
                            "start (default: zero)")
    _numbers(group, {
        "--rank": ("N", "columns that each head gets (default: 2)"),
        "--steps": ("N", "updates (default: 500)"),
        "-b --batch-size": ("N", "pictures per step over all processes, and as many of the class "
                                 "(default: 1)"),
        "--lr": ("LR", "learning rate at the start; it falls to 0 (default: 0.0025)"),
        "--weight-decay": ("W", "default: 0.01"),
        "--clip-grad": ("NORM", "the largest norm of the gradient; 0: any (default: 1.0)"),
        "--alpha": ("A", "written into the file, to use the adapters with (default: 1.0)"),
        "--sample-steps": ("N", "make sample pictures every N steps, for the report "
                                "(default: never)"),
        "--checkpoint-steps": ("N", "write the training state every N steps, too "
                                    "(default: time decides)"),
        "--checkpoint-seconds": ("S", "write it when it is older than S seconds, too "
                                      "(default: 60.0)"),
    })
    group.add_argument("--state-dir", type=path, metavar="DIR",
                       help="where the training state goes (default: OUTPUT.state)")
    for flag, text in (("--amp", "bfloat16 autocast"),
                       ("--gradient-checkpointing", "less memory, more time"),
                       ("--half", "write the adapters in float16"),
                       ("--resume", "go on from the training state of an interrupted run"),
                       ("--no-report", "write no report.html beside the adapters")):
        group.add_argument(flag, action="store_true", help=text)
    group.add_argument("-o", "--output", type=path, metavar="DIR",
                       help="folder to write adapters.safetensors into, absent or empty")


def picture_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("--adapters", type=path, nargs="*", default=[], metavar="FILE",
                       help="one or several; without any the model is taken as it is")
    group.add_argument("--alpha", type=number(CUSTOMIZATION["alpha"]), nargs="*", metavar="A",
                       help="a number for each file; 0.7 to 0.8 weakens what was learnt "
                            "(default: the files')")
    group.add_argument("--prompt", nargs="*", default=[], metavar="TEXT",
                       help="one or several, with the token of each file")
    group.add_argument("--count", type=number(NUMBER), default=4, metavar="N",
                       help="pictures of each prompt, in a row (default: %(default)s)")
    group.add_argument("--num-inference-steps", type=number(NUMBER), default=25, metavar="N",
                       help="steps of denoising (default: %(default)s)")
    group.add_argument("--guidance-scale", type=number(NOT_NEGATIVE), default=7.5, metavar="S",
                       help="how strictly the prompt is followed; 1: not more than learnt "
                            "(default: %(default)s)")
    group.add_argument("--scale", type=number(Limit(1, 64, whole=True)), default=1, metavar="N",
                       help="show every pixel N times as large (default: %(default)s)")
    group.add_argument("--no-verify", action="store_true",
                       help="take adapters that were made beside other weights")
    group.add_argument("-o", "--output", type=path, metavar="FILE.png",
                       help="the grid of pictures to write")
