"""adacomcat evaluate: accuracy with or without a head, and agreement with the dense model."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat import cost, data
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.distill.evaluation import require_finite_outputs, require_no_nan
from adacomcat.errors import UserError
from adacomcat.evaluation.agreement import agreement, flips
from adacomcat.evaluation.neighbours import knn_scores
from adacomcat.evaluation.passes import best_classes, classified, embedded, rows_of
from adacomcat.evaluation.probe import probe_scores
from adacomcat.evaluation.scores import measures
from adacomcat.report.page import add_to_page
from adacomcat.report.tables import Comparison, print_comparison, print_facts
from adacomcat.utils.distributed import Processes, start_processes, stop_processes
from adacomcat.utils.launch import is_first
from adacomcat.utils.model import class_count

GATE_FAILED = 3
HEADLESS: Mapping[str, Callable[..., Tensor]] = {"knn": knn_scores, "linear_probe": probe_scores}

Best = dict[str, Tensor]  # method → (N, 5) classes of each test image, the likeliest first


def run(args: argparse.Namespace) -> Outcome:
    _require_images(args)
    inputs.device(args)
    model = inputs.model(args)
    dense = None if args.teacher is None else inputs.teacher(args)
    if args.images is None:
        found = _accuracy(args, model, dense)
    else:
        found = {"pictures": args.images} | _agreement(args, model, dense)
    found = {"model": args.model, "params": cost.model_params(model),
             "bytes": cost.model_bytes(model)} | found
    gate = args.min_accuracy is not None and found["top1"] < args.min_accuracy
    found["passed"] = not gate
    if args.record is not None and is_first():
        add_to_page(args.record, "evaluation",
                    found | {"command": args.invocation})
    return Outcome(found, lambda: _show(args, found), GATE_FAILED if gate else 0)


def _require_images(args: argparse.Namespace) -> None:
    labels = args.knn or args.linear_probe or args.min_accuracy is not None
    if (args.data is None) == (args.images is None):
        raise UserError("evaluate needs one of --data and --images FOLDER")
    if args.images is not None and labels:
        raise UserError("the pictures of --images have no labels: --knn, --linear-probe and "
                        "--min-accuracy need --data")
    if args.images is not None and args.teacher is None:
        raise UserError("--images compares with the dense model: name it with --teacher")


def _agreement(args: argparse.Namespace, model: nn.Module,
               dense: nn.Module | None) -> dict[str, Any]:
    assert dense is not None  # _require_images
    device = inputs.device(args)
    pictures = data.pictures_under(args.images, data.model_data_config(model))
    chosen = inputs.some(pictures, args.test_images, args.seed)
    images = torch.stack([chosen[index][0] for index in range(len(chosen))])
    model, dense = model.to(device), dense.to(device)
    return {"agreement": agreement(model, dense, calibration_batches(images, model, "--images"))
            ._asdict()}


def _accuracy(args: argparse.Namespace, model: nn.Module,
              dense: nn.Module | None) -> dict[str, Any]:
    methods = [name for name in HEADLESS if getattr(args, name)]
    if not methods and not class_count(model):
        raise UserError(f"{args.model} has no classifier: pass --knn or --linear-probe")
    train, test = inputs.train_and_test(args, model, labels_matter=not methods)
    train = inputs.some(train, args.train_images, args.seed)
    test = inputs.some(test, args.test_images, args.seed)
    processes = start_processes(args.device, args.timeout)

    def judged(of: nn.Module) -> tuple[Best, dict[str, Any], Tensor]:
        of = of.to(processes.device)
        found = (_without_head(of, methods, train, test, args, processes) if methods
                 else _by_head(of, test, args, processes))
        require_no_nan(of)
        return found

    best, extra, labels = judged(model)
    before = None if dense is None else judged(dense)
    stop_processes()
    found = {name: measures(classes, labels) for name, classes in best.items()}
    first = next(iter(found))
    result = {"data": args.data, "images": len(test), "methods": found} | extra | {
        key: found[first][key] for key in ("top1", "top5")}
    if methods:
        result["train_images"] = len(train)
    if dense is not None and before is not None:
        result["dense"] = {"params": cost.model_params(dense),
                           "bytes": cost.model_bytes(dense), "methods": {
            name: measures(classes, labels) for name, classes in before[0].items()}} | before[1]
        result["flips"] = {name: flips(best[name], before[0][name], labels) for name in best}
    return result


def _by_head(model: nn.Module, test: Any, args: argparse.Namespace,
             processes: Processes) -> tuple[Best, dict[str, Any], Tensor]:
    rows = rows_of(classified, model, test, args.batch_size, processes, args.workers)
    loss = rows["loss"].double().mean().item()
    require_finite_outputs(int(rows["broken"].sum()), len(test), loss)
    return {"head": rows["best"]}, {"loss": loss}, rows["labels"]


def _without_head(model: nn.Module, methods: list[str], train: Any, test: Any,
                  args: argparse.Namespace, processes: Processes
                  ) -> tuple[Best, dict[str, Any], Tensor]:
    known, asked = (rows_of(embedded, model, part, args.batch_size, processes, args.workers)
                    for part in (train, test))
    for rows in (known, asked):
        broken = int((~rows["features"].isfinite()).any(1).sum())
        require_finite_outputs(broken, len(rows["features"]), 0.0)
    if len(known["labels"].unique()) < 2:
        raise UserError("the training images are all of one class: give more with --train-images")
    classes = 1 + int(torch.cat([known["labels"], asked["labels"]]).max())
    best = {name: best_classes(HEADLESS[name](known["features"], known["labels"],
                                              asked["features"], classes)) for name in methods}
    return best, {}, asked["labels"]


def _show(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if "agreement" in found:
        it = found["agreement"]
        print_facts(f"{args.model} beside {args.teacher} on {it['images']:,} pictures", {
            "error of the final tokens": f"{it['token_error']:.4f}",
            "cosine of the embeddings": _with_interval(it, "cosine", "{:.4f}"),
            "shared nearest neighbours": _with_interval(it, "neighbours", "{:.1f}") + " %"})
        return
    for name, values in found["methods"].items():
        rows = {args.model: _row(found, values)}
        if "dense" in found:
            rows = {args.teacher: _row(found["dense"], found["dense"]["methods"][name])} | rows
        by = "" if name == "head" else f", {name.replace('_', ' ')}"
        print_comparison(f"{args.data}, {found['images']:,} test images{by}", Comparison(rows))
        print(f"95% interval of top-1: {_interval(values['top1_interval'], '{:.2f}')}")
        if "flips" in found:
            changed = found["flips"][name]
            print(f"{changed['flips']:.2f}% of the predictions changed: {changed['lost']:.2f}% "
                  f"were right, {changed['won']:.2f}% are right now; top-1 "
                  f"{changed['top1_difference']:+.2f}, 95% interval "
                  f"{_interval(changed['top1_difference_interval'], '{:+.2f}')}")
    if not found["passed"]:
        print(f"gate failed: top-1 {found['top1']:.2f} is below {args.min_accuracy:g}")


def _row(of: dict[str, Any], values: dict[str, Any]) -> dict[str, float]:
    row = {"params": of["params"], "bytes": of["bytes"],
           "top1": values["top1"], "top5": values["top5"]}
    return row | ({"loss": of["loss"]} if "loss" in of else {})


def _with_interval(values: dict[str, Any], name: str, form: str) -> str:
    return f"{form.format(values[name])} ({_interval(values[name + '_interval'], form)})"


def _interval(bounds: list[float], form: str) -> str:
    return " – ".join(form.format(bound) for bound in bounds)
