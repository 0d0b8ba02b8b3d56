"""Teach the classifier of examples/fashion_mnist another task, handwritten digits, in few numbers.

The backbone is frozen, dense or compressed. Adapters of this package stand beside LoRA by peft of
exactly as many numbers, training the classifier alone, and training everything. Each learning rate
is the better of two on a seed that the table does not use. VITS.md is written at the end.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import peft
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from adacomcat import checkpoint, compress, data
from adacomcat.customize import add_adapters
from adacomcat.utils.files import atomic_write_text

HERE = Path(__file__).parent
RATES = (3e-3, 1e-2)
TUNING_SEED = 9
ATTENTIONS = r"blocks\.\d+\.attn\.(qkv|proj)"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--base", default=HERE.parent / "fashion_mnist/weights", type=Path)
    parser.add_argument("--keep-params", default=0.5, type=float, help="of the compressed base")
    parser.add_argument("--rank", default=4, type=int, help="of adapters; LoRA has twice that")
    parser.add_argument("--images", default=500, type=int, help="of digits, to learn from")
    parser.add_argument("--steps", default=100, type=int)
    parser.add_argument("--batch-size", default=32, type=int)
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    return parser.parse_args()


def head_only(model: nn.Module, rank: int, seed: int) -> None:
    model.requires_grad_(False)


def adapters(model: nn.Module, rank: int, seed: int) -> None:
    add_adapters(model, rank, seed=seed)


def published_adapters(model: nn.Module, rank: int, seed: int) -> None:
    add_adapters(model, rank, init="linear", seed=seed)


def lora(model: nn.Module, rank: int, seed: int) -> None:
    """A head's r columns of q, k, v and o are as many numbers as 2 r of qkv's and proj's LoRA."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    config = peft.LoraConfig(r=2 * rank, lora_alpha=2 * rank, target_modules=ATTENTIONS)
    peft.inject_adapter_in_model(config, model)


def everything(model: nn.Module, rank: int, seed: int) -> None:
    model.requires_grad_(True)


Method = Callable[[nn.Module, int, int], None]
# (backbone, name) → what is trained beside the classifier. LoRA of peft stands beside nn.Linear,
# which the attentions of a compressed model have none of.
METHODS: dict[tuple[str, str], Method] = {
    ("dense", "the classifier"): head_only,
    ("dense", "adapters, zero start"): adapters,
    ("dense", "adapters, published start"): published_adapters,
    ("dense", "LoRA (peft)"): lora,
    ("dense", "everything"): everything,
    ("compressed", "the classifier"): head_only,
    ("compressed", "adapters, zero start"): adapters,
}


class Task(NamedTuple):
    """Images (N, 1, 28, 28) and labels (N,) to learn from and to judge by."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(seed: int, count: int) -> Task:
    """scikit-learn's digits, enlarged from 8 to 28 pixels, in another order for each seed."""
    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=28, mode="bilinear")
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    return Task(images[:count], labels[:count], images[count:], labels[count:])


def bases(args: argparse.Namespace) -> dict[str, Callable[[], nn.Module]]:
    """Name → the backbone; the compressed one has seen 256 images of Fashion-MNIST."""
    dense = checkpoint.load(args.base)
    config = data.model_data_config(dense)
    train_set, _ = data.train_and_test("fashion-mnist", args.data_dir, config)
    seen, _ = train_set.batch(torch.arange(256))  # type: ignore[union-attr]
    small = compress(dense, keep_params=args.keep_params, calibration=seen)
    return {"dense": lambda: checkpoint.load(args.base), "compressed": lambda: copy.deepcopy(small)}


def run(model: nn.Module, method: Method, lr: float, seed: int,
        args: argparse.Namespace) -> dict[str, float]:
    """Accuracy on the test digits, seconds of training, and numbers beside the classifier's."""
    task = digits(seed, args.images)
    method(model, args.rank, seed)
    torch.manual_seed(seed)
    model.reset_classifier(10)  # type: ignore[operator]
    head: nn.Module = model.get_classifier()  # type: ignore[operator]
    head.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, args.steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    start = time.perf_counter()
    for _ in range(args.steps):
        chosen = torch.randint(len(task.labels), (args.batch_size,), generator=order)
        loss = F.cross_entropy(model(task.images[chosen]), task.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        hits = model.eval()(task.test_images).argmax(1) == task.test_labels
    numbers = sum(p.numel() for p in trained) - sum(p.numel() for p in head.parameters())
    return {"top1": 100 * float(hits.double().mean()), "seconds": seconds, "numbers": numbers}


def best_rate(base: Callable[[], nn.Module], method: Method, args: argparse.Namespace) -> float:
    """Everything trains at a tenth of the rates of few numbers."""
    scale = 0.1 if method is everything else 1.0
    found = {scale * lr: run(base(), method, scale * lr, TUNING_SEED, args)["top1"]
             for lr in RATES}
    return max(found, key=lambda lr: found[lr])


def table(lines: list[str], numbers: dict[str, int], args: argparse.Namespace) -> str:
    """The content of VITS.md."""
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}"
                     for name in ("keep_params", "rank", "images", "steps", "batch_size"))
    seeds = "of one seed" if len(args.seeds) == 1 else (
        f"a mean of {len(args.seeds)} seeds with the least and the largest; each seed has other "
        "training images")
    text = [
        "# Another task for a frozen ViT", "",
        f"The ViT of examples/fashion_mnist ({numbers['dense']:,} parameters; compressed "
        f"{numbers['compressed']:,}) learns scikit-learn's digits from {args.images} images, "
        f"{args.steps} steps of {args.batch_size}, AdamW, a learning rate that falls linearly to "
        f"0. Adapters have rank {args.rank} and LoRA rank {2 * args.rank}, beside the same "
        "attentions, and a new classifier of 1,930 numbers is trained in every row. Top-1 is that "
        f"of all other digits, {seeds}. Each learning rate is the better of two on seed "
        f"{TUNING_SEED}.", "",
        "| backbone | trained beside the classifier | lr | numbers | top-1 % | seconds |",
        "| --- |" + " --- |" * 5, *lines, "",
        f"`python examples/customize/vits.py {flags} --seeds {' '.join(map(str, args.seeds))}`, "
        f"{date.today()}, torch {torch.__version__}, timm {timm.__version__}, peft "
        f"{peft.__version__}, {platform.machine()}, {torch.get_num_threads()} thread of a shared "
        "machine: seconds of training vary with what else runs there."]
    return "\n".join(text) + "\n"


def main() -> None:
    args = arguments()
    torch.set_flush_denormal(True)
    backbones, lines = bases(args), []
    for (backbone, name), method in METHODS.items():
        base = backbones[backbone]
        lr = best_rate(base, method, args)
        rows = [run(base(), method, lr, seed, args) for seed in args.seeds]
        top1 = [row["top1"] for row in rows]
        spread = f" ({min(top1):.1f} to {max(top1):.1f})" if len(rows) > 1 else ""
        lines.append(f"| {backbone} | {name} | {lr:g} | {int(rows[0]['numbers']):,} | "
                     f"{mean(top1):.1f}{spread} | "
                     f"{mean(row['seconds'] for row in rows):.1f} |")
        print(lines[-1], flush=True)
    numbers = {name: sum(p.numel() for p in base().parameters())
               for name, base in backbones.items()}
    atomic_write_text(HERE / "VITS.md", table(lines, numbers, args))


if __name__ == "__main__":
    main()
