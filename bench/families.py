"""Families beside the plain ViT: what `optimize` makes of each, against a plain ViT of its width.

Each row has the dense model of timm or transformers in eager PyTorch, the same compressed, and that
one optimized; then a plain ViT of the same width, depth and tokens in these three forms. What
counts is the family's speed-up divided by that of the ViT. All models of a row run in turn; times
are medians. Where OpenVINO is installed, it runs the same ranks too.

The budget is half of the parameters, or with ``--budget macs`` half of the multiply-accumulates.
Parameters are no measure of Swin's time: most are in its last stages, and few products.

Run: ``python bench/families.py --batches 1 8 --threads 1 2``
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peers
import timm
import torch
from machine import machine
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification

import adacomcat

REPEATS = 11
KEEP = 0.5
BUDGETS = {"macs": "keep_macs", "params": "keep_params"}
CALIBRATION_IMAGES = 4


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def dinov2_small() -> nn.Module:
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224, num_labels=1000)
    return Dinov2ForImageClassification(config)


@dataclass(frozen=True)
class Family:
    """A model, and the plain ViT that it is compared with."""

    make: Callable[[], nn.Module]
    image: int
    width: int
    heads: int
    patch: int

    def vit(self) -> nn.Module:
        return VisionTransformer(self.image, self.patch, embed_dim=self.width, depth=12,
                                 num_heads=self.heads)


FAMILIES = {
    "DINOv3 ViT-S": Family(lambda: timm.create_model("vit_small_patch16_dinov3", num_classes=1000),
                           256, 384, 6, 16),
    "EVA-02 tiny": Family(lambda: timm.create_model("eva02_tiny_patch14_224"), 224, 192, 3, 14),
    # Half of its blocks and most of its time are in the stage of this width.
    "Swin-T": Family(lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224, 384, 6, 16),
    "BEiT-B": Family(lambda: timm.create_model("beit_base_patch16_224"), 224, 768, 12, 16),
    "HF Dinov2-S": Family(dinov2_small, 224, 384, 6, 14),
}


def compressed(dense: nn.Module, image: int, budget: str, calibrated: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a few images are few
        images = torch.randn(CALIBRATION_IMAGES, 3, image, image) if calibrated else None
        keep: dict[str, Any] = {BUDGETS[budget]: KEEP}
        return adacomcat.compress(dense, **keep, calibration=images,
                                  refit=False if calibrated else None)


def forms(make: Callable[[], nn.Module], image: int, budget: str, calibrated: bool
          ) -> dict[str, nn.Module]:
    """'dense', 'compressed', 'ours' and 'plain', the same ranks in PyTorch's own modules."""
    torch.manual_seed(0)
    dense = make().eval()
    low_rank = compressed(dense, image, budget, calibrated)
    models = {"dense": dense, "compressed": low_rank, "ours": adacomcat.optimize(low_rank),
              "plain": adacomcat.to_plain(low_rank).eval()}
    if hasattr(dense, "config"):
        models = {name: Logits(model) for name, model in models.items()}
    return models


def runs(models: dict[str, nn.Module], image: int, batch: int, threads: int
         ) -> dict[str, peers.Peer]:
    """All but the plain form in eager PyTorch; that one in OpenVINO, where it is installed."""
    made = {name: peers.eager(model, torch.float32) for name, model in models.items()
            if name != "plain"}
    if find_spec("openvino"):
        example = torch.randn(batch, 3, image, image)
        made["openvino"] = peers.openvino(models["plain"], torch.float32, example, threads)
    return made


@torch.inference_mode()
def measure(made: dict[str, peers.Peer], x: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds. Each runs untimed before it runs timed, see ``test_models.measure``."""
    spent: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        for name, run in made.items():
            run(x)
            start = time.perf_counter()
            run(x)
            spent[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


def compare(name: str, models: dict[str, dict[str, nn.Module]], batch: int, threads: int,
            repeats: int) -> dict[str, object]:
    image, before = FAMILIES[name].image, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            made = {f"{kind} {peer}": run for kind, all_forms in models.items()
                    for peer, run in runs(all_forms, image, batch, threads).items()}
        times = measure(made, torch.randn(batch, 3, image, image), repeats)
    finally:
        torch.set_num_threads(before)

    def speedup(kind: str, peer: str) -> float:
        return times[f"{kind} {peer}"] / times[f"{kind} ours"]

    result: dict[str, object] = {
        "model": name, "batch": batch, "threads": threads,
        "milliseconds": {peer: round(t, 2) for peer, t in times.items()}}
    for peer in ("dense", "openvino"):
        if f"vit {peer}" in times:
            ours, theirs = speedup("family", peer), speedup("vit", peer)
            result |= {f"vs {peer}": round(ours, 2), f"ViT vs {peer}": round(theirs, 2),
                       f"ratio, {peer}": round(ours / theirs, 2)}
    return result


def table(results: list[dict]) -> str:
    columns = [c for c in results[0] if c != "milliseconds"]
    rows = [columns, ["---"] * len(columns)] + [[str(r[c]) for c in columns] for r in results]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--budget", default="params", choices=BUDGETS)
    parser.add_argument("--calibrated", action="store_true",
                        help="compress with a few random images: MLPs lose neurons")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    results = []
    for name in args.models:
        family = FAMILIES[name]
        models = {kind: forms(make, family.image, args.budget, args.calibrated)
                  for kind, make in (("family", family.make), ("vit", family.vit))}
        for batch in args.batches:
            for threads in args.threads:
                results.append(compare(name, models, batch, threads, args.repeats))
                print(json.dumps(results[-1]), flush=True)
    print(json.dumps(machine()))
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
