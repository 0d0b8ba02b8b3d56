"""From flags to the model, the device, the data and the compressed model, for all commands."""

import argparse
import contextlib
import copy
import os
import warnings
from typing import Any

import timm
import torch
from torch import Tensor, nn

from adacomcat import checkpoint, data
from adacomcat.calibration import Calibration
from adacomcat.cli.arguments import EXCLUSIVE
from adacomcat.cli.config_file import value_of
from adacomcat.cli.download import quick_downloads
from adacomcat.compression import compress
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.utils.distributed import usable_device

HUGGING_FACE = "hf:"  # in front of a local folder that transformers wrote


def device(args: argparse.Namespace) -> torch.device:
    """The device of --device, which works."""
    return usable_device(args.device)


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """timm's keyword arguments from --num-classes, --img-size, --in-chans and --model-kwargs.

    Raises:
        UserError: a value is no YAML, or the argument is none of a model's.
    """
    found = {name: getattr(args, name) for name in ("num_classes", "img_size", "in_chans")}
    for key, text in args.model_kwargs:
        if key in checkpoint.NO_MODEL_ARGS:
            raise UserError(f"--model-kwargs {key}: this is no argument of a model; weights come "
                            "from --pretrained and --checkpoint")
        try:
            found[key] = value_of(text)
        except ValueError as error:
            raise UserError(f"--model-kwargs {key}={text:.40}: {error}") from error
    return {name: value for name, value in found.items() if value is not None}


def model(args: argparse.Namespace, weights_matter: bool = True, *,
          keep_head: bool = False) -> nn.Module:
    """The model of a checkpoint folder, or a timm architecture with its weights, in eval mode.

    Args:
        weights_matter: warn where a timm architecture is left with random weights.
        keep_head: refuse a --checkpoint without a classifier of the model's classes.

    Raises:
        UserError: there is no such folder or architecture, or flags do not fit it.
    """
    name, overrides = folder_name(args.model), model_args(args)
    if is_folder(args.model):
        if args.pretrained or args.checkpoint:
            raise UserError(f"the folder {name} has its own weights; leave out --pretrained and "
                            "--checkpoint")
        found = checkpoint.load(name, verify=not args.no_verify)
        if overrides and args.model.startswith(HUGGING_FACE):
            raise UserError(f"{args.model} is built as its config.json says; leave out "
                            "--num-classes, --img-size, --in-chans and --model-kwargs")
        return found if not overrides else _overridden(name, overrides)
    checkpoint.require_architecture(name)
    torch.manual_seed(getattr(args, "seed", 0))  # random weights: the same on every process
    if args.pretrained and args.checkpoint:
        raise UserError("--pretrained and --checkpoint exclude each other; say one of them")
    found = _create(name, args.pretrained, overrides)
    if args.checkpoint:
        weights = checkpoint.read_weights(args.checkpoint)
        checkpoint.load_foreign_(found, weights, args.checkpoint, keep_head=keep_head)
    elif weights_matter and not args.pretrained:
        warnings.warn(f"{name} has random weights; --pretrained or --checkpoint give it others",
                      stacklevel=2)
    return found.eval()


def outline(args: argparse.Namespace) -> nn.Module | None:
    """The architecture that -m names, on the meta device, where nothing gives it weights.

    Raises:
        UserError: there is no such architecture, or arguments do not fit it.
    """
    if is_folder(args.model) or args.pretrained or args.checkpoint:
        return None
    checkpoint.require_architecture(args.model)
    return checkpoint.outline(args.model, model_args(args)).eval()


def folder_name(name: str) -> str:
    """The folder that -m or --teacher means, without 'local-dir:' or 'hf:'."""
    return name.removeprefix("local-dir:").removeprefix(HUGGING_FACE)


def is_folder(name: str) -> bool:
    """Whether -m or --teacher means a checkpoint folder: it has a /, or is a folder here.

    Where a folder has the name of an architecture, it is the folder if it holds a model, and a
    warning says so.
    """
    if name.startswith(("local-dir:", HUGGING_FACE)) or "/" in name:
        return True
    if not os.path.isdir(name):
        return False
    if not timm.is_model(name):
        return True
    if not os.path.exists(os.path.join(name, "config.json")):
        return False
    warnings.warn(f"{name} is an architecture of timm and a folder here: the folder is taken; "
                  "move it away if you mean the architecture", stacklevel=2)
    return True


def teacher(args: argparse.Namespace) -> nn.Module:
    """--teacher: a checkpoint folder, or a timm architecture with --teacher-checkpoint or timm's
    pretrained weights.

    A folder knows its own architecture. Another architecture than the model's has the model's
    classes, channels and image size, and --teacher-kwargs in place of --model-kwargs.

    Raises:
        UserError: there is no such model.
    """
    if is_folder(args.teacher):
        if args.teacher_checkpoint:
            raise UserError(f"the folder {args.teacher} has its own weights; leave out "
                            "--teacher-checkpoint")
        return checkpoint.load(folder_name(args.teacher))
    other = copy.copy(args)
    other.model, other.checkpoint = args.teacher, args.teacher_checkpoint
    other.pretrained = args.teacher_checkpoint is None
    if args.teacher_kwargs or not (args.teacher == args.model or is_folder(args.model)):
        other.model_kwargs = args.teacher_kwargs
    if args.img_size is not None and not _takes_size(args.teacher):
        other.img_size = None
    return model(other, keep_head=getattr(args, "kd", "none") != "none")


