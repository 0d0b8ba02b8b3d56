"""The flags of the commands that train, in timm's spelling where timm has them.

``cli.arguments`` puts them together. This module imports neither torch nor timm, so that --help
answers at once. Flags of ``train`` have no defaults: ``TrainConfig`` or the preset decides.
"""

import argparse
from collections.abc import Mapping

from adacomcat.cli.values import key_value, number, number_or, path
from adacomcat.utils.limits import CHOICES, DECAY, FRACTION, RECOVERY, TRAINING, Limit
from adacomcat.utils.presets import explained


def keep_params_or_plan(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--keep-params", type=number(FRACTION), metavar="FRACTION",
                       help="share of the model's parameters to keep: 0.5 or 50%%")
    group.add_argument("--plan", type=path, metavar="FILE", help="a rank plan, as JSON")


def train(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budget (one of)")
    keep_params_or_plan(group)
    group.add_argument("--dense", action="store_true", help="train the model as it is")
    group.add_argument("--adapters", type=number(TRAINING["adapters"]), metavar="RANK",
                       help="train adapters of this rank beside every attention, and the "
                            "classifier, of a model that stays as it is")
    group = parser.add_argument_group("training")
    group.add_argument("--preset", choices=CHOICES["preset"], default="adacomcat",
                       help="settings of ComCAT or Adaptive-ComCAT as they were published; other "
                            "flags win over them (see below)")
    parser.epilog = explained()
    _add(group, {
        "-b --batch-size": ("N", "images per step over all processes (default: 128)"),
        "--grad-accum-steps": ("N", "take the images of a step in N passes, for less memory "
                                    "(default: 1)"),
        "--epochs": ("N", "0 compresses without training (default: 10)"),
        "--finetune-epochs": ("N", "further epochs, at the ranks found (default: 0)"),
        "--steps": ("N", "end every epoch after N steps (default: after all images)"),
        "--smoothing": ("S", "label smoothing (default: 0.1)"),
        "--drop-path": ("RATE", "stochastic depth of the last block, falling to 0 in the first "
                                "(default: the model's)"),
        "--model-ema-decay": ("D", "decay of the averaged weights (with --model-ema: 0.9998)"),
        "--amp-dtype": (CHOICES["amp_dtype"], "of --amp; with float16 the loss is scaled "
                                              "(default: bfloat16)"),
        "--checkpoint-steps": ("N", "write the training state every N steps, too "
                                    "(default: time decides)"),
        "--checkpoint-seconds": ("S", "write it when it is older than S seconds, too "
                                      "(default: 60.0)"),
        "--state-dir": ("DIR", "where the training state goes (default: OUTPUT.state)"),
    })
    told = parser.add_argument_group("what is told while it trains")
    told.add_argument("--metrics", type=path, metavar="FILE",
                      help="append every step, search and epoch to this file, a line of JSON each")
    told.add_argument("--tensorboard", type=path, metavar="DIR",
                      help="write scalars for TensorBoard (needs the package tensorboard)")
    _switches(group, {
        "--model-ema": "average the weights, and save the average",
        "--bce-loss": "binary cross-entropy of every class, which takes --smoothing 0",
        "--amp": "autocast to 16 bits",
        "--keep-best": "keep the epoch that did best on the test images in OUTPUT/best, too; its "
                       "accuracy there flatters it",
        "--resume": "go on from the training state of an interrupted run"})


def optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimiser")
    _add(group, {
        "--opt": ("NAME", "timm's name of an optimiser (default: adamw)"),
        "--lr": ("LR", "the highest learning rate (default: 0.0005)"),
        "--lr-base": ("N", "scale the learning rate by the batch size over N; 0 or none: take it "
                           "as it is (default: none)"),
        "--weight-decay": ("W", "default: 0.05"),
        "--momentum": ("M", "of an optimiser that has one (default: 0.9)"),
        "--opt-eps": ("EPS", "ε of the optimiser (default: its own)"),
        "--clip-grad": ("NORM", "the largest norm of the gradient; 0 or none: any (default: 1.0)"),
        "--sched": ("NAME", "timm's name of a schedule (default: cosine)"),
        "--sched-per": (CHOICES["sched_per"], "how often the learning rate moves (default: step)"),
        "--warmup-epochs": ("N", "epochs until the highest learning rate (default: 0.0)"),
        "--warmup-lr": ("LR", "learning rate at the start of the warmup (default: 1e-06)"),
        "--min-lr": ("LR", "learning rate at the end (default: 1e-06)"),
    })
    group.add_argument("--opt-betas", type=number(DECAY), nargs="+", metavar="B",
                       help="β of the optimiser (default: its own)")


def augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation (--aa to --train-interpolation: pictures)")
    _switches(group, {"--no-augment": "train on the images as they are"})
    _add(group, {
        "--aa": ("NAME", "RandAugment, AugMix or AutoAugment as timm spells them, or none "
                         "(default: none)"),
        "--color-jitter": ("C", "change of colours; --aa leaves it out (default: 0.4)"),
        "--reprob": ("P", "probability of random erasing (default: 0.0)"),
        "--remode": (CHOICES["remode"], "what random erasing puts there (default: const)"),
        "--recount": ("N", "regions that random erasing takes (default: 1)"),
        "--train-interpolation": (CHOICES["train_interpolation"],
                                  "how training pictures are resized (default: the model's)"),
        "--repeated-aug": ("N", "an image stands N times in the order of an epoch, which sees so "
                                "many images fewer (default: 1)"),
        "--mixup": ("ALPHA", "α of mixup (default: 0.0)"),
        "--cutmix": ("ALPHA", "α of CutMix (default: 0.0)"),
        "--mixup-prob": ("P", "probability of mixup or CutMix (default: 1.0)"),
        "--mixup-switch-prob": ("P", "probability of CutMix where both are on (default: 0.5)"),
        "--mixup-mode": (CHOICES["mixup_mode"], "what is mixed alike (default: batch)"),
    })
    group.add_argument("--cutmix-minmax", type=number(DECAY), nargs=2, metavar=("MIN", "MAX"),
                       help="shares of an image that CutMix takes, in place of --cutmix's")


def search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rank search and distillation")
    teacher(group, "timm architecture, or a checkpoint folder (default: the model itself)")
    _add(group, {
        "--search": (CHOICES["search"], "when to search (default: adaptive)"),
        "--search-steps": ("N", "batches of one search; 0 or all: once through its images "
                                "(default: 50)"),
        "--search-batch-size": ("N", "images of a batch of the search (default: --batch-size)"),
        "--search-beta": ("B", "exponent of the penalty for parameters beyond the budget "
                               "(default: 1.5)"),
        "--search-images": (CHOICES["search_images"],
                            "what the search sees: held-out training images, or validation "
                            "images, which judge the result, too (default: held-out)"),
        "--search-fraction": ("F", "share of the training images that is held out for the search "
                                   "(default: 0.1)"),
        "--rank-multiple": ("N", "ranks per head are multiples of N, other ranks of 2 N "
                                 "(default: 8)"),
        "--mlp": (CHOICES["mlp"], "what is chosen of MLPs: how many hidden neurons stay, which "
                                  "needs calibration images, or ranks (default: neurons)"),
        "--calibration-images": ("N", "training images that calibrate; with 0, weights alone "
                                      "decide (default: 256)"),
        "--kd": (CHOICES["kd"], "distillation of the teacher's outputs (default: soft)"),
        "--kd-alpha": ("A", "weight of distillation (default: 0.5)"),
        "--kd-temperature": ("T", "temperature of soft distillation (default: 2.0)"),
        "--kd-reduction": (CHOICES["kd_reduction"],
                           "soft distillation is a mean over images, or over all outputs "
                           "(default: batchmean)"),
        "--align": (CHOICES["align"],
                    "alignment of block outputs with the teacher's (default: mse)"),
        "--align-weight": ("W", "weight of the alignment (default: 1.0)"),
    })
    _switches(group, {"--no-attention-biases":
                      "the biases of attentions that ComCAT's presets drop stay away for good; "
                      "else they are trained again at fixed ranks"})


def recovery(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recovery")
    teacher(group, "the dense model: timm architecture, or a checkpoint folder")
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


def teacher(group: argparse._ArgumentGroup, default: str) -> None:
    _add(group, {
        "--teacher": ("NAME|DIR", default),
        "--teacher-checkpoint": ("FILE|URL",
                                 "the teacher's weights (default: timm's pretrained ones)"),
    })
    group.add_argument("--teacher-kwargs", type=key_value, nargs="*", default=[], metavar="K=V",
                       help="further arguments of the teacher's timm architecture (default: "
                            "--model-kwargs where it is the model's)")


def _add(group: argparse._ArgumentGroup, flags: dict[str, tuple[str | tuple[str, ...], str]],
         limits: Mapping[str, Limit] = TRAINING) -> None:
    """Add flags: names → (metavar or choices, help). ``limits`` says which are numbers."""
    for names, (shown, text) in flags.items():
        name = names.split()[-1].removeprefix("--").removeprefix("model-").replace("-", "_")
        if isinstance(shown, tuple):
            group.add_argument(*names.split(), choices=shown, help=text)
            continue
        name = RENAMED.get(name, name)
        kind = _SPELLED.get(name) or (number(limits[name]) if name in limits else str)
        group.add_argument(*names.split(), type=kind, metavar=shown, help=text)


def _switches(group: argparse._ArgumentGroup, flags: dict[str, str]) -> None:
    for name, text in flags.items():
        group.add_argument(name, action="store_true", help=text)


# Flags of ``train`` whose setting has another name.
RENAMED = {"search_beta": "beta", "model_ema_decay": "ema_decay"}
# Flags of ``_add`` that have more spellings than a number or a word.
_SPELLED = {"clip_grad": number_or("none", TRAINING["clip_grad"]), "state_dir": path,
            "lr_base": number_or("none", TRAINING["lr_base"]), "teacher_checkpoint": path,
            "search_steps": number_or("all", TRAINING["search_steps"])}
