"""adacomcat compress: training-free, from a budget or a plan."""

import argparse
from pathlib import Path

from torch import Tensor, nn

from adacomcat import checkpoint, cost
from adacomcat.calibration import Calibration, calibrate
from adacomcat.cli.arguments import EXCLUSIVE
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.cli.config_file import flag
from adacomcat.convert.record import compression_of
from adacomcat.elastic import save_elastic
from adacomcat.errors import UserError
from adacomcat.latency.timing import model_latencies
from adacomcat.plan import RankPlan
from adacomcat.report.files import record as record_file
from adacomcat.report.page import write_page
from adacomcat.report.provenance import run_content
from adacomcat.report.summary import print_summary
from adacomcat.report.tables import Comparison, print_comparison, print_refinement


def run(args: argparse.Namespace) -> Outcome:
    if args.gauge and (args.quantize or args.keep_bytes):
        raise UserError("--gauge is for factors in float: leave it out, or --quantize and "
                        "--keep-bytes")
    checkpoint.require_empty(args.output)
    if args.elastic:
        return _elastic(args)
    model = inputs.model(args).to(inputs.device(args))
    seen, pictures = _seen(args, model)
    small = inputs.compressed(args, model, seen, refine=args.refine, refine_images=pictures,
                              refit=args.refit, quantize=args.quantize)
    record = compression_of(small)
    plan = record.plan or RankPlan()
    comparison = Comparison({
        name: {"params": cost.model_params(one), "macs": cost.model_macs(one),
               "bytes": cost.model_bytes(one)}
        for name, one in (("dense", model), ("compressed", small))})
    if args.max_latency_ms is not None:
        found = model_latencies({"dense": model, "compressed": small}, args.latency_batch)
        for name, milliseconds in found.items():
            comparison.rows[name]["latency_ms"] = milliseconds
    checkpoint.save(small, args.output, gauge=args.gauge)
    if not args.no_report:
        timed = {name: {"latency_ms": row["latency_ms"]} for name, row in comparison.rows.items()
                 if "latency_ms" in row}
        record_file(args.output, "run", run_content(
            args.invocation, model, small, args.output, measured=timed, include=args.include,
            exclude=args.exclude, latency_batch=args.latency_batch,
            calibration_images=_image_count(seen)))
        write_page([args.output])
    data = {"output": args.output, "models": comparison.rows, "ranks": plan.ranks,
            "calibration_images": _image_count(seen),
            "refitted": args.refit is not False and _image_count(seen) > 0}
    if record.refinement is not None:
        data["refinement"] = record.refinement.summary()

    def show() -> None:
        print_comparison(args.model, comparison)
        print_refinement(data.get("refinement"))
        if seen is not None and not data["refitted"]:
            print("factors cut from the calibration; blocks fitted in sequence to images lose less")
        print(f"written to {args.output}")
        if not args.no_report:
            print_summary(args.output, cards=False)
    return Outcome(data, show)


def _elastic(args: argparse.Namespace) -> Outcome:
    """--elastic: a folder of every size."""
    unfit = [flag(name) for name in (*EXCLUSIVE, "bits", "refine", "gauge", "quantize")
             if getattr(args, name, None)]
    if unfit:
        raise UserError(f"--elastic names sizes: leave out {' and '.join(unfit)}")
    model = inputs.model(args).to(inputs.device(args))
    seen, _ = _seen(args, model)
    if seen is None:
        raise UserError("--elastic needs images: --calibration-dir FOLDER, --data or --calibration")
    if not isinstance(seen, Calibration):
        seen = calibrate(model, seen, include=args.include, exclude=args.exclude)
    save_elastic(model, args.output, seen, args.elastic)
    data = {"output": args.output, "sizes": args.elastic, "refitted": seen.batches is not None,
            "bytes": {file.name: file.stat().st_size
                      for file in sorted(Path(args.output).glob("*.safetensors"))}}

    def show() -> None:
        for name, size in data["bytes"].items():
            print(f"{name:24} {size / 1e6:8.1f} MB")
        print(f"written to {args.output}; adacomcat.load({args.output!r}, keep_params=…) cuts a "
              "model")
    return Outcome(data, show)


def _seen(args: argparse.Namespace, model: nn.Module) -> tuple[Tensor | Calibration | None,
                                                               Tensor | None]:
    """(what calibrates, the pictures that a refinement takes)"""
    if args.calibration is None:
        pictures = inputs.pictures(args, model)
        return inputs.calibration(args, pictures), pictures
    if args.calibration_dir is not None or args.data is not None:
        raise UserError("--calibration stands for the images: leave out --calibration-dir and "
                        "--data, or --calibration")
    return Calibration.load(args.calibration), None


def _image_count(seen: Tensor | Calibration | None) -> int:
    if isinstance(seen, Calibration):
        return sum(map(len, seen.batches or ()))
    return 0 if seen is None else len(seen)
