"""adacomcat quantize: a model on few bits, the last step before it runs."""

import argparse

from adacomcat import checkpoint, cost
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.convert.quantized import quantized_layers
from adacomcat.quantization import quantize
from adacomcat.report.tables import Comparison, print_comparison


def run(args: argparse.Namespace) -> Outcome:
    checkpoint.require_empty(args.output)
    model = inputs.model(args).to(inputs.device(args))
    images = inputs.calibration(args, inputs.pictures(args, model))
    made = quantize(model, images, args.dtype)
    checkpoint.save(made, args.output)
    comparison = Comparison({
        name: {"params": cost.model_params(one), "bytes": cost.model_bytes(one)}
        for name, one in (("before", model), (args.dtype, made))})
    data = {"output": args.output, "models": comparison.rows,
            "layers": len(quantized_layers(made)),
            "calibration_images": 0 if images is None else len(images)}

    def show() -> None:
        print_comparison(args.model, comparison)
        if images is None:
            print("rounded to the nearest; --calibration-dir corrects the errors of rounding")
        print(f"{data['layers']} layers on {args.dtype} written to {args.output}")
    return Outcome(data, show)
