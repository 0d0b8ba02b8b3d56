"""The whole way on real images, without a download: train, compress, search, distil, save, reload.

A small timm ViT learns scikit-learn's handwritten digits. It is compressed without training, and
once more by rank search with distillation. timm itself loads the saved model, and all four models
are measured side by side.
"""

import argparse
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
from adacomcat.latency.timing import latency as measured_latency
from adacomcat.report.tables import Comparison, print_comparison
from adacomcat.utils.distributed import Processes
from adacomcat.utils.limits import FRACTION, at_least

ARCHITECTURE = "vit_tiny_patch16_224"
SIZE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10,
                        "embed_dim": 96, "depth": 4, "num_heads": 3}
CALIBRATION_IMAGES = 256
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
                      keep_params: float) -> nn.Module:
    """Search ranks while the compressed model learns from the dense one."""
    config = TrainConfig(keep_params=keep_params, epochs=max(1, epochs // 3), lr=1e-3,
                         batch_size=BATCH, search_steps=10, seed=seed,
                         calibration_images=CALIBRATION_IMAGES)
    return train.run(dense, config, train_set).model


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
    adacomcat.save(searched, output)
    reloaded = timm.create_model(f"local-dir:{output}", pretrained=True).eval()

    comparison = measure({"dense": dense, "training-free": training_free,
                          "searched + distilled": searched, "reloaded by timm": reloaded}, test_set)
    print_comparison(f"{len(test_set)} test digits; latency of {BATCH} images, "
                     f"threads: {torch.get_num_threads()}", comparison)
    say("done")
    print(f"written to {output}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        sys.exit(2)
