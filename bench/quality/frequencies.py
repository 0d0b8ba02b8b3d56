"""How often to search: every epoch (ComCAT), doubling (Adaptive-ComCAT), graded (this library).

python bench/quality/frequencies.py --epochs 30 --train-images 6000 --seeds 0 1 2

All other settings are the same. Finished runs are kept in frequencies.json and not run again.
"""

import argparse
import statistics
from functools import lru_cache, partial

from methods import Subject, trained
from records import Record, Records, command, markdown, mean_and_deviation, provenance
from subjects import add_training_arguments, fashion_mnist, trained_settings

from adacomcat.cli.arguments import Parser, number
from adacomcat.report.tables import print_table
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.limits import FRACTION

POLICIES = {"every": "every epoch", "adaptive": "doubling", "graded": "graded"}
COLUMNS = ("", "searches", "search seconds", "of every epoch's", "top-1 %", "seconds")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=number(FRACTION), default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_training_arguments(parser)
    parser.set_defaults(epochs=30, train_images=6000)
    return parser.parse_args()


def run_once(subject: Subject, policy: str, keep: float) -> Record:
    model, results = trained(subject, keep, "adacomcat", search=policy)
    told = ("search_count", "search_seconds", "seconds", "params")
    return {**{name: results[name] for name in told},
            "epochs": [search["epoch"] for search in results["searches"]],
            **subject.measure(model)}


def measure(store: Records, args: argparse.Namespace) -> dict[str, list[Record]]:
    """Policy → the records of the seeds."""
    subject_of = lru_cache(maxsize=1)(partial(fashion_mnist, args))

    def run(policy: str, seed: int) -> Record:
        name = f"{policy}, keep {args.keep:g}, seed {seed}, {trained_settings(args)}"
        found = store.get(name, lambda: run_once(subject_of(seed), policy, args.keep))
        print(f"{name}: top-1 {found['top1']:.2f} %, searched before epochs {found['epochs']}, "
              f"{found['search_seconds']:.0f} of {found['seconds']:.0f} s", flush=True)
        return found

    runs = {(policy, seed): run(policy, seed) for seed in args.seeds for policy in POLICIES}
    return {policy: [runs[policy, seed] for seed in args.seeds] for policy in POLICIES}


def rows(found: dict[str, list[Record]]) -> list[list[str]]:
    def mean(policy: str, measure: str) -> float:
        return statistics.fmean(record[measure] for record in found[policy])

    most = mean("every", "search_seconds")
    return [[label, f"{mean(policy, 'search_count'):.1f}", f"{mean(policy, 'search_seconds'):.0f}",
             f"{100 * mean(policy, 'search_seconds') / most:.0f} %",
             mean_and_deviation(record["top1"] for record in found[policy]),
             f"{mean(policy, 'seconds'):.0f}"] for policy, label in POLICIES.items()]


def main() -> None:
    args = arguments()
    found = rows(measure(Records(args.output / "frequencies.json"), args))
    print_table(f"Search frequencies, keep {args.keep:g}", COLUMNS, found)
    settings = f"keep {args.keep:g}, {len(args.seeds)} seeds, {trained_settings(args)}"
    atomic_write_text(args.output / "frequencies.md",
                      f"{provenance()}\n{settings}\n\n{markdown(COLUMNS, found)}")
    print(f"written to {args.output / 'frequencies'}.json and .md")


if __name__ == "__main__":
    command(main)
