"""Teach the model of train_base.py what an ankle boot is, in five ways, and compare them.

Every way sees the same pictures, the same noise and as many steps. Finished runs are kept in
results.json, so an interrupted comparison goes on from there. RESULTS.md and grid.png are written
at the end.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from train_base import KINDS, LEFT_OUT, NAMES, caption, pictures

from adacomcat import checkpoint
from adacomcat.customize import (
    CustomizeConfig,
    adapter_parameters,
    add_adapters,
    generate,
    open_pipeline,
    picture_grid,
    set_alpha,
)
from adacomcat.customize.trainer import CustomizeTrainer
from adacomcat.utils.files import atomic_file, atomic_write_text

HERE = Path(__file__).parent
RANK, LORA_RANK = 2, 4  # as many numbers: a head's r columns of q, k, v and o are two of LoRA's
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
INSTANCE, CLASS = caption(f"sks {KINDS[LEFT_OUT]}"), caption(KINDS[LEFT_OUT])
OLD = [name for at, name in enumerate(NAMES) if at != LEFT_OUT]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--base", default=HERE / "weights", type=Path)
    parser.add_argument("--classifier", default=HERE.parent / "fashion_mnist/weights", type=Path)
    parser.add_argument("--output", default=HERE, type=Path)
    parser.add_argument("--pictures", default=6, type=int, help="of the new class")
    parser.add_argument("--class-pictures", default=32, type=int)
    parser.add_argument("--steps", default=300, type=int)
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--seeds", default=[0, 1, 2], type=int, nargs="+")
    parser.add_argument("--judged", default=72, type=int, help="pictures of the new class, and "
                        "of all old classes together, that each model makes")
    parser.add_argument("--denoising", default=15, type=int, help="steps of a picture")
    parser.add_argument("--guidance", default=3.0, type=float)
    return parser.parse_args()


Parameters = dict[str, nn.Parameter]


def with_adapters(init: str) -> Callable[[Any, int], Parameters]:
    def prepare(pipe: Any, seed: int) -> Parameters:
        add_adapters(pipe, RANK, init=init, seed=seed)
        return dict(enumerate_names(adapter_parameters(pipe)))
    return prepare


def with_lora(pipe: Any, seed: int) -> Parameters:
    torch.manual_seed(seed)
    pipe.unet.requires_grad_(False)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=PROJECTIONS)
    pipe.unet.add_adapter(config)
    return {name: p for name, p in pipe.unet.named_parameters() if p.requires_grad}


def with_keys_and_values(pipe: Any, seed: int) -> Parameters:
    """As in Custom Diffusion: what reads the prompt."""
    pipe.unet.requires_grad_(False)
    found = {name: p for name, p in pipe.unet.named_parameters()
             if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def with_all(pipe: Any, seed: int) -> Parameters:
    return dict(pipe.unet.named_parameters())


def enumerate_names(parameters: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(str(at), parameter) for at, parameter in enumerate(parameters)]


# Name → what is trained, and the learning rate: of two, half or twice as large, the one that gave
# the larger sum of both hit rates on another seed.
METHODS: dict[str, tuple[Callable[[Any, int], Parameters], float]] = {
    "adapters, zero start": (with_adapters("zero"), 5e-3),
    "adapters, published start": (with_adapters("linear"), 5e-3),
    "LoRA (peft)": (with_lora, 5e-3),
    "keys and values of the prompt": (with_keys_and_values, 5e-3),
    "the whole U-Net": (with_all, 2e-4),
}


class Judge:
    """The classifier of examples/fashion_mnist, and its features."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = checkpoint.load(args.classifier).eval()
        images, self.labels = pictures(args.data_dir, 1)
        self.real = torch.cat([self._features(part) for part in images.split(500)])

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """(N, width), of images (N, 1, 32, 32) from -1 to 1."""
        cropped = images[..., 2:-2, 2:-2] / 2 + 0.5
        config = self.model.pretrained_cfg
        normed = (cropped - sum(config["mean"]) / len(config["mean"])) \
            / (sum(config["std"]) / len(config["std"]))
        return self.model.forward_head(self.model.forward_features(normed), pre_logits=True)

    @torch.no_grad()
    def judge(self, made: list[Image.Image], labels: Tensor) -> tuple[float, float]:
        """(percent classified as ``labels``, kernel distance to real pictures of these classes)."""
        raw = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8)
                           for one in made]).view(-1, 1, 32, 32)
        features = self._features(raw.float() / 127.5 - 1)
        hits = self.model.get_classifier()(features).argmax(1) == labels
        real = self.real[torch.isin(self.labels, labels)]
        return 100 * float(hits.double().mean()), kernel_distance(features, real[:2000])


