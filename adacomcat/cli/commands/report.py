"""adacomcat report: one page of finished runs, from their files."""

import argparse
import webbrowser
from pathlib import Path

from adacomcat import checkpoint
from adacomcat.cli.commands import Outcome, inputs
from adacomcat.errors import UserError
from adacomcat.report.files import record
from adacomcat.report.page import PAGE, write_page
from adacomcat.report.pictures import compared_pictures

COMPARISON = "comparison.html"


def run(args: argparse.Namespace) -> Outcome:
    first = Path(args.folders[0])
    if args.images is not None:
        _add_pictures(args)
    several = len(args.folders) > 1
    page = write_page(args.folders, args.output or first / (COMPARISON if several else PAGE))
    if args.open:
        webbrowser.open_new_tab(page.resolve().as_uri())
    return Outcome({"page": str(page), "bytes": page.stat().st_size},
                   lambda: print(f"written to {page}"))


def _add_pictures(args: argparse.Namespace) -> None:
    """pictures.json of the one folder, which holds the compressed model."""
    if len(args.folders) != 1 or args.teacher is None:
        raise UserError("--images shows one model beside the dense one: give one folder and "
                        "--teacher")
    device = inputs.device(args)
    model, dense = checkpoint.load(args.folders[0]).to(device), inputs.teacher(args).to(device)
    record(args.folders[0], "pictures",
           compared_pictures(model, dense, args.images, args.count, args.seed))
