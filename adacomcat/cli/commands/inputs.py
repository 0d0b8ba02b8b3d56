"""From flags to the model, the device, the data and the compressed model, for all commands."""

import argparse
import copy
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch import Tensor, nn

from adacomcat import checkpoint, data
from adacomcat.cli.arguments import EXCLUSIVE
from adacomcat.compression import compress
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan


def device(args: argparse.Namespace) -> torch.device:
    """The device of --device, which works.

    Raises:
        UserError: torch cannot use it.
    """
    try:
        found = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    return found


def model_args(args: argparse.Namespace) -> dict[str, Any]:
    """timm's keyword arguments from --num-classes, --img-size, --in-chans and --model-kwargs."""
    named = {name: getattr(args, name) for name in ("num_classes", "img_size", "in_chans")}
    return ({name: value for name, value in named.items() if value is not None}
            | {key: yaml.safe_load(value) for key, value in args.model_kwargs})


def model(args: argparse.Namespace, weights_matter: bool = True) -> nn.Module:
    """The model of a checkpoint folder, or a timm architecture with its weights, in eval mode.

    Args:
        weights_matter: warn where a timm architecture is left with random weights.

    Raises:
        UserError: there is no such folder or architecture, or flags do not fit it.
    """
    name, overrides = args.model.removeprefix("local-dir:"), model_args(args)
    if Path(name).is_dir() or name != args.model or "/" in name:
        if args.pretrained or args.checkpoint:
            raise UserError(f"the folder {name} has its own weights; leave out --pretrained and "
                            "--checkpoint")
        found = checkpoint.load(name, verify=not args.no_verify)
        return found if not overrides else _overridden(name, overrides)
    checkpoint.require_architecture(name)
    torch.manual_seed(getattr(args, "seed", 0))  # random weights: the same on every process
    if args.pretrained and args.checkpoint:
        raise UserError("--pretrained and --checkpoint exclude each other; say one of them")
    found = _create(name, args.pretrained, overrides)
    if args.checkpoint:
        checkpoint.load_weights_(found, checkpoint.read_weights(args.checkpoint), args.checkpoint)
    elif weights_matter and not args.pretrained:
        warnings.warn(f"{name} has random weights; --pretrained or --checkpoint give it others",
                      stacklevel=2)
    return found.eval()


def teacher(args: argparse.Namespace) -> nn.Module:
    """--teacher: a checkpoint folder, or a timm architecture with --teacher-checkpoint or timm's
    pretrained weights."""
    other = copy.copy(args)
    other.model, other.checkpoint = args.teacher, args.teacher_checkpoint
    other.pretrained = not (Path(args.teacher).is_dir() or args.teacher_checkpoint)
    return model(other)


def _create(name: str, pretrained: bool, overrides: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **overrides)
    except OSError as error:
        raise UserError(f"cannot get pretrained weights of {name} ({error}); "
                        "pass --checkpoint FILE") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"cannot make {name} with {overrides}: {error}") from error


def _overridden(folder: str, overrides: dict[str, Any]) -> nn.Module:
    return _create(f"local-dir:{folder}", True, overrides).eval()


def dataset(args: argparse.Namespace) -> tuple[str, str | None]:
    """(name, data_dir) as ``data.train_and_test`` takes them; --data FOLDER gives both.

    Raises:
        UserError: --data is neither a dataset nor a folder.
    """
    if args.data in (*data.ARRAY_DATASETS, "folder"):
        return args.data, args.data_dir
    if Path(args.data).is_dir():
        return "folder", args.data
    raise UserError(f"--data {args.data} is neither a folder nor a dataset; the datasets are "
                    f"{', '.join(data.ARRAY_DATASETS)}")


def pictures(args: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """The images that calibrate, (N, C, H, W) as the model sees them; None where weights decide."""
    config = data.model_data_config(model)
    del config["num_classes"]  # labels are not looked at
    if args.calibration_dir is not None:
        images = data.pictures_under(args.calibration_dir, config)
    elif args.data is not None and args.calibration_images:
        images, _ = data.train_and_test(*dataset(args), config)
    else:
        return None
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    chosen = order[:args.calibration_images or len(images)]
    return torch.stack([images[index][0] for index in chosen.tolist()])


def calibration(args: argparse.Namespace, images: Tensor | None) -> Tensor | None:
    """The images with the collages of --collages; None stays None."""
    return None if images is None else data.with_collages(images, args.collages, args.seed)


def has_budget(args: argparse.Namespace) -> bool:
    """Whether one of the budget's flags is given."""
    return any(getattr(args, name) is not None for name in EXCLUSIVE)


def compressed(args: argparse.Namespace, model: nn.Module, images: Tensor | None,
               **settings: Any) -> nn.Module:
    """A compressed copy of ``model`` at --keep-params, --keep-macs, --max-latency-ms or --plan.

    Args:
        images: what calibrates; None: weights alone decide.
        settings: further arguments of ``compress``.

    Raises:
        UserError: no budget is given, or none of its plans fits.
    """
    if not has_budget(args):
        raise UserError(f"{args.command} needs one of --keep-params, --keep-macs, "
                        "--max-latency-ms and --plan")
    plan = None if args.plan is None else RankPlan.load(args.plan)
    return compress(model, keep_params=args.keep_params, keep_macs=args.keep_macs,
                    max_latency_ms=args.max_latency_ms, plan=plan, calibration=images,
                    multiple=args.rank_multiple, latency_batch=args.latency_batch, **settings)
