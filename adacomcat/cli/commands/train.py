"""adacomcat train: search ranks, train and distil; or train a model as it is."""

import argparse
import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from adacomcat import checkpoint, cost, data, train
from adacomcat.cli import training_flags
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.cli.commands.state import METRICS, alone, require_fresh
from adacomcat.cli.config_file import flag
from adacomcat.customize.adapters import merge_, processors
from adacomcat.customize.files import save_adapters
from adacomcat.data import PictureAugmentation
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.metrics import JsonLines, Observer, TensorBoard, together
from adacomcat.distill.state import FILE
from adacomcat.distill.teacher import require_teacher
from adacomcat.errors import UserError, reason
from adacomcat.plan import RankPlan
from adacomcat.report.files import record
from adacomcat.report.live import live_view
from adacomcat.report.page import write_page
from adacomcat.report.provenance import run_content
from adacomcat.report.summary import print_summary
from adacomcat.report.tables import Comparison, print_comparison, print_refinement
from adacomcat.utils.distributed import stop_processes
from adacomcat.utils.files import atomic_folder, atomic_write_text, make_folder, require_writable
from adacomcat.utils.launch import is_first, was_restarted
from adacomcat.utils.stopping import heeding_signals
from adacomcat.utils.text import parse_json, read_text, to_json

# Flag → the field of TrainConfig that it sets; where it is not given, the preset's value stays.
FLAGS = {field.name: field.name for field in fields(TrainConfig)} | {
    flag: name for flag, name in training_flags.RENAMED.items()}
PICTURES = tuple(field.name for field in fields(PictureAugmentation))
# In the folder of the training state.
RESULTS, BEST = "results.json", "best"
ADAPTERS = "adapters.safetensors"  # in the output
STATUS_SECONDS = 2.0  # between two steps in METRICS
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
    _require_room(model, args.output, state, copies=4 + args.keep_best)
    teacher = None if args.teacher is None else inputs.teacher(args)
    if teacher is not None and config.kd != "none":
        require_teacher(model, teacher)
    train_set, test_set = inputs.train_and_test(args, model)
    plan = None if args.plan is None else RankPlan.load(args.plan)
    if plan is not None:
        plan.validate(model)
    keep = partial(_keep, state / BEST) if args.keep_best else None
    with _observed(args, state) as observer:
        trained, results = train.run(model, config, train_set, test_set, teacher=teacher,
                                     plan=plan, on_best=keep, observer=observer)
    if is_first():
        atomic_write_text(state / RESULTS, to_json(results), durable=True)
        trained = _written(trained.cpu(), Path(args.output), gauge=args.gauge)
    stop_processes()
    return _reported(args, state, model, trained, results)


def _written(model: nn.Module, folder: Path, gauge: bool = False) -> nn.Module:
    """Write ``model``; adapters are merged there, and stand in a small file of their own, too."""
    if not processors(model):
        checkpoint.save(model, folder, gauge=gauge)
        return model
    merged = copy.deepcopy(model)
    merge_(merged)
    with atomic_folder(folder, last=checkpoint.CONFIG) as scratch:
        checkpoint.save(merged, scratch, gauge=gauge)
        save_adapters(model, scratch / ADAPTERS)
    return merged


def _keep(folder: Path, model: nn.Module) -> None:
    """Put ``model`` in the place of the one that was the best before."""
    shutil.rmtree(folder, ignore_errors=True)
    _written(model.cpu(), folder)


@contextmanager
def _observed(args: argparse.Namespace, state: Path) -> Iterator[Observer]:
    """Who is told what happens: `status`, the terminal, --metrics and --tensorboard."""
    with live_view() as view:
        observers: list[Observer] = [] if view is None else [view]
        if is_first():
            observers.append(JsonLines(state / METRICS, STATUS_SECONDS))
            if args.metrics is not None:
                require_writable(args.metrics)
                make_folder(Path(args.metrics).resolve().parent)
                observers.append(JsonLines(args.metrics))
            if args.tensorboard is not None:
                observers.append(TensorBoard(args.tensorboard))
        yield together(observers)


