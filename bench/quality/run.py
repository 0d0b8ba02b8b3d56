"""Methods compared on the same images: parameters, MACs, latency, quality, seconds to compress.

python bench/quality/run.py --data dinov2 --keeps 0.75 0.6 0.5 0.4
python bench/quality/run.py --data fashion-mnist --keeps 0.5 0.3 0.15 --epochs 3
"""

import argparse
from functools import partial

import torch
from methods import METHODS, Method, Subject, compressed, methods_for
from records import Record, Records, command, markdown, provenance
from subjects import add_training_arguments, dinov2, fashion_mnist, trained_settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adacomcat
from adacomcat.cli.arguments import Parser, number
from adacomcat.cost import model_params
from adacomcat.latency.timing import latency
from adacomcat.report.tables import print_table
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.limits import FRACTION, at_least
from adacomcat.utils.model import input_size

# measure → (header, format)
COLUMNS = {
    "params": ("params, M", lambda value: f"{value / 1e6:.3f}"),
    "macs": ("MACs, M", lambda value: f"{value / 1e6:.0f}"),
    "latency_ms": ("latency, ms", lambda value: f"{value:.1f}"),
    "error": ("error", lambda value: f"{value:.3f}"),
    "cls_cosine": ("cls cosine", lambda value: f"{value:.3f}"),
    "top1": ("top-1 %", lambda value: f"{value:.2f}"),
    "seconds": ("seconds", lambda value: f"{value:.0f}"),
}


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("dinov2", "fashion-mnist"), default="dinov2")
    parser.add_argument("--keeps", type=number(FRACTION), nargs="+", default=[0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME",
                        help=f"some of: {' | '.join(METHODS)}")
    parser.add_argument("--crops", type=number(at_least(1)), default=512,
                        help="dinov2: crops that calibrate")
    parser.add_argument("--photos-at-most", type=number(at_least(1)), default=60,
                        help="dinov2: the most photographs that calibrate, taken evenly by file")
    parser.add_argument("--cutouts", action="store_true",
                        help="dinov2: paste cut-outs on half of the calibration crops")
    parser.add_argument("--collages", type=number(at_least(0)), default=0, metavar="N",
                        help="dinov2: N of the calibration crops are collages of the others")
    parser.add_argument("--test-crops", type=number(at_least(1)), default=96,
                        help="dinov2: test crops")
    parser.add_argument("--repeats", type=number(at_least(1)), default=21,
                        help="timed passes of each model")
    parser.add_argument("--seed", type=int, default=0)
    add_training_arguments(parser)
    return parser.parse_args()


def make_subject(args: argparse.Namespace) -> Subject:
    if args.data == "fashion-mnist":
        return fashion_mnist(args, args.seed)
    return dinov2(args.crops, args.photos_at_most, args.test_crops, args.cutouts, args.seed,
                  args.collages)


def settings(args: argparse.Namespace) -> str:
    if args.data == "fashion-mnist":
        return f"seed {args.seed}, {trained_settings(args)}"
    return (f"seed {args.seed}, {args.crops} crops of at most {args.photos_at_most} photographs"
            f"{' with cut-outs' if args.cutouts else ''}, {args.collages} of them collages, "
            f"{args.test_crops} test")


@torch.no_grad()
def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of all matrix products for one image, in whatever modules they are."""
    image = torch.zeros(1, *input_size(model))
    # torch counts the unfused attention and the fused ones of GPUs, but not the fused one of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def measured(subject: Subject, model: nn.Module, seconds: float) -> Record:
    return {"params": model_params(model), "macs": count_macs(model), **subject.measure(model),
            "seconds": seconds}


def compare_methods(subject: Subject, methods: dict[str, Method], keep: float,
                    repeats: int) -> dict[str, Record]:
    """Method → record, the dense model first; the latencies of all models are timed in turn."""
    models = {"dense": subject.model}
    records = {"dense": measured(subject, subject.model, 0.0)}
    for name, method in methods.items():
        models[name], seconds = compressed(method, subject, keep)
        records[name] = measured(subject, models[name], seconds)
        print(f"keep {keep:g}, {name}: "
              + ", ".join(f"{key} {value:.5g}" for key, value in records[name].items()), flush=True)
    optimized = {name: adacomcat.optimize(model) for name, model in models.items()}
    for name, milliseconds in latency(optimized, batch=1, repeats=repeats).items():
        records[name]["latency_ms"] = milliseconds
    return records


def rows(records: dict[str, Record], measures: list[str]) -> list[list[str]]:
    return [[name, *(COLUMNS[measure][1](record[measure]) for measure in measures)]
            for name, record in records.items()]


def main() -> None:
    args = arguments()
    subject = make_subject(args)
    methods = methods_for(subject, args.methods)
    store = Records(args.output / f"{args.data}.json")
    text = provenance()
    for keep in args.keeps:
        records = store.get(
            f"keep {keep:g}, {settings(args)}: {', '.join(methods)}",
            partial(compare_methods, subject, methods, keep, args.repeats))
        measures = [measure for measure in COLUMNS if measure in records["dense"]]
        table = ["", *(COLUMNS[measure][0] for measure in measures)], rows(records, measures)
        print_table(f"{args.data}, keep {keep:g}", *table)
        text += f"\n## {args.data}, keep {keep:g}\n\n{markdown(*table)}"
    atomic_write_text(args.output / f"{args.data}.md", text)
    print(f"written to {args.output / args.data}.json and .md")


if __name__ == "__main__":
    command(main)
