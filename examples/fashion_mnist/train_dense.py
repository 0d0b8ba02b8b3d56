"""Train the dense timm ViT of this example on Fashion-MNIST, on the CPU, and write its weights.

Nothing is selected by accuracy. The held-out images only show how training goes. The test images
are used once, for the averaged weights after the last epoch.
"""

import argparse
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from adacomcat import data
from adacomcat.utils.files import atomic_file, atomic_write_text

ARCHITECTURE = "vit_tiny_patch16_224"
HOLDOUT_FRACTION = 1 / 12  # 5,000 of 60,000 images


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--output", default="examples/fashion_mnist/weights", type=Path)
    parser.add_argument("--epochs", default=10, type=int)
    parser.add_argument("--warmup-epochs", default=0.25, type=float)
    parser.add_argument("--batch-size", default=128, type=int)
    parser.add_argument("--lr", default=6e-3, type=float)
    parser.add_argument("--weight-decay", default=0.05, type=float)
    parser.add_argument("--smoothing", default=0.1, type=float)
    parser.add_argument("--model-ema-decay", default=0.998, type=float)
    parser.add_argument("--patch-size", default=7, type=int)
    parser.add_argument("--depth", default=4, type=int)
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """timm's keyword arguments."""
    return {"img_size": 28, "patch_size": args.patch_size, "in_chans": 1, "num_classes": 10,
            "embed_dim": 192, "depth": args.depth, "num_heads": 3, "global_pool": "avg",
            "class_token": False}


@torch.inference_mode()
def accuracy(model: nn.Module, dataset: data.LabelledImages) -> float:
    """Top-1, from 0 to 1."""
    model.eval()
    batches = data.Batches(dataset, 500, shuffle=False, seed=0, epoch=0)
    correct = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
    return int(correct) / len(dataset)


def train(model: nn.Module, dataset: data.LabelledImages, args: argparse.Namespace) -> nn.Module:
    """Train ``model`` in place; the model of the averaged weights after the last epoch."""
    train_part, holdout = data.split_holdout(dataset, HOLDOUT_FRACTION, args.seed)
    # timm's Muon orthogonalises in bfloat16. On a CPU without bfloat16 instructions float32 takes
    # less than a thirtieth of the time.
    muon.zeropower_via_newtonschulz = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
    optimizer = create_optimizer_v2(model, opt="nmuon", lr=args.lr, weight_decay=args.weight_decay)
    steps = len(train_part) // args.batch_size
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs * steps, lr_min=1e-5,
        warmup_t=int(args.warmup_epochs * steps), warmup_lr_init=1e-5, warmup_prefix=True,
        t_in_epochs=False)
    criterion = LabelSmoothingCrossEntropy(args.smoothing)
    average = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True)
    for epoch in range(args.epochs):
        start, total = time.perf_counter(), 0.0
        model.train()
        batches = data.Batches(train_part, args.batch_size, shuffle=True, seed=args.seed,
                               epoch=epoch, augment=True)
        for step, (images, labels) in enumerate(batches):
            update = epoch * steps + step
            scheduler.step_update(update)
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model, step=update)
            total += loss.item()
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / steps:.4f}  "
              f"held-out {accuracy(average.module, holdout):.4f}  "
              f"{time.perf_counter() - start:.0f} s", flush=True)
    return average.module


def save(model: nn.Module, test_accuracy: float, args: argparse.Namespace) -> None:
    """Write model.safetensors and config.json."""
    args.output.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "model_args": model_arguments(args),
        "dataset": "fashion-mnist",
        "test_accuracy": test_accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "command": "python " + shlex.join(sys.argv),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    with atomic_file(args.output / "model.safetensors") as scratch:
        save_file(model.state_dict(), scratch, metadata={"format": "pt"})
    atomic_write_text(args.output / "config.json",
                      json.dumps(config, indent=2, allow_nan=False) + "\n")


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    model = timm.create_model(ARCHITECTURE, **model_arguments(args))
    model_cfg = data.model_data_config(model)
    train_set, test_set = data.train_and_test("fashion-mnist", args.data_dir, model_cfg)
    model = train(model, train_set, args)
    test_accuracy = accuracy(model, test_set)
    print(f"test accuracy {test_accuracy:.4f}", flush=True)
    save(model, test_accuracy, args)


if __name__ == "__main__":
    main()
