"""adacomcat generate: a grid of pictures from a text-to-image model with adapters."""

import argparse
from pathlib import Path

from adacomcat.cli.commands import Outcome, inputs
from adacomcat.customize import generate, load_adapters, open_pipeline, picture_grid, set_alpha
from adacomcat.customize.config import require_token
from adacomcat.errors import UserError, reason
from adacomcat.utils.files import atomic_file, require_writable


def run(args: argparse.Namespace) -> Outcome:
    if not args.prompt:
        raise UserError("generate needs --prompt with some words")
    if args.alpha and len(args.alpha) != len(args.adapters):
        raise UserError(f"--alpha has {len(args.alpha)} numbers for {len(args.adapters)} files of "
                        "--adapters; give each file one")
    require_writable(args.output)
    pipe = open_pipeline(args.model, inputs.device(args))
    for at, file in enumerate(args.adapters):
        found = load_adapters(pipe, file, f"adapter{at}", verify=not args.no_verify)
        for prompt in args.prompt:
            require_token(prompt, found.token)
        if args.alpha:
            set_alpha(pipe, {f"adapter{at}": args.alpha[at]})
    prompts = [prompt for prompt in args.prompt for _ in range(args.count)]
    pictures = generate(pipe, prompts, seed=args.seed, steps=args.num_inference_steps,
                        guidance=args.guidance_scale)
    _write(args.output, picture_grid(pictures, args.count, args.scale))
    return Outcome({"output": args.output, "pictures": len(pictures)},
                   lambda: print(f"{len(pictures)} pictures; written to {args.output}"))


def _write(output: str, grid: object) -> None:
    try:
        with atomic_file(Path(output)) as scratch:
            grid.save(scratch, format="PNG")  # type: ignore[attr-defined]
    except OSError as error:
        raise UserError(f"cannot write {output}: {reason(error)}") from error
