"""What the training state costs: runs that write it once a minute beside runs that keep none.

    python bench/training_state.py
    python bench/training_state.py --model deit_base_patch16_224 --turns 3

Runs of equal steps take turns. The state has the weights, AdamW's two moments and the averaged
weights; a thread of its own writes it, with a checksum, and waits for the disk.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import timm
import torch
from machine import machine

from adacomcat import data
from adacomcat.distill.config import TrainConfig
from adacomcat.distill.trainer import Trainer
from adacomcat.utils.distributed import Processes
from adacomcat.utils.progress import progress


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=1.2, help="of one run")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the state goes (default: a new one)")
    return parser.parse_args()


def trainer_of(args: argparse.Namespace, steps: int, state: Path | None) -> Trainer:
    torch.manual_seed(0)
    model = timm.create_model(args.model, in_chans=1, num_classes=10)
    images, _ = data.train_and_test("digits", None, data.model_data_config(model))
    settings = TrainConfig(epochs=1, steps=steps, batch_size=args.batch_size, keep_params=None,
                           ema_decay=0.999, augment=False, device="cpu",
                           state_dir=None if state is None else str(state)).checked()
    return Trainer(model, settings, images, Processes())


def seconds_of(args: argparse.Namespace, steps: int, state: Path | None) -> float:
    """Seconds of a run, without what it ends with."""
    trainer = trainer_of(args, steps, state)
    if state is not None:
        trainer.save()  # the minute until the next one begins here
    begin, ends = time.perf_counter(), []
    trainer.observer = lambda event: ends.append(time.perf_counter())
    trainer.train()
    return ends[-3] - begin  # the last step; then come the epoch and the end


def seconds_of_a_state(args: argparse.Namespace, state: Path) -> dict[str, float]:
    """Medians: what the run waits for, and the processor time of all that a state takes."""
    trainer, rows = trainer_of(args, 2, state), []
    trainer.train()  # the optimiser has its moments
    for _ in range(5):
        begin, processor = time.perf_counter(), time.process_time()
        trainer.save()
        waited = time.perf_counter() - begin
        assert trainer.writer is not None
        trainer.writer.finish()
        rows.append((waited, time.process_time() - processor))
    return dict(zip(("waits", "processor"), map(median, zip(*rows, strict=True)), strict=True))


def main() -> None:
    args = arguments()
    steps = max(2, int(60 * args.minutes / (seconds_of(args, 6, None) / 6)))
    found: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for turn in progress(range(args.turns), "turns", total=args.turns):
            for name in sorted(found, reverse=bool(turn % 2)):
                state = Path(folder) / f"{turn}" if name == "with" else None
                found[name].append(seconds_of(args, steps, state))
        one = seconds_of_a_state(args, Path(folder) / "one")
        size = max(file.stat().st_size for file in Path(folder).rglob("*.pt"))
    ratio = median(a / b for a, b in zip(found["with"], found["without"], strict=True))
    print(json.dumps(machine() | {"model": args.model, "steps": steps, "state_mb": size / 1e6,
                                  "seconds": found, "with / without": ratio,
                                  "seconds of a state": one}, indent=2))


if __name__ == "__main__":
    main()
