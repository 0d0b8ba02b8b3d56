"""adacomcat import-comcat: a checkpoint folder of ComCAT's ranks.txt and checkpoint.pth."""

import argparse

from adacomcat import checkpoint, cost
from adacomcat.checkpoint.comcat import import_comcat
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.record import compression_of


def run(args: argparse.Namespace) -> Outcome:
    checkpoint.require_empty(args.output)
    model = import_comcat(args.ranks, args.checkpoint, args.model, **inputs.model_args(args))
    checkpoint.save(model, args.output, gauge=args.gauge)
    data = {"output": args.output, "params": cost.model_params(model),
            "macs": cost.model_macs(model), "ranks": compression_of(model).ranks}
    return Outcome(data, lambda: print(
        f"{data['params']:,} parameters, {data['macs'] / 1e6:,.1f} MMACs; "
        f"written to {args.output}"))