def _reported(args: argparse.Namespace, state: Path, model: nn.Module, trained: nn.Module,
              results: dict[str, Any]) -> Outcome:
    comparison = _comparison(model, trained, results)
    if is_first():
        if (state / BEST).is_dir():
            shutil.move(state / BEST, Path(args.output) / BEST)
        if not args.no_report:
            record(args.output, "run", run_content(
                args.invocation, model, trained, args.output, measured=_measured(results),
                data=args.data, **{name: results[name] for name in ("history", "searches",
                                                                    "seconds")}))
            write_page([args.output])
        _remove(state)
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
    with suppress(OSError):  # a kill between the last file and its folder leaves it empty
        state.rmdir()
    return Outcome({"output": args.output, "finished": True},
                   lambda: print(f"{args.output} is finished; there is nothing to resume"))


def _remove(state: Path) -> None:
    """Remove the state, RESULTS last: where it is left, a run that goes on removes the rest."""
    with suppress(OSError):
        for path in state.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != RESULTS:
                path.unlink()
    shutil.rmtree(state, ignore_errors=True)


def _require_room(model: nn.Module, output: str, state: Path, copies: int) -> None:
    """Room for the checkpoint, and in the state for ``copies`` of the weights: weights with their
    optimiser's two moments, and the best model.
    """
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if is_first():
        require_writable(Path(output) / checkpoint.CONFIG, size)
        require_writable(state / FILE, copies * size)


def _require_budget(args: argparse.Namespace) -> None:
    budget = args.keep_params is not None or args.plan is not None
    if args.dense and budget:
        raise UserError("--dense trains the model as it is; leave out --keep-params and --plan")
    if args.adapters is not None and (budget or args.dense):
        raise UserError("--adapters trains beside a model that stays as it is; leave out "
                        "--keep-params, --plan and --dense")
    if not (args.dense or args.adapters or budget or args.search == "off"):
        raise UserError("train needs --keep-params FRACTION, --plan FILE, --adapters RANK or "
                        "--dense")


def _config(args: argparse.Namespace, state: Path) -> TrainConfig:
    given = {name: value for flag, name in FLAGS.items()
             if (value := getattr(args, flag, None)) is not None}
    if args.model_ema:
        given.setdefault("ema_decay", EMA_DECAY)
    if args.no_attention_biases:
        given["finetune_attention_biases"] = False
    given |= {"augment": not args.no_augment, "state_dir": str(state)}
    _require_pictures(args, given)
    return TrainConfig.preset(args.preset, **given)


def _require_pictures(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise a ``UserError`` where pictures are to be augmented and there are none."""
    asked = [flag(name) for name in PICTURES if name in given]
    if asked and args.data in data.ARRAY_DATASETS:
        raise UserError(f"the images of {args.data} have an augmentation of their own: leave out "
                        f"{', '.join(asked)}, or take pictures")


def _comparison(model: nn.Module, trained: nn.Module, results: dict[str, Any]) -> Comparison:
    rows = {"given": {"params": results["dense_params"], "macs": cost.model_macs(model)},
            "trained": {"params": results["params"], "macs": cost.model_macs(trained)}}
    for name, key in (("given", "dense_top1"), ("trained", "top1")):
        if key in results:
            rows[name]["top1"] = results[key]
    if "loss" in results:
        rows["trained"]["loss"] = results["loss"]
    return Comparison(rows)


def _measured(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measures of the test images, as run.json has them."""
    known = {"dense": {"top1": results.get("dense_top1")},
             "compressed": {"top1": results.get("top1"), "loss": results.get("loss")}}
    return {name: {key: value for key, value in row.items() if value is not None}
            for name, row in known.items()}


def _show(args: argparse.Namespace, comparison: Comparison, results: dict[str, Any]) -> None:
    print_comparison(f"{args.model} on {args.data}", comparison)
    print_refinement(results.get("refinement"))
    searched = f", {results['search_count']} searches" if results.get("search_count") else ""
    if "adapters" in results:
        print(f"adapters of {results['adapters']:,} parameters, and the classifier: "
              f"{Path(args.output) / ADAPTERS}")
    print(f"{results['seconds']:.0f} s{searched}; written to {args.output}")
    if args.keep_best and results.get("best"):
        print(f"best on the test images after epoch {results['best']['epoch']}: top-1 "
              f"{results['best']['top1']:.2f} %; written to {Path(args.output) / BEST}")
    if not args.no_report:
        print_summary(args.output, cards=False)
