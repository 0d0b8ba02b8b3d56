"""Accuracy against parameters for the Fashion-MNIST ViT, after the same epochs, over seeds.

python bench/quality/curve.py --keeps 0.5 0.3 0.15 0.08 0.05 --seeds 0 1 2

Finished runs are kept in curve.json, so an interrupted comparison goes on from there.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from methods import METHODS, Subject, compressed
from records import Record, Records, command, markdown, mean_and_deviation, provenance
from subjects import add_training_arguments, fashion_mnist, trained_settings

from adacomcat.cli.arguments import Parser, number
from adacomcat.cost import model_params
from adacomcat.report.tables import print_table
from adacomcat.utils.files import atomic_file, atomic_write_text
from adacomcat.utils.limits import FRACTION


class Point(NamedTuple):
    """One method at one share of parameters kept, over seeds."""

    params: float  # mean
    top1: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)


Curves = dict[str, list[Point]]  # method → one point for each keep


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keeps", type=number(FRACTION), nargs="+",
                        default=[0.5, 0.3, 0.15, 0.08, 0.05])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME",
                        default=["ours, searched", "ComCAT's search"],
                        help=f"some of: {' | '.join(METHODS)}")
    add_training_arguments(parser)
    return parser.parse_args()


def run_once(subject: Subject, method: str, keep: float) -> Record:
    model, seconds = compressed(METHODS[method], subject, keep)
    return {"params": model_params(model), "seconds": seconds, **subject.measure(model)}


def measure_curves(store: Records, args: argparse.Namespace) -> Curves:
    subject_of = lru_cache(maxsize=1)(partial(fashion_mnist, args))

    def run(method: str, keep: float, seed: int) -> Record:
        name = f"{method}, keep {keep:g}, seed {seed}, {trained_settings(args)}"
        found = store.get(name, lambda: run_once(subject_of(seed), method, keep))
        print(f"{name}: top-1 {found['top1']:.2f} %, {found['params']} parameters, "
              f"{found['seconds']:.0f} s", flush=True)
        return found

    runs = {(method, keep, seed): run(method, keep, seed)
            for seed in args.seeds for keep in args.keeps for method in args.methods}

    def point(method: str, keep: float) -> Point:
        found = [runs[method, keep, seed] for seed in args.seeds]
        return Point(statistics.fmean(run["params"] for run in found),
                     [run["top1"] for run in found])

    return {method: [point(method, keep) for keep in args.keeps] for method in args.methods}


def params_at(curve: Sequence[Point], top1: float) -> float | None:
    """The number of parameters at which the curve reaches this accuracy; None outside of it.

    Between two points the logarithm of the parameters is linear in the accuracy.
    """
    points = sorted(curve)
    for low, high in zip(points, points[1:], strict=False):
        if low.mean <= top1 <= high.mean:
            share = (top1 - low.mean) / (high.mean - low.mean) if high.mean > low.mean else 0.0
            return math.exp((1 - share) * math.log(low.params) + share * math.log(high.params))
    return None


def saved(curves: Curves, method: str, other: str) -> list[str]:
    """For each accuracy of ``other``: the share of its parameters that ``method`` saves there."""
    needed = [(point.params, params_at(curves[method], point.mean)) for point in curves[other]]
    return ["–" if need is None else f"{100 * (1 - need / params):.0f} %"
            for params, need in needed]


def table(curves: Curves, keeps: list[float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; with two methods a column has what the first saves against the second."""
    columns = ["keep", *(f"{method}: {what}" for method in curves
                         for what in ("params", "top-1 %"))]
    rows = [[f"{keep:g}", *(cell for method in curves for cell in (
        f"{curves[method][i].params:.0f}", mean_and_deviation(curves[method][i].top1)))]
        for i, keep in enumerate(keeps)]
    if len(curves) == 2:
        first, second = curves
        columns.append(f"{first}: fewer parameters at {second}'s accuracy")
        rows = [[*row, cell] for row, cell in zip(rows, saved(curves, first, second), strict=True)]
    return columns, rows


def draw(curves: Curves, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, points in curves.items():
        means = [point.mean for point in points]
        spread = [[mean - min(point.top1) for mean, point in zip(means, points, strict=True)],
                  [max(point.top1) - mean for mean, point in zip(means, points, strict=True)]]
        axes.errorbar([point.params for point in points], means, yerr=spread, marker="o",
                      capsize=3, label=method)
    axes.set(xscale="log", xlabel="parameters", ylabel="top-1 %",
             title="Fashion-MNIST: mean, least and most over seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=130, format="png")


def main() -> None:
    args = arguments()
    curves = measure_curves(Records(args.output / "curve.json"), args)
    found = table(curves, args.keeps)
    print_table("Fashion-MNIST, accuracy versus parameters", *found)
    atomic_write_text(args.output / "curve.md",
                      f"{provenance()}\n{trained_settings(args)}\n\n{markdown(*found)}\n"
                      "![curves](curve.png)\n")
    draw(curves, args.output / "curve.png")
    print(f"written to {args.output / 'curve'}.json, .md and .png")


if __name__ == "__main__":
    command(main)
