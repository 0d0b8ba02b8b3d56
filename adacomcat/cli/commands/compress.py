"""adacomcat compress: training-free, from a budget or a plan."""

import argparse

from adacomcat import checkpoint, cost
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.record import compression_of
from adacomcat.latency.timing import model_latencies
from adacomcat.plan import RankPlan
from adacomcat.report.files import record as record_file
from adacomcat.report.page import write_page
from adacomcat.report.provenance import run_content
from adacomcat.report.summary import print_summary
from adacomcat.report.tables import Comparison, print_comparison, print_refinement


def run(args: argparse.Namespace) -> Outcome:
    checkpoint.require_empty(args.output)
    model = inputs.model(args).to(inputs.device(args))
    pictures = inputs.pictures(args, model)
    images = inputs.calibration(args, pictures)
    small = inputs.compressed(args, model, images, refine=args.refine, refine_images=pictures)
    record = compression_of(small)
    plan = record.plan or RankPlan()
    comparison = Comparison({
        "dense": {"params": cost.model_params(model), "macs": cost.model_macs(model)},
        "compressed": {"params": cost.model_params(small), "macs": cost.model_macs(small)},
    })
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
            calibration_images=0 if images is None else len(images)))
        write_page([args.output])
    data = {"output": args.output, "models": comparison.rows, "ranks": plan.ranks,
            "calibration_images": 0 if images is None else len(images)}
    if record.refinement is not None:
        data["refinement"] = record.refinement.summary()

    def show() -> None:
        print_comparison(args.model, comparison)
        print_refinement(data.get("refinement"))
        print(f"written to {args.output}")
        if not args.no_report:
            print_summary(args.output, cards=False)
    return Outcome(data, show)
