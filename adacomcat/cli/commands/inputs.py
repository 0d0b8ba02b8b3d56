"""What several commands need: the model, the device, the data, calibration, compression."""

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
    """A checkpoint folder's model, or a timm architecture with its weights, in eval mode."""
    name, overrides = args.model.removeprefix("local-dir:"), model_args(args)
    if Path(name).is_dir() or name != args.model or "/" in name:
        if args.pretrained or args.checkpoint:
            raise UserError(f"the folder {name} has its own weights; leave out --pretrained and "
                            "--checkpoint")
        found = checkpoint.load(name)
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
    """(name, folder) as ``data.train_and_test`` takes them; ``--data FOLDER`` is both in one."""
    if args.data in (*data.ARRAY_DATASETS, "folder"):
        return args.data, args.data_dir
    if Path(args.data).is_dir():
        return "folder", args.data
    raise UserError(f"--data {args.data}: no such folder, and no dataset; "
                    f"those are {', '.join(data.ARRAY_DATASETS)}")


def pictures(args: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """Images (N, C, H, W) as the model sees them, or None for a data-free decomposition."""
    config = data.model_data_config(model)
    del config["num_classes"]  # labels are not looked at
    if args.calibration_dir is not None:
        images = data.image_tensor_files(args.calibration_dir, config)
        return images[_chosen(args, len(images))]
    if args.data is not None and args.calibration_images:
        train, _ = data.train_and_test(*dataset(args), config)
        return torch.stack([train[index][0] for index in _chosen(args, len(train)).tolist()])
    return None


def calibration(args: argparse.Namespace, images: Tensor | None) -> Tensor | None:
    """With the collages that are asked for."""
    return None if images is None else data.with_collages(images, args.collages, args.seed)


def _chosen(args: argparse.Namespace, count: int) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(args.seed))
    return order[:args.calibration_images or count]


def has_budget(args: argparse.Namespace) -> bool:
    return any(getattr(args, name) is not None for name in EXCLUSIVE)


def compressed(args: argparse.Namespace, model: nn.Module, images: Tensor | None,
               **settings: Any) -> nn.Module:
    """A compressed copy at --keep-params, --keep-macs, --max-latency-ms or --plan."""
    if not has_budget(args):
        raise UserError(f"{args.command} needs one of --keep-params, --keep-macs, "
                        "--max-latency-ms and --plan")
    plan = None if args.plan is None else RankPlan.load(args.plan)
    return compress(model, keep_params=args.keep_params, keep_macs=args.keep_macs,
                    max_latency_ms=args.max_latency_ms, plan=plan, calibration=images,
                    multiple=args.rank_multiple, latency_batch=args.latency_batch, **settings)