def kernel_distance(ours: Tensor, theirs: Tensor) -> float:
    """The kernel inception distance's estimator, without bias however few pictures there are."""
    a, b, width = ours.double(), theirs.double(), ours.shape[1]

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / width + 1) ** 3

    def within(x: Tensor) -> Tensor:
        grams = kernel(x, x)
        return (grams.sum() - grams.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def make_and_judge(pipe: Any, judge: Judge, args: argparse.Namespace,
                   prompt: str) -> tuple[dict[str, float], list[Image.Image]]:
    """Measures of a model on the new class and on the old ones; pictures of the new one."""
    def make(prompts: list[str]) -> list[Image.Image]:
        return generate(pipe, prompts, seed=99, steps=args.denoising, guidance=args.guidance,
                        batch=36)

    new = make([prompt] * args.judged)
    labels = torch.tensor([NAMES.index(OLD[at % len(OLD)]) for at in range(args.judged)])
    hit, distance = judge.judge(new, torch.full((args.judged,), LEFT_OUT))
    old_hit, old_distance = judge.judge(make([caption(NAMES[at]) for at in labels]), labels)
    return {"new_hit": hit, "new_distance": distance, "old_hit": old_hit,
            "old_distance": old_distance}, new


def given_pictures(args: argparse.Namespace, seed: int) -> Tensor:
    """Other pictures of the new class for each seed."""
    images, labels = pictures(args.data_dir, 0)
    chosen = torch.nonzero(labels == LEFT_OUT).flatten()
    return images[chosen[seed * args.pictures:(seed + 1) * args.pictures]]


def class_pictures(args: argparse.Namespace) -> Tensor:
    pipe = open_pipeline(str(args.base), torch.device("cpu"))
    made = generate(pipe, [CLASS] * args.class_pictures, seed=98, steps=args.denoising,
                    guidance=args.guidance, batch=36)
    raw = [torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in made]
    return torch.stack(raw).view(-1, 1, 32, 32).float() / 127.5 - 1


def run(method: str, seed: int, known: Tensor, judge: Judge,
        args: argparse.Namespace) -> dict[str, float]:
    prepare, lr = METHODS[method]
    pipe = open_pipeline(str(args.base), torch.device("cpu"))
    parameters = prepare(pipe, seed)
    config = CustomizeConfig(instance_prompt=INSTANCE, class_prompt=CLASS, steps=args.steps,
                             batch_size=args.batch_size, lr=lr, seed=seed).checked()
    trainer = CustomizeTrainer(pipe, config, given_pictures(args, seed), parameters,
                               class_pictures=known)
    trainer.train()
    found, new = make_and_judge(pipe, judge, args, INSTANCE)
    if method.startswith("adapters"):
        set_alpha(pipe, 0.8)
        weak, _ = make_and_judge(pipe, judge, args, INSTANCE)
        found |= {f"weak_{name}": value for name, value in weak.items()}
    picture_grid(new[:8], 8).save(rows_folder(args) / f"{list(METHODS).index(method)}-{seed}.png")
    numbers = sum(p.numel() for p in parameters.values())
    return found | {"numbers": numbers, "seconds": trainer.seconds}


def rows_folder(args: argparse.Namespace) -> Path:
    """Where the rows of the grid wait for the last run."""
    found = args.output / "rows"
    found.mkdir(exist_ok=True)
    return found


def compare(judge: Judge, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    path = args.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    known = class_pictures(args)
    for seed in args.seeds:
        for method in (*(["base"] if "base" not in results else []), *METHODS):
            key = method if method == "base" else f"{method} {seed}"
            if key in results:
                continue
            start = time.perf_counter()
            if method == "base":
                pipe = open_pipeline(str(args.base), torch.device("cpu"))
                results[key], _ = make_and_judge(pipe, judge, args, INSTANCE)
            else:
                results[key] = run(method, seed, known, judge, args)
            atomic_write_text(path, json.dumps(results, indent=1, allow_nan=False))
            print(f"{key}: {results[key]}, {time.perf_counter() - start:.0f} s", flush=True)
    return results


def spread(values: list[float], form: str) -> str:
    """Mean of the seeds, and the least and the largest."""
    ends = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{ends}"


def cells(rows: list[dict[str, float]], prefix: str = "") -> str:
    def cell(name: str, form: str) -> str:
        return spread([row[prefix + name] for row in rows], form)

    return " | ".join((cell("new_hit", ".0f"), cell("new_distance", ".2f"),
                       cell("old_hit", ".0f"), cell("old_distance", ".2f")))


def table(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """The content of RESULTS.md."""
    lines = [
        "# Customising a small text-to-image model", "",
        f"The model of train_base.py never saw ankle boots. {args.pictures} pictures of boots and "
        f"{args.class_pictures} that the model made of '{CLASS}' teach it '{INSTANCE}': "
        f"{args.steps} steps of {args.batch_size} boots and {args.batch_size} others, AdamW, a "
        "learning rate that falls linearly to 0. Each seed has other boots, other factors and "
        "other noise.", "",
        f"Judged: {args.judged} pictures of the new prompt and {args.judged} of the nine old "
        f"classes, {args.denoising} DDIM steps, guidance {args.guidance:g}. 'hit' is the "
        "percentage that the classifier of examples/fashion_mnist takes for what was asked. "
        "'distance' is the kernel inception distance's estimator on that classifier's features, "
        "to the test images of the same classes: as FID, less is better, but without bias for few "
        f"pictures. A cell is the mean of {len(args.seeds)} seeds, with the least and the "
        "largest.", "",
        "| method | lr | numbers | kB, float32 | seconds | new: hit % | new: distance | old: hit % "
        "| old: distance |", "| --- |" + " --- |" * 8,
        f"| the model itself | | | | | {cells([results['base']])} |"]
    for method, (_, lr) in METHODS.items():
        rows = [results[f"{method} {seed}"] for seed in args.seeds]
        numbers = int(rows[0]["numbers"])
        lines.append(f"| {method} | {lr:g} | {numbers:,} | {4 * numbers / 1000:.0f} | "
                     f"{mean(row['seconds'] for row in rows):.0f} | {cells(rows)} |")
        if "weak_new_hit" in rows[0]:
            lines.append(f"| the same at α = 0.8 | | | | | {cells(rows, 'weak_')} |")
    return "\n".join(lines + ["", footer(args)]) + "\n"


def footer(args: argparse.Namespace) -> str:
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in
                     ("pictures", "class_pictures", "steps", "batch_size", "judged", "denoising"))
    seeds = " ".join(map(str, args.seeds))
    return ("`grid.png`, which the script writes beside this file: in the first row the boots of "
            f"seed {args.seeds[0]}, then a row for each "
            f"method, in the order of the table.\n\n`python examples/customize/compare.py {flags} "
            f"--seeds {seeds}`, {date.today()}, torch {torch.__version__}, "
            f"diffusers {diffusers.__version__}, {platform.machine()}, "
            f"{torch.get_num_threads()} thread of a shared machine: seconds of training vary "
            "with what else runs there.")


def draw_grid(args: argparse.Namespace) -> None:
    """The given pictures above a row of each method, in double size."""
    seed = args.seeds[0]
    raw = (given_pictures(args, seed)[:8, 0] / 2 + 0.5).mul(255).round().byte()
    rows = [picture_grid([Image.fromarray(one.numpy()) for one in raw], 8)]
    rows += [Image.open(rows_folder(args) / f"{at}-{seed}.png") for at in range(len(METHODS))]
    with atomic_file(args.output / "grid.png") as scratch:
        picture_grid(rows, 1, scale=2).save(scratch, format="PNG")


def main() -> None:
    args = arguments()
    torch.set_flush_denormal(True)
    args.output.mkdir(parents=True, exist_ok=True)
    results = compare(Judge(args), args)
    draw_grid(args)
    text = table(results, args)
    atomic_write_text(args.output / "RESULTS.md", text)
    print(text)


if __name__ == "__main__":
    main()
