"""Ranks alone, fewer bits alone, and both together, at equal bytes.

python bench/quality/bits.py --data dinov2 --sizes 0.27 0.125 0.08
python bench/quality/bits.py --data fashion-mnist --seeds 0 1 2 --data-dir FOLDER

A size is the share of the dense float32 bytes that the weights may take. What has one size of its
own, a dense model on fewer bits, stands at every size that it fits into.
"""

import argparse
from collections.abc import Mapping
from functools import partial

import paths  # noqa: F401  (makes the examples importable)
from methods import Subject
from records import Record, Records, command, markdown, provenance
from subjects import add_training_arguments, dinov2, fashion_mnist

import adacomcat
from adacomcat import cost
from adacomcat.calibration import Calibration
from adacomcat.cli.arguments import Parser, number
from adacomcat.errors import UserError
from adacomcat.report.tables import print_table
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.limits import FRACTION, at_least

# Dense models on fewer bits → dtype of ``quantize``.
DENSE = {"dense, int8": "int8", "dense, int4": "int4"}
# Plans at a budget in bytes → bits that it chooses from.
PLANNED = {"ranks alone, float32": (32,), "ranks alone, bfloat16": (16,),
           "ranks, all int8": (8,), "ranks and bits, 32 8": (32, 8),
           "ranks and bits, 16 8 4": (16, 8, 4)}


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("dinov2", "fashion-mnist"), default="dinov2")
    parser.add_argument("--sizes", type=number(FRACTION), nargs="+", default=[0.27, 0.125, 0.08])
    parser.add_argument("--methods", nargs="+", choices=(*DENSE, *PLANNED),
                        default=[*DENSE, *PLANNED])
    parser.add_argument("--crops", type=number(at_least(1)), default=128,
                        help="dinov2: crops that compress and correct")
    parser.add_argument("--test-crops", type=number(at_least(1)), default=48,
                        help="dinov2: crops of other photographs that judge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="of the images that compress and correct")
    add_training_arguments(parser)
    return parser.parse_args()


def subject_of(args: argparse.Namespace, seed: int) -> Subject:
    if args.data == "dinov2":
        return dinov2(args.crops, 10**6, args.test_crops, False, seed)
    return fashion_mnist(args, seed)


class Comparison:
    """The runs of one subject; its calibration is made when the first run needs it."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.made: tuple[Subject, Calibration] | None = None

    def known(self) -> tuple[Subject, Calibration]:
        if self.made is None:
            subject = subject_of(self.args, self.seed)
            self.made = subject, adacomcat.calibrate(subject.model, subject.calibration)
        return self.made

    def run(self, method: str, size: float) -> Record:
        """Bytes and quality; ``UserError`` where the size cannot be reached."""
        subject, calibration = self.known()
        if method in DENSE:
            made = adacomcat.quantize(subject.model, subject.calibration, DENSE[method])
        else:
            made = adacomcat.compress(subject.model, keep_bytes=size, bits=PLANNED[method],
                                      calibration=calibration)
        found = {"bytes": cost.model_bytes(made) / cost.model_bytes(subject.model),
                 **subject.measure(made.float())}
        print(method, f"{size:g}", found, flush=True)
        return found

    def run_or_reason(self, method: str, size: float) -> Record:
        try:
            return self.run(method, size)
        except UserError as error:
            return {"refused": str(error)}


def compared(args: argparse.Namespace, store: Records, seed: int) -> dict[str, dict[float, Record]]:
    """Method → size → record. Sizes that a method cannot reach are absent."""
    comparison = Comparison(args, seed)
    images = f", {args.crops} crops, {args.test_crops} test" if args.data == "dinov2" else ""
    found: dict[str, dict[float, Record]] = {}
    for method in args.methods:
        for size in args.sizes:
            wanted = 1.0 if method in DENSE else size
            record = store.get(f"{args.data}{images}, {method}, {wanted:g}, seed {seed}",
                               partial(comparison.run_or_reason, method, wanted))
            if record.get("bytes", 2) <= size:
                found.setdefault(method, {})[size] = record
    return found


def table(runs: list[dict[str, dict[float, Record]]],
          sizes: list[float]) -> tuple[list[str], list[list[object]]]:
    """Of each size the real bytes, and the quality of each seed."""
    columns = ["", *(heading for size in sizes for heading in (f"bytes ≤ {size:g}", "quality"))]
    rows: list[list[object]] = []
    for method in runs[0]:
        row: list[object] = [method]
        for size in sizes:
            records = [run[method][size] for run in runs if size in run.get(method, {})]
            row += [f"{records[0]['bytes']:.4f}", ", ".join(map(quality, records))] if records \
                else ["–", "–"]
        rows.append(row)
    return columns, rows


def quality(record: Mapping[str, float]) -> str:
    """Error of the final tokens, or top-1 in percent."""
    return f"{record['top1']:.2f}" if "top1" in record else f"{record['error']:.4f}"


def main() -> None:
    args = arguments()
    store = Records(args.output / "bits.json")
    found = table([compared(args, store, seed) for seed in args.seeds], args.sizes)
    print_table(args.data, *found)
    atomic_write_text(args.output / f"bits-{args.data}.md", f"{provenance()}\n{markdown(*found)}")


if __name__ == "__main__":
    command(main)
