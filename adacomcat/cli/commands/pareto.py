"""adacomcat pareto: one model at several sizes, beside the dense one and landmarks."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat import checkpoint, cost, train
from adacomcat.calibration import Calibration, calibrate
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.compression import compress
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.recovery import RecoveryConfig, recover
from adacomcat.errors import UserError
from adacomcat.evaluation.agreement import agreement
from adacomcat.evaluation.neighbours import knn_scores
from adacomcat.evaluation.pareto import Judge, Sized, knee, points
from adacomcat.evaluation.passes import best_classes, classified, embedded, rows_of
from adacomcat.evaluation.scores import measures
from adacomcat.report.files import record
from adacomcat.report.page import write_page
from adacomcat.report.provenance import architecture_of, machine, versions
from adacomcat.report.tables import plot, print_table
from adacomcat.utils.distributed import Processes
from adacomcat.utils.files import make_folder, require_writable
from adacomcat.utils.model import class_count, copied
from adacomcat.utils.progress import progress

LABELS = {"top1": "top-1 %", "knn": "k-NN top-1 %", "cosine": "cosine to the dense model"}


def run(args: argparse.Namespace) -> Outcome:
    require_writable(Path(args.output) / "pareto.json")
    device = inputs.device(args)
    model = inputs.model(args).to(device)
    pictures = inputs.pictures(args, model)
    if pictures is None:
        raise UserError("pareto calibrates and judges by images: pass --data, or --calibration-dir")
    quality = _quality(args, model)
    if args.landmarks and quality == "cosine":
        raise UserError("--landmarks are judged by labels: pass --data")
    fitting, judging = _parts(args, pictures)
    judge = _judge(args, model, quality, judging)
    params = cost.model_params(model)
    rows = points(_models(args, model, fitting), judge, args.dtypes, params, args.latency_batch)
    found = _content(args, model, rows, quality)
    record(args.output, "pareto", found)
    page = write_page([args.output])
    return Outcome(found | {"page": str(page)}, lambda: _show(found, page))


def _quality(args: argparse.Namespace, model: nn.Module) -> str:
    if args.data is None:
        return "cosine"
    return "knn" if args.knn or not class_count(model) else "top1"


def _parts(args: argparse.Namespace, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
    """(the pictures to fit to, those to judge by where no labels judge)"""
    if args.data is not None:
        return pictures, None
    return _halves(pictures) if args.calibration is None else (pictures, pictures)


def _halves(images: Tensor) -> tuple[Tensor, Tensor]:
    half = len(images) // 2
    if half < 2:
        raise UserError(f"pareto needs at least 4 pictures, half of them to judge; got "
                        f"{len(images)}")
    return images[:half], images[half:]


def _judge(args: argparse.Namespace, dense: nn.Module, quality: str,
           judging: Tensor | None) -> Judge:
    processes = Processes(device=inputs.device(args))

    def by_dense(model: nn.Module) -> dict[str, Any]:
        assert judging is not None  # without --data there are pictures to judge by
        rounded = copied(model).to(next(dense.parameters()).dtype)  # computed with as dense
        return agreement(rounded, dense, calibration_batches(judging, dense))._asdict()

    def by_labels(model: nn.Module) -> dict[str, Any]:
        parts = inputs.train_and_test(args, model, labels_matter=quality != "knn")
        known, asked = (inputs.some(part, count, args.seed) for part, count in
                        zip(parts, (args.train_images, args.test_images), strict=True))

        def rows(look: Any, part: Any) -> dict[str, Tensor]:
            return rows_of(look, model, part, args.batch_size, processes, args.workers)

        if quality == "top1":
            found = rows(classified, asked)
            best = found["best"]
        else:
            bank, found = rows(embedded, known), rows(embedded, asked)
            classes = 1 + int(torch.cat([bank["labels"], found["labels"]]).max())
            best = best_classes(knn_scores(bank["features"], bank["labels"], found["features"],
                                           classes))
        judged = measures(best, found["labels"])
        return {quality: judged["top1"], "interval": judged["top1_interval"],
                "images": len(asked)}
    return by_dense if quality == "cosine" else by_labels


def _models(args: argparse.Namespace, model: nn.Module, pictures: Tensor) -> Iterator[Sized]:
    seen = _calibration(args, model, pictures)
    yield Sized("dense", "dense", model)
    for name in args.landmarks:
        yield Sized(Path(name).name, "landmark", _landmark(args, name).to(inputs.device(args)))
    for keep in progress(args.keeps, "compressing", total=len(args.keeps)):
        small = _at_size(args, model, keep, seen, pictures)
        if args.save_models:
            make_folder(args.output)
            checkpoint.save(small, Path(args.output) / f"keep-{keep:g}")
        yield Sized(f"keep {keep:g}", "compressed", small)


def _landmark(args: argparse.Namespace, name: str) -> nn.Module:
    if inputs.is_folder(name):
        return checkpoint.load(inputs.folder_name(name))
    other = argparse.Namespace(**vars(args) | {"model": name, "checkpoint": None,
                                               "pretrained": True})
    return inputs.model(other)


def _calibration(args: argparse.Namespace, model: nn.Module,
                 pictures: Tensor) -> Calibration | None:
    """What all sizes are cut from; None where each is searched with images of its own."""
    if args.search is not None:
        if args.data is None:
            raise UserError("--search trains with labels: pass --data")
        if args.calibration is not None or args.refit is not None:
            raise UserError("--search calibrates and fits by itself: leave out --calibration, "
                            "--refit and --no-refit")
        return None
    if args.calibration is not None:
        return Calibration.load(args.calibration)
    images = inputs.calibration(args, pictures)
    return None if images is None else calibrate(model, images, include=args.include,
                                                 exclude=args.exclude)


def _at_size(args: argparse.Namespace, model: nn.Module, keep: float, seen: Calibration | None,
             pictures: Tensor) -> nn.Module:
    if args.search is not None:
        config = TrainConfig(keep_params=keep, epochs=args.search, seed=args.seed,
                             batch_size=args.batch_size, device=args.device,
                             calibration_images=args.calibration_images)
        train_set, _ = inputs.train_and_test(args, model)
        return train.run(model, config, train_set).model
    small = compress(model, keep_params=keep, calibration=seen, refit=args.refit,
                     include=args.include, exclude=args.exclude)
    if args.recover is None:
        return small
    batches = calibration_batches(pictures, model)
    return recover(small, model, batches, RecoveryConfig(minutes=args.recover, seed=args.seed))


def _content(args: argparse.Namespace, model: nn.Module, rows: list[dict[str, Any]],
             quality: str) -> dict[str, Any]:
    curve = [row for row in rows if row["kind"] != "landmark" and row["dtype"] == args.dtypes[0]]
    bend = curve[knee([row["params"] for row in curve], [row[quality] for row in curve])]
    return {"model": architecture_of(model), "command": args.invocation,
            "versions": versions(), "machine": machine(model), "quality": quality,
            "quality_label": LABELS[quality], "images": rows[0]["images"],
            "latency_batch": args.latency_batch, "knee": bend["name"], "points": rows}


def _show(found: dict[str, Any], page: Path) -> None:
    quality, label = found["quality"], found["quality_label"]
    print_table(f"{found['model']}, {found['images']:,} images; latency of "
                f"{found['latency_batch']} on {found['machine']['threads']} threads",
                ["", label, "95% interval", "parameters", "kept", "MMACs", "MB", "ms"],
                [[row["name"], f"{row[quality]:.4g}", _interval(row), f"{row['params']:,}",
                  f"{row['kept']:.3f}", f"{row['macs'] / 1e6:,.1f}", f"{row['bytes'] / 1e6:,.2f}",
                  f"{row['latency_ms']:.2f}"] for row in found["points"]])
    marks = {"dense": "D", "landmark": "L", "compressed": "o"}
    print(plot([(row["params"] / 1e6, row[quality],
                 "K" if row["name"] == found["knee"] else marks[row["kind"]])
                for row in found["points"]], "parameters, millions", label))
    print(f"D dense, o compressed, L landmark, K the knee: {found['knee']}")
    print(f"written to {page}")


def _interval(row: dict[str, Any]) -> str:
    low, high = row["interval"] if "interval" in row else row["cosine_interval"]
    return f"{low:.4g} – {high:.4g}"
