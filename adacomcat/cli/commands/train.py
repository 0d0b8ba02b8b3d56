"""adacomcat train: search ranks, train and distil; or train a model as it is."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from adacomcat import checkpoint, cost, data, train
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.cli.commands.state import alone, require_fresh
from adacomcat.convert.record import compression_of
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.state import FILE
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError, reason
from adacomcat.plan import RankPlan
from adacomcat.report.page import write_report
from adacomcat.report.tables import Comparison, print_comparison, print_refinement
from adacomcat.utils.distributed import stop_processes
from adacomcat.utils.files import atomic_write_text, require_writable
from adacomcat.utils.launch import is_first, was_restarted
from adacomcat.utils.stopping import heeding_signals
from adacomcat.utils.text import parse_json, read_text, to_json

# Flags that are fields of TrainConfig; where one is not given, the preset's value stays.
FIELDS = ("epochs", "finetune_epochs", "steps", "batch_size", "opt", "lr", "weight_decay", "sched",
          "warmup_epochs", "warmup_lr", "min_lr", "clip_grad", "mixup", "cutmix", "smoothing",
          "kd", "kd_alpha", "kd_temperature", "align", "align_weight", "keep_params", "search",
          "search_steps", "search_fraction", "refine", "mlp", "calibration_images",
          "checkpoint_steps", "checkpoint_seconds", "seed", "workers", "device", "timeout")
RESULTS = "results.json"  # in the folder of the training state
EMA_DECAY = 0.9998  # of --model-ema without --model-ema-decay


def run(args: argparse.Namespace) -> Outcome:
    state = Path(args.state_dir or f"{args.output.rstrip('/')}.state")
    _require_budget(args)
    args.resume = args.resume or was_restarted()
    if args.resume and checkpoint.is_checkpoint(args.output):
        return _finished(args, state)
    checkpoint.require_empty(args.output)
    require_fresh(state, args.resume)
    config = _config(args, state)
    with alone(state, args.output), heeding_signals():
        return _trained(args, config, state)


def _trained(args: argparse.Namespace, config: TrainConfig, state: Path) -> Outcome:
    """Train, then write the checkpoint, then the report, and then remove the state."""
    inputs.device(args)
    model = inputs.model(args, weights_matter=not args.dense)
    _require_room(model, args.output, state)
    teacher = None if args.teacher is None else inputs.teacher(args)
    if teacher is not None and config.kd != "none":
        require_teacher(model, teacher)
    train_set, test_set = data.train_and_test(*inputs.dataset(args), data.model_data_config(model))
    plan = None if args.plan is None else RankPlan.load(args.plan)
    if plan is not None:
        plan.validate(model)
    trained, results = train.run(model, config, train_set, test_set, teacher=teacher, plan=plan)
    if is_first():
        atomic_write_text(state / RESULTS, to_json(results), durable=True)
        checkpoint.save(trained.cpu(), args.output, gauge=args.gauge)
    stop_processes()
    return _reported(args, state, model, trained, results)


def _reported(args: argparse.Namespace, state: Path, model: nn.Module, trained: nn.Module,
              results: dict[str, Any]) -> Outcome:
    comparison = _comparison(model, trained, results)
    if is_first():
        if not args.no_report:
            found = compression_of(trained).plan or RankPlan()
            write_report(args.output, f"{args.model} trained on {args.data}", comparison,
                         found.sites(model), found, results["history"])
        shutil.rmtree(state, ignore_errors=True)
    return Outcome({"output": args.output, "models": comparison.rows} | results,
                   lambda: _show(args, comparison, results))


def _finished(args: argparse.Namespace, state: Path) -> Outcome:
    """What is left to do of a run whose checkpoint is there: its report, and removing its state."""
    if (state / RESULTS).is_file():
        try:
            results = parse_json(read_text(state / RESULTS))
        except ValueError as error:
            raise UserError(f"{args.output} is finished, but {state / RESULTS} is damaged "
                            f"({reason(error)}); remove {state}") from error
        return _reported(args, state, inputs.model(args, weights_matter=False),
                         checkpoint.load(args.output), results)
    return Outcome({"output": args.output, "finished": True},
                   lambda: print(f"{args.output} is finished; there is nothing to resume"))


def _require_room(model: nn.Module, output: str, state: Path) -> None:
    """Room for the checkpoint and for the weights with their optimiser's two moments."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if is_first():
        require_writable(Path(output) / checkpoint.CONFIG, size)
        require_writable(state / FILE, 4 * size)


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
