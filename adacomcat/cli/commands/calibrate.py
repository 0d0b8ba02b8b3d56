"""adacomcat calibrate: what images tell of a model, in one file for any number of budgets."""

import argparse
from pathlib import Path

from adacomcat.calibration import calibrate
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.errors import UserError
from adacomcat.utils.files import require_writable


def run(args: argparse.Namespace) -> Outcome:
    if Path(args.output).exists():
        raise UserError(f"{args.output} already holds something; name an absent file")
    require_writable(args.output)
    model = inputs.model(args).to(inputs.device(args))
    images = inputs.calibration(args, inputs.pictures(args, model))
    if images is None:
        raise UserError("calibrate needs images: --calibration-dir FOLDER, or --data")
    found = calibrate(model, images, keep_images=args.images, include=args.include,
                      exclude=args.exclude)
    found.save(args.output)
    size = Path(args.output).stat().st_size
    data = {"output": args.output, "images": len(images), "images_kept": args.images,
            "sites": len(found.known.factors), "bytes": size}
    return Outcome(data, lambda: print(
        f"{len(images)} images, {data['sites']} sites; {size / 1e6:.0f} MB written to "
        f"{args.output}"))
