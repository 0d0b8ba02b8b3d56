"""Compress the U-Net of train_base.py, teach the small model what a boot is, and judge both.

Calibration shows the U-Net what it sees in training: noised latents of the old classes, with the
captions. COMPRESSED.md is written at the end.
"""

import argparse
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
import torch
from compare import (
    CLASS,
    HERE,
    INSTANCE,
    METHODS,
    RANK,
    Judge,
    class_pictures,
    given_pictures,
    make_and_judge,
    spread,
)
from train_base import LEFT_OUT, captions, pictures

from adacomcat import compress_
from adacomcat.customize import (
    CustomizeConfig,
    adapter_parameters,
    add_adapters,
    open_pipeline,
    save_pipeline,
)
from adacomcat.customize.pipeline import encode_pictures, encode_prompt
from adacomcat.customize.trainer import CustomizeTrainer
from adacomcat.utils.files import atomic_write_text

ADAPTERS = "adapters, zero start"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--base", default=HERE / "weights", type=Path)
    parser.add_argument("--classifier", default=HERE.parent / "fashion_mnist/weights", type=Path)
    parser.add_argument("--keep-params", default=[0.9, 0.8], type=float, nargs="+",
                        help="of the whole U-Net, whose convolutions stay as they are")
    parser.add_argument("--calibration", default=512, type=int, help="noised pictures")
    parser.add_argument("--pictures", default=6, type=int)
    parser.add_argument("--class-pictures", default=32, type=int)
    parser.add_argument("--steps", default=300, type=int)
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    parser.add_argument("--judged", default=72, type=int)
    parser.add_argument("--denoising", default=15, type=int)
    parser.add_argument("--guidance", default=3.0, type=float)
    return parser.parse_args()


@torch.no_grad()
def calibration(pipe: Any, seed: int, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Noised latents of old classes, timesteps, and encoded captions, by the U-Net's names."""
    images, labels = pictures(args.data_dir, 0)
    old = torch.nonzero(labels != LEFT_OUT).flatten()[:args.calibration]
    torch.manual_seed(seed)
    clean, _ = encode_pictures(pipe, images[old], 64)
    times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(old),))
    words = torch.cat([encode_prompt(pipe, one) for one in captions(labels[old])])
    noisy = pipe.scheduler.add_noise(clean, torch.randn_like(clean), times)
    return {"sample": noisy, "timestep": times, "encoder_hidden_states": words}


def run(keep: float, seen: bool, seed: int, known: torch.Tensor, judge: Judge,
        args: argparse.Namespace) -> dict[str, float]:
    """Sizes, seconds, and hit rates before and after customising."""
    pipe = open_pipeline(str(args.base), torch.device("cpu"))
    start = time.perf_counter()
    if keep < 1:
        compress_(pipe.unet, keep_params=keep, include="*transformer_blocks*", multiple=2,
                  calibration=calibration(pipe, seed, args) if seen else None)
    found = {"compress_seconds": time.perf_counter() - start,
             "numbers": sum(p.numel() for p in pipe.unet.parameters())}
    with tempfile.TemporaryDirectory() as scratch:  # what is judged is what was on the disk
        save_pipeline(pipe, Path(scratch) / "small")
        weights = Path(scratch) / "small/unet/diffusion_pytorch_model.safetensors"
        found["bytes"] = weights.stat().st_size
        pipe = open_pipeline(str(Path(scratch) / "small"), torch.device("cpu"))
    found |= {f"before_{name}": value
              for name, value in make_and_judge(pipe, judge, args, INSTANCE)[0].items()}
    add_adapters(pipe, RANK, seed=seed)
    config = CustomizeConfig(instance_prompt=INSTANCE, class_prompt=CLASS, steps=args.steps,
                             batch_size=args.batch_size, lr=METHODS[ADAPTERS][1], seed=seed)
    factors = {str(at): p for at, p in enumerate(adapter_parameters(pipe))}
    trainer = CustomizeTrainer(pipe, config.checked(), given_pictures(args, seed), factors,
                               class_pictures=known)
    trainer.train()
    found["seconds"] = trainer.seconds
    return found | make_and_judge(pipe, judge, args, INSTANCE)[0]


def table(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """The content of COMPRESSED.md."""
    lines = [
        "# Customising a compressed model", "",
        "`adacomcat.compress` makes the attentions and feed-forward layers of the U-Net low-rank, "
        "by weights alone or with calibration inputs. Its convolutions and the rest, 63 % of its "
        f"numbers, stay. Then adapters of rank {RANK} learn boots, as in RESULTS.md, whose judge "
        "and figures these are: percent of pictures that the classifier takes for what was asked. "
        f"A cell is the mean of {len(args.seeds)} seeds, with the least and the largest; each seed "
        f"has other boots, and {args.judged} pictures are judged.", "",
        "| U-Net | numbers | kB, float32 | old, before | boots, after | old, after | seconds |",
        "| --- |" + " --- |" * 6]
    for name, found in rows.items():
        hits = (spread([row[key] for row in found], ".0f")
                for key in ("before_old_hit", "new_hit", "old_hit"))
        lines.append(f"| {name} | {int(found[0]['numbers']):,} | {found[0]['bytes'] / 1000:.0f} | "
                     f"{' | '.join(hits)} | {mean(row['seconds'] for row in found):.0f} |")
    flags = f"--keep-params {' '.join(map(str, args.keep_params))} --calibration " \
            f"{args.calibration} --steps {args.steps} --seeds {' '.join(map(str, args.seeds))} " \
            f"--judged {args.judged}"
    return "\n".join([*lines, "", f"`python examples/customize/shrink.py {flags}`, {date.today()}, "
                      f"torch {torch.__version__}, diffusers {diffusers.__version__}, "
                      f"{platform.machine()}, {torch.get_num_threads()} thread of a shared "
                      "machine: seconds of training vary with what else runs there."]) + "\n"


def main() -> None:
    args = arguments()
    torch.set_flush_denormal(True)
    judge, known = Judge(args), class_pictures(args)
    kinds = {"as it is": (1.0, False)} | {
        f"{keep:.0%}, {'calibrated' if seen else 'weights alone'}": (keep, seen)
        for keep in args.keep_params for seen in (False, True)}
    rows = {}
    for name, kind in kinds.items():
        rows[name] = [run(*kind, seed, known, judge, args) for seed in args.seeds]
        print(name, rows[name], flush=True)
    text = table(rows, args)
    atomic_write_text(HERE / "COMPRESSED.md", text)
    print(text)


if __name__ == "__main__":
    main()
