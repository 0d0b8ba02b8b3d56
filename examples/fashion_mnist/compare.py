"""Accuracy at each budget: compressed without training, and after some epochs of two methods.

The methods are adacomcat's and ComCAT's. Finished runs are kept in results.json, so an interrupted
comparison goes on from there.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import timm
import torch
from torch import nn

import adacomcat
from adacomcat import data, train
from adacomcat.checkpoint import folder
from adacomcat.distill.config import TrainConfig
from adacomcat.utils.files import atomic_write_text

HERE = Path(__file__).parent
# method → (preset of TrainConfig, epochs; None: those of the command line)
METHODS = {"training-free": ("adacomcat", 0), "ours": ("adacomcat", None),
           "ComCAT": ("comcat", None)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default=HERE / "weights", type=Path)
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--keeps", default=[0.5, 0.3, 0.15, 0.08], type=float, nargs="+")
    parser.add_argument("--epochs", default=3, type=int)
    parser.add_argument("--batch-size", default=128, type=int)
    parser.add_argument("--lr", default=1e-3, type=float)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--output", default=HERE, type=Path)
    return parser.parse_args()


def compare(model: nn.Module, args: argparse.Namespace) -> dict[str, dict]:
    """'METHOD KEEP' → what ``train.run`` measured."""
    config = data.model_data_config(model)
    train_set, test_set = data.train_and_test("fashion-mnist", args.data_dir, config)
    path = args.output / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for keep in args.keeps:
        for method, (preset, epochs) in METHODS.items():
            key = f"{method} {keep}"
            if key in results:
                continue
            settings = TrainConfig.preset(
                preset, keep_params=keep, seed=args.seed, lr=args.lr, batch_size=args.batch_size,
                search_images="held-out", lr_base=None,  # the test set judges alone
                epochs=args.epochs if epochs is None else epochs)
            found = train.run(model, settings, train_set, test_set).results
            results[key] = {name: found.get(name) for name in (
                "top1", "keep", "params", "dense_top1", "seconds", "search_count",
                "search_seconds", "history")}
            atomic_write_text(path, json.dumps(results, indent=1, allow_nan=False))
            print(f"{key}: top-1 {found['top1']:.2f} at {found['keep']:.3f} of the parameters, "
                  f"{found['seconds']:.0f} s", flush=True)
    return results


def table(results: dict[str, dict], args: argparse.Namespace) -> str:
    """The content of RESULTS.md."""
    dense = next(iter(results.values()))["dense_top1"]
    lines = [
        "# Fashion-MNIST: accuracy at each budget", "",
        f"Dense top-1: {dense:.2f} %. {args.epochs} epochs of search and distillation, "
        f"seed {args.seed}, lr {args.lr:g}, batch {args.batch_size}.", "",
        f"`python examples/fashion_mnist/compare.py --epochs {args.epochs} --seed {args.seed}`, "
        f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads.", "",
        "| keep | training-free | ours | ComCAT's method | searches (ours / ComCAT) | "
        "seconds (ours / ComCAT) |",
        "| --- | --- | --- | --- | --- | --- |"]
    for keep in args.keeps:
        free, ours, comcat = (results[f"{method} {keep}"] for method in METHODS)
        lines.append(f"| {keep} | {free['top1']:.2f} | {ours['top1']:.2f} | {comcat['top1']:.2f} "
                     f"| {ours['search_count']} / {comcat['search_count']} "
                     f"| {ours['seconds']:.0f} / {comcat['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    model = folder.load(args.weights)
    results = compare(model.eval(), args)
    atomic_write_text(args.output / "RESULTS.md", table(results, args))
    print(table(results, args))
    print(f"adacomcat {adacomcat.__version__}: written to {args.output / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
