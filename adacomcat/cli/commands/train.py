"""adacomcat train: search ranks, train and distil; or train a model as it is."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from adacomcat import checkpoint, cost, data, train
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.record import compression_of
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.state import has_state
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.report.page import write_report
from adacomcat.report.tables import Comparison, print_comparison, print_refinement
from adacomcat.utils.distributed import stop_processes
from adacomcat.utils.launch import is_first

# Flags that are fields of TrainConfig; where one is not given, the preset's value stays.
FIELDS = ("epochs", "finetune_epochs", "steps", "batch_size", "opt", "lr", "weight_decay", "sched",
          "warmup_epochs", "warmup_lr", "min_lr", "clip_grad", "mixup", "cutmix", "smoothing",
          "kd", "kd_alpha", "kd_temperature", "align", "align_weight", "keep_params", "search",
          "search_steps", "search_fraction", "refine", "mlp", "calibration_images",
          "checkpoint_steps", "seed", "workers", "device")
EMA_DECAY = 0.9998  # of --model-ema without --model-ema-decay


def run(args: argparse.Namespace) -> Outcome:
    state = Path(args.state_dir or f"{args.output.rstrip('/')}.state")
    checkpoint.require_empty(args.output)
    _require_budget(args)
    if has_state(state) and not args.resume:
        raise UserError(f"{state} holds the state of an earlier run; pass --resume to go on with "
                        "it, or remove it")
    config = _config(args, state)
    inputs.device(args)
    model = inputs.model(args, weights_matter=not args.dense)
    teacher = None if args.teacher is None else inputs.teacher(args)
    if teacher is not None and config.kd != "none":
        require_teacher(model, teacher)
    train_set, test_set = data.train_and_test(*inputs.dataset(args), data.model_data_config(model))
    plan = None if args.plan is None else RankPlan.load(args.plan)
    if plan is not None:
        plan.validate(model)
    trained, results = train.run(model, config, train_set, test_set, teacher=teacher, plan=plan)
    first = is_first()
    if first:
        checkpoint.save(trained.cpu(), args.output, gauge=args.gauge)
        shutil.rmtree(state, ignore_errors=True)
    stop_processes()
    comparison = _comparison(model, trained, results)
    if first and not args.no_report:
        found = compression_of(trained).plan or RankPlan()
        write_report(args.output, f"{args.model} trained on {args.data}", comparison,
                     found.sites(model), found, results["history"])
    return Outcome({"output": args.output, "models": comparison.rows} | results,
                   lambda: _show(args, comparison, results))


def _require_budget(args: argparse.Namespace) -> None:
    budget = args.keep_params is not None or args.plan is not None
    if args.dense and budget:
        raise UserError("--dense trains the model as it is; leave out --keep-params and --plan")
    if not (args.dense or budget or args.search == "off"):
        raise UserError("train needs --keep-params FRACTION, --plan FILE or --dense")


def _config(args: argparse.Namespace, state: Path) -> TrainConfig:
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if args.model_ema or args.model_ema_decay is not None:
        decay = args.model_ema_decay
        given["ema_decay"] = EMA_DECAY if decay is None else decay
    flags = {"amp": args.amp, "augment": not args.no_augment, "resume": args.resume}
    return TrainConfig.preset(args.preset, state_dir=str(state), **flags, **given)


def _comparison(model: nn.Module, trained: nn.Module, results: dict[str, Any]) -> Comparison:
    rows = {"given": {"params": results["dense_params"], "macs": cost.model_macs(model)},
            "trained": {"params": results["params"], "macs": cost.model_macs(trained)}}
    for name, key in (("given", "dense_top1"), ("trained", "top1")):
        if key in results:
            rows[name]["top1"] = results[key]
    if "loss" in results:
        rows["trained"]["loss"] = results["loss"]
    return Comparison(rows)


def _show(args: argparse.Namespace, comparison: Comparison, results: dict[str, Any]) -> None:
    print_comparison(f"{args.model} on {args.data}", comparison)
    print_refinement(results.get("refinement"))
    searched = f", {results['search_count']} searches" if results.get("search_count") else ""
    print(f"{results['seconds']:.0f} s{searched}; written to {args.output}")
