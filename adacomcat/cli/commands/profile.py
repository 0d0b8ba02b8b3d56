"""adacomcat profile: parameters, multiply-accumulates and latency, dense against compressed."""

import argparse
from typing import Any

import timm
import torch
from torch import nn

from adacomcat import cost
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.record import compression_of
from adacomcat.fuse import optimize
from adacomcat.latency.timing import latency
from adacomcat.report.page import add_to_page
from adacomcat.report.provenance import machine
from adacomcat.report.tables import Comparison, print_comparison, print_table
from adacomcat.utils.model import copied


def run(args: argparse.Namespace) -> Outcome:
    device = inputs.device(args)
    counted = {name: model.to(device).eval() for name, model in _models(args).items()}
    if "compressed" in counted:  # parameters and MACs are counted before layers are fused
        counted["optimized"] = counted["compressed"]
    own = machine(counted["dense"])
    cells = [_cell(counted, batch, dtype, args.repeats)
             for dtype in args.dtypes or [own["dtype"]]
             for batch in args.batches or [args.batch_size]]
    first = cells[0]
    comparison = Comparison({name: {
        "params": cost.model_params(model), "macs": cost.model_macs(model),
        "bytes": cost.model_bytes(model),
        "latency_ms": first[name], "images_per_second": 1e3 * first["batch"] / first[name],
    } for name, model in counted.items()})
    data = {"model": args.model, "batch_size": first["batch"], "device": str(device),
            "name": own["name"], "threads": torch.get_num_threads(), "models": comparison.rows,
            "cells": cells, "command": args.invocation}
    if args.record is not None:
        add_to_page(args.record, "latency", data)
    return Outcome(data, lambda: _show(data, comparison))


def _cell(models: dict[str, nn.Module], batch: int, dtype: str,
          repeats: int) -> dict[str, Any]:
    """Milliseconds of each model, and how many times as fast the last one is as the dense one."""
    timed = {name: copied(model).to(getattr(torch, dtype)) for name, model in models.items()}
    if "optimized" in timed:
        timed["optimized"] = optimize(timed["compressed"])
    found: dict[str, Any] = {"batch": batch, "dtype": dtype} | latency(timed, batch, repeats)
    if "optimized" in found:
        found["speedup"] = found["dense"] / found["optimized"]
    return found


def _show(data: dict[str, Any], comparison: Comparison) -> None:
    where = f"{data['device']}, {data['threads']} threads"
    print_comparison(f"{data['model']}, batch {data['batch_size']}, {where}", comparison)
    if len(data["cells"]) < 2:
        return
    names = [name for name in data["models"]]
    print_table(f"milliseconds, {where}", ["batch", "dtype", *names, "speed"],
                [[cell["batch"], cell["dtype"], *(f"{cell[name]:.2f}" for name in names),
                  f"{cell['speedup']:.2f}×" if "speedup" in cell else ""]
                 for cell in data["cells"]])


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
