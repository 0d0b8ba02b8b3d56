"""adacomcat recover: distil the dense model's features into a compressed one, without labels."""

import argparse
import time

import torch
from torch import nn

from adacomcat import checkpoint, data
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.distill.recovery import RecoveryConfig, feature_error, recover
from adacomcat.errors import UserError
from adacomcat.report.files import record
from adacomcat.report.page import write_page
from adacomcat.report.provenance import run_content

MEASURED = 64  # images on which the features' error is measured before and after


def run(args: argparse.Namespace) -> Outcome:
    checkpoint.require_empty(args.output)
    device = inputs.device(args)
    student = inputs.model(args).to(device)
    teacher = inputs.teacher(args).to(device)
    images = _images(args, student)
    config = _config(args)
    sample = torch.stack([images[i][0] for i in range(min(MEASURED, len(images)))]).to(device)
    before, start = feature_error(student, teacher, sample), time.perf_counter()
    batches = data.EndlessBatches(images, min(args.batch_size, len(images)), args.seed,
                                  num_workers=args.workers)
    student = recover(student, teacher, batches, config)
    seconds = time.perf_counter() - start
    after = feature_error(student, teacher, sample)
    checkpoint.save(student.cpu(), args.output, gauge=args.gauge)
    found = {"images": len(images), "error_before": before, "error_after": after,
             "seconds": seconds}
    if not args.no_report:
        record(args.output, "run", run_content(args.invocation, teacher.cpu(), student, args.output,
                                               recovery=found))
        write_page([args.output])
    return Outcome({"output": args.output} | found,
                   lambda: print(f"error of the features on {len(sample)} of these images: "
                                 f"{before:.3f} → {after:.3f}, {seconds:.0f} s; "
                                 f"written to {args.output}"))


def _config(args: argparse.Namespace) -> RecoveryConfig:
    """A flag that is not given leaves the default."""
    given = {"minutes": args.minutes, "steps": args.steps, "lr": args.lr,
             "block_weight": args.block_weight, "ema_decay": args.model_ema_decay}
    return RecoveryConfig(**{name: value for name, value in given.items() if value is not None},
                          amp=args.amp, seed=args.seed).checked()


def _images(args: argparse.Namespace, model: nn.Module) -> data.LabelledImages:
    """The images to train on; their labels are not looked at."""
    if args.images is not None:
        return data.pictures_under(args.images, data.model_data_config(model))
    if args.data is None:
        raise UserError("recover needs --images FOLDER or --data")
    return inputs.train_and_test(args, model, labels_matter=False)[0]
