"""adacomcat profile: parameters, multiply-accumulates and latency, dense against compressed."""

import argparse

import timm
import torch
from torch import nn

from adacomcat import cost
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.record import compression_of
from adacomcat.fuse import optimize
from adacomcat.latency.timing import latency
from adacomcat.report.tables import Comparison, print_comparison


def run(args: argparse.Namespace) -> Outcome:
    device = inputs.device(args)
    counted = {name: model.to(device).eval() for name, model in _models(args).items()}
    timed = dict(counted)
    if "compressed" in counted:  # parameters and MACs are counted before layers are fused
        counted["optimized"] = counted["compressed"]
        timed["optimized"] = optimize(counted["compressed"])
    milliseconds = latency(timed, args.batch_size, args.repeats)
    comparison = Comparison({name: {
        "params": cost.model_params(model), "macs": cost.model_macs(model),
        "latency_ms": milliseconds[name],
        "images_per_second": 1e3 * args.batch_size / milliseconds[name],
    } for name, model in counted.items()})
    data = {"model": args.model, "batch_size": args.batch_size, "device": str(device),
            "threads": torch.get_num_threads(), "models": comparison.rows}
    title = f"{args.model}, batch {args.batch_size}, {device}, {data['threads']} threads"
    return Outcome(data, lambda: print_comparison(title, comparison))


def _models(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The dense model, and the compressed one where there is one.

    Their weights may be random, since latency does not depend on them.
    """
    model = inputs.model(args, weights_matter=False)
    source = compression_of(model).source
    if source is not None:
        dense = timm.create_model(source["architecture"], **source["model_args"])
        return {"dense": dense, "compressed": model}
    if not inputs.has_budget(args):
        return {"dense": model}
    return {"dense": model, "compressed": inputs.compressed(args, model, None)}
