"""Hours of everything in one process on several threads: memory and descriptors must stay flat.

Each thread trains a small ViT with a search, saves, loads and evaluates it, optimises it, quantises
it and compresses it anew, over and over. SAMPLES gets a line every few seconds, CHART draws them,
and the table of medians is printed at the end.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import timm
import torch

import adacomcat
from adacomcat import data, train
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.evaluation import evaluate
from adacomcat.utils.distributed import Processes

SAMPLES, CHART = "samples.jsonl", "soak.svg"
PARTS = 8  # rows of the table
MEASURES = {"memory_mb": "resident memory, MB", "descriptors": "open files",
            "threads": "threads", "turns": "turns so far"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", default=120.0, type=float)
    parser.add_argument("--threads", default=3, type=int, help="that take turns, beside our own")
    parser.add_argument("--seconds", default=10.0, type=float, help="between two samples")
    parser.add_argument("--output", default=Path("build/soak"), type=Path, help="a folder")
    parser.add_argument("--seed", default=0, type=int)
    return parser.parse_args()


def small_vit(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, in_chans=1,
                             embed_dim=64, depth=2, num_heads=2, num_classes=10)


def turn(draw: random.Random, folder: Path) -> None:
    """Train → save → load → evaluate → optimize → quantize → compress, each result looked at."""
    model = small_vit(draw.randrange(10**6))
    config = data.model_data_config(model)
    train_set, test_set = data.train_and_test("digits", None, config)
    some = torch.tensor(draw.sample(range(len(train_set)), 256))
    settings = TrainConfig(epochs=1, steps=6, batch_size=32, search="every", search_steps=2,
                           calibration_images=32, keep_params=draw.uniform(0.4, 0.8),
                           ema_decay=draw.choice((None, 0.9))).checked()
    trained = train.run(model, settings, train_set.subset(some), test_set).model
    adacomcat.save(trained, folder / "model")
    loaded = adacomcat.load(folder / "model")
    for name, value in trained.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    evaluate(loaded, test_set.subset(torch.arange(128)), 64, Processes())
    images = torch.stack([test_set[at][0] for at in range(8)])
    with torch.inference_mode():
        expected = loaded(images)
        fast = adacomcat.optimize(adacomcat.load(folder / "model"))
        assert torch.allclose(fast(images), expected, rtol=1e-4, atol=1e-4)
    small = adacomcat.quantize(loaded, images)
    adacomcat.save(small, folder / "int8")
    with torch.inference_mode():
        adacomcat.optimize(adacomcat.load(folder / "int8"))(images)
    adacomcat.compress(model, keep_params=draw.uniform(0.4, 0.9), calibration=images)


class Worker(threading.Thread):
    """Takes turns until it is told to stop; what went wrong is kept."""

    def __init__(self, number: int, seed: int, ends: threading.Event) -> None:
        super().__init__(name=f"worker {number}")
        self.draw, self.ends = random.Random(f"{seed} {number}"), ends
        self.turns, self.fault = 0, ""

    def run(self) -> None:
        try:
            while not self.ends.is_set():
                with tempfile.TemporaryDirectory() as folder:
                    turn(self.draw, Path(folder))
                self.turns += 1
        except BaseException:
            self.fault = traceback.format_exc()
            self.ends.set()


def sample(start: float, workers: list[Worker]) -> dict[str, float]:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {"minutes": (time.monotonic() - start) / 60,
            "memory_mb": int(fields["VmRSS"].split()[0]) / 1024,
            "descriptors": len(os.listdir("/proc/self/fd")), "threads": int(fields["Threads"]),
            "turns": sum(worker.turns for worker in workers)}


def table(samples: list[dict[str, float]]) -> str:
    """Medians over equal parts of the time, as Markdown."""
    lines = ["| minutes | " + " | ".join(MEASURES.values()) + " |",
             "| --- |" + " --- |" * len(MEASURES)]
    last = samples[-1]["minutes"]
    for part in range(PARTS):
        low, high = last * part / PARTS, last * (part + 1) / PARTS
        within = [one for one in samples if low <= one["minutes"] <= high]
        lines.append(f"| {low:.0f} to {high:.0f} | " + " | ".join(
            f"{median(one[name] for one in within):.0f}" for name in MEASURES) + " |")
    return "\n".join(lines)


def draw_chart(samples: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(3, sharex=True, figsize=(8, 6), layout="constrained")
    for axis, name in zip(axes, ("memory_mb", "descriptors", "threads"), strict=True):
        axis.plot([one["minutes"] for one in samples], [one[name] for one in samples])
        axis.set_ylabel(MEASURES[name])
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    figure.savefig(path)


def main() -> None:
    args = arguments()
    warnings.simplefilter("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    ends, start, samples = threading.Event(), time.monotonic(), []
    workers = [Worker(number, args.seed, ends) for number in range(args.threads)]
    for worker in workers:
        worker.start()
    with open(args.output / SAMPLES, "w", encoding="utf-8") as file:
        while not ends.wait(args.seconds) and time.monotonic() - start < 60 * args.minutes:
            samples.append(sample(start, workers))
            print(json.dumps(samples[-1]), file=file, flush=True)
    ends.set()
    for worker in workers:
        worker.join()
    faults = [f"{worker.name}: {worker.fault}" for worker in workers if worker.fault]
    if faults:
        raise SystemExit("\n".join(faults))
    draw_chart(samples, args.output / CHART)
    print(table(samples))
    print(f"\n{args.threads} threads, {torch.get_num_threads()} of PyTorch's in each, "
          f"torch {torch.__version__}, {platform.machine()}")


if __name__ == "__main__":
    main()
