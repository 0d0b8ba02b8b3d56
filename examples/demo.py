"""The whole way on real images, without a download: train, compress, search, distil, save, reload.

A small timm ViT learns scikit-learn's handwritten digits. It is compressed without training, and
once more by rank search with distillation. timm itself loads the saved model, and all four models
are measured side by side. The last line names a page with all of it, and with a curve of sizes.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat import cost, data, train
from adacomcat.cli.arguments import number
from adacomcat.distill import TrainConfig, evaluate
from adacomcat.errors import UserError
from adacomcat.evaluation.pareto import Sized, knee, points
from adacomcat.evaluation.passes import classified, rows_of
from adacomcat.evaluation.scores import measures
from adacomcat.latency.timing import latency as measured_latency
from adacomcat.report.files import record
from adacomcat.report.page import write_page
from adacomcat.report.provenance import run_content
from adacomcat.report.tables import Comparison, print_comparison
from adacomcat.utils.distributed import Processes
from adacomcat.utils.limits import FRACTION, at_least

ARCHITECTURE = "vit_tiny_patch16_224"
SIZE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10,
                        "embed_dim": 96, "depth": 4, "num_heads": 3}
CALIBRATION_IMAGES = 256
SIZES = (0.5, 0.3, 0.2)  # of the curve, beside the size that is asked for
BATCH = 64


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--keep-params", type=number(FRACTION), default=0.1, metavar="FRACTION",
                        help="share of the parameters to keep (default: %(default)s)")
    parser.add_argument("--epochs", type=number(at_least(1)), default=20, metavar="N",
                        help="epochs of dense training; search and distillation take a third as "
                             "many (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="checkpoint folder, absent or empty (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


def train_dense(epochs: int, seed: int, train_set: Any, model: nn.Module) -> nn.Module:
    config = TrainConfig(epochs=epochs, warmup_epochs=min(2, epochs // 2), lr=2e-3,
                         batch_size=BATCH, kd="none", align="none", seed=seed)
    return train.run(model, config, train_set).model


def search_and_distil(epochs: int, seed: int, train_set: Any, dense: nn.Module,
                      keep_params: float) -> train.TrainResult:
    """Search ranks while the compressed model learns from the dense one."""
    config = TrainConfig(keep_params=keep_params, epochs=max(1, epochs // 3), lr=1e-3,
                         batch_size=BATCH, search_steps=10, seed=seed,
                         calibration_images=CALIBRATION_IMAGES)
    return train.run(dense, config, train_set)


def calibration_images(train_set: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train_set), generator=generator)[:CALIBRATION_IMAGES]
    return train_set.batch(chosen)[0]


def measure(models: dict[str, nn.Module], test_set: Any) -> Comparison:
    latency = measured_latency(models, BATCH)
    return Comparison({name: {
        "top1": evaluate(model, test_set, 4 * BATCH, Processes())["top1"],
        "params": cost.model_params(model), "macs": cost.model_macs(model),
        "latency_ms": latency[name],
    } for name, model in models.items()})


def curve(models: list[Sized], test_set: Any) -> dict[str, Any]:
    """The content of pareto.json: top-1 over size and milliseconds."""
    def judge(model: nn.Module) -> dict[str, Any]:
        rows = rows_of(classified, model, test_set, 4 * BATCH, Processes())
        found = measures(rows["best"], rows["labels"])
        return {"top1": found["top1"], "interval": found["top1_interval"]}

    rows = points(models, judge, ["float32"], cost.model_params(models[0].model), BATCH)
    bend = [row for row in rows if row["kind"] != "landmark"]
    at = knee([row["params"] for row in bend], [row["top1"] for row in bend])
    return {"model": ARCHITECTURE, "quality": "top1", "quality_label": "top-1 %", "points": rows,
            "images": len(test_set), "latency_batch": BATCH, "knee": bend[at]["name"]}


def report(output: Path, dense: nn.Module, searched: train.TrainResult, comparison: Comparison,
           drawn: dict[str, Any]) -> Path:
    """The page, from the files that it is made of."""
    rows = {"dense": comparison.rows["dense"],
            "compressed": comparison.rows["searched + distilled"]}
    measured = {name: {key: row[key] for key in ("top1", "latency_ms")}
                for name, row in rows.items()}
    record(output, "run", run_content(
        shlex.join(["python", *sys.argv]), dense, searched.model, output, measured=measured,
        latency_batch=BATCH, history=searched.results["history"],
        searches=searched.results["searches"]))
    record(output, "pareto", drawn)
    return write_page([output])


def main() -> None:
    args = arguments()
    output = args.output or Path(tempfile.mkdtemp(prefix="adacomcat-demo-"))
    adacomcat.checkpoint.require_empty(output)
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {what}", flush=True)

    torch.manual_seed(args.seed)
    model = timm.create_model(ARCHITECTURE, **SIZE)
    train_set, test_set = data.train_and_test("digits", None, data.model_data_config(model))
    say(f"training a dense ViT on {len(train_set):,} digits, {args.epochs} epochs")
    dense = train_dense(args.epochs, args.seed, train_set, model)
    say(f"compressing it to {args.keep_params:g} of its parameters, training-free")
    training_free = adacomcat.compress(dense, keep_params=args.keep_params,
                                       calibration=calibration_images(train_set, args.seed))
    say("searching ranks and distilling")
    searched = search_and_distil(args.epochs, args.seed, train_set, dense, args.keep_params)
    say("saving, reloading with timm, measuring")
    adacomcat.save(searched.model, output)
    reloaded = timm.create_model(f"local-dir:{output}", pretrained=True).eval()

    comparison = measure({"dense": dense, "training-free": training_free,
                          "searched + distilled": searched.model, "reloaded by timm": reloaded},
                         test_set)
    print_comparison(f"{len(test_set)} test digits; latency of {BATCH} images, "
                     f"threads: {torch.get_num_threads()}", comparison)
    say("drawing a curve of sizes")
    images = calibration_images(train_set, args.seed)
    sizes = [Sized(f"keep {keep:g}", "compressed",
                   adacomcat.compress(dense, keep_params=keep, calibration=images))
             for keep in SIZES if keep != args.keep_params]
    drawn = curve([Sized("dense", "dense", dense), *sizes,
                   Sized(f"keep {args.keep_params:g}", "compressed", training_free),
                   Sized("searched + distilled", "landmark", searched.model)], test_set)
    page = report(output, dense, searched, comparison, drawn)
    say("done")
    print(f"written to {output}; look at {page}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        sys.exit(2)