def _takes_size(architecture: str) -> bool:
    """Whether a model is built for one size of images, as convolutional networks are not."""
    checkpoint.require_architecture(architecture)
    try:
        with torch.device("meta"):
            timm.create_model(architecture, img_size=224)
    except TypeError:
        return False
    except Exception:  # it knows the argument, and not this size
        return True
    return True


def _create(name: str, pretrained: bool, overrides: dict[str, Any]) -> nn.Module:
    remote = pretrained and not name.startswith("local-dir:")
    with quick_downloads() if remote else contextlib.nullcontext(True) as reachable:
        try:
            return checkpoint.create(name, overrides, pretrained=pretrained)
        except OSError as error:
            reason = error if reachable else "no answer from its server, and none in the cache"
            raise UserError(f"cannot get pretrained weights of {name} ({reason}); "
                            "pass --checkpoint FILE") from error


def _overridden(folder: str, overrides: dict[str, Any]) -> nn.Module:
    """The model of a folder with another image size, other classes or other arguments."""
    return _create(f"local-dir:{folder}", True, overrides).eval()


def dataset(args: argparse.Namespace) -> tuple[str, str | None]:
    """(name, data_dir) as ``data.train_and_test`` takes them; --data FOLDER gives both.

    Raises:
        UserError: --data is neither a dataset nor a folder.
    """
    if args.data in (*data.ARRAY_DATASETS, "folder"):
        return args.data, args.data_dir
    if os.path.isdir(args.data):
        return "folder", args.data
    if data.is_named(args.data):
        return args.data, args.data_dir
    raise UserError(f"--data {args.data} is neither a folder nor a dataset; the datasets are "
                    f"{', '.join(data.ARRAY_DATASETS)}, and timm's torch/… and hfds/…")


def train_and_test(args: argparse.Namespace, model: nn.Module, labels_matter: bool = True
                   ) -> tuple[data.LabelledImages, data.LabelledImages]:
    """Training set and test set of --data, as ``model`` wants them.

    Raises:
        UserError: there is no such dataset, or its classes are not the model's where they matter.
    """
    splits = data.Splits(args.train_split, args.val_split, args.dataset_download)
    return data.train_and_test(*dataset(args), _seen(args, model, labels_matter), splits)


def _seen(args: argparse.Namespace, model: nn.Module, labels_matter: bool) -> dict[str, Any]:
    """timm's data configuration of ``model`` with what the flags change."""
    config = data.model_data_config(model)
    if not labels_matter:
        del config["num_classes"]
    return config | ({} if args.crop_pct is None else {"crop_pct": args.crop_pct})


def pictures(args: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """The images that calibrate, (N, C, H, W) as the model sees them; None where weights decide."""
    if args.calibration_dir is not None:
        images = data.pictures_under(args.calibration_dir, _seen(args, model, False))
    elif args.data is not None and args.calibration_images:
        images, _ = train_and_test(args, model, labels_matter=False)
    else:
        return None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    chosen = order[:args.calibration_images or len(images)]
    return torch.stack([images[index][0] for index in chosen.tolist()])


def calibration(args: argparse.Namespace, images: Tensor | None) -> Tensor | None:
    """The images with the collages of --collages; None stays None."""
    return None if images is None else data.with_collages(images, args.collages, args.seed)


def some(images: Any, count: int | None, seed: int) -> Any:
    """``count`` random images of a dataset; all of them where it has no more."""
    if count is None or count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.subset(order[:count])


def has_budget(args: argparse.Namespace) -> bool:
    """Whether one of the budget's flags is given."""
    return any(getattr(args, name) is not None for name in EXCLUSIVE)


def compressed(args: argparse.Namespace, model: nn.Module,
               images: Tensor | Calibration | None, **settings: Any) -> nn.Module:
    """A compressed copy of ``model`` at a budget or --plan.

    Args:
        images: what calibrates; None: weights alone decide.
        settings: further arguments of ``compress``.

    Raises:
        UserError: no budget is given, or none of its plans fits.
    """
    if not has_budget(args):
        raise UserError(f"{args.command} needs one of --keep-params, --keep-macs, "
                        "--keep-bytes, --max-latency-ms and --plan")
    plan = None if args.plan is None else RankPlan.load(args.plan)
    return compress(model, keep_params=args.keep_params, keep_macs=args.keep_macs,
                    keep_bytes=args.keep_bytes, bits=args.bits,
                    max_latency_ms=args.max_latency_ms, plan=plan, calibration=images,
                    include=args.include, exclude=args.exclude, deploy=args.deploy,
                    multiple=args.rank_multiple, latency_batch=args.latency_batch, **settings)
