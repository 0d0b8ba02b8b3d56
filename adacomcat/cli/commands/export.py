"""adacomcat export: a file for another runtime, compared with the model."""

import argparse
from pathlib import Path
from typing import Any

import torch

from adacomcat.cli.commands import Outcome, inputs
from adacomcat.deploy import FORMATS, export
from adacomcat.fuse import optimize


def run(args: argparse.Namespace) -> Outcome:
    model = inputs.model(args)
    if args.optimize:
        model = optimize(model)
    made = export(
        model, args.output or _beside(args.model, args.format), format=args.format,
        batch_size=args.batch_size, dynamic_batch=args.dynamic_batch,
        dtype=None if args.dtype is None else getattr(torch, args.dtype), opset=args.opset,
        check=args.check, bench=args.bench)
    data = {"model": args.model, "format": made.format, "output": str(made.path),
            "bytes": made.size, "difference": made.difference, "batch_size": args.batch_size,
            "latency_ms": made.latency_ms}
    return Outcome(data, lambda: _show(data))


def _beside(model: str, format: str) -> Path:
    """DIR.onnx for the folder DIR; DIR-plain for a format that is a folder itself."""
    folder = Path(inputs.folder_name(model)).absolute()
    ending = FORMATS[format].ending or f"-{format}"
    return folder.with_name(folder.name + ending)


def _show(data: dict[str, Any]) -> None:
    print(f"written to {data['output']}: {data['format']}, {data['bytes'] / 1e6:.2f} MB")
    if data["difference"] is not None:
        print(f"largest difference from the model: {data['difference']:.1e}")
    for name, milliseconds in (data["latency_ms"] or {}).items():
        print(f"{name}: {milliseconds:.2f} ms for {data['batch_size']} images")
