"""What int8 costs: error or accuracy of quantised models, the bytes of their files, and memory.

python bench/quality/int8.py --data dinov2
python bench/quality/int8.py --data dinov2 --nncf
python bench/quality/int8.py --data fashion-mnist --keeps 0.5 0.15 --seeds 0 1 2 --data-dir FOLDER
python bench/quality/int8.py --data files
python bench/quality/int8.py --data memory --model vit_large_patch16_224
"""

import argparse
import copy
import resource
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import paths  # noqa: F401  (makes the examples importable)
import peers
import timm
import torch
from records import Record, Records, command, markdown, provenance
from subjects import add_training_arguments, fashion_mnist
from torch import Tensor, nn

import adacomcat
from adacomcat import cost
from adacomcat.checkpoint import folder
from adacomcat.cli.arguments import Parser, number
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.quantization.model import quantize_
from adacomcat.report.tables import print_table
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.limits import FRACTION, at_least

# How weights are rounded → (whether images correct the error, whether middles are rotated)
VARIANTS = {"nearest": (False, False), "nearest, rotated": (False, True),
            "feedback": (True, False), "feedback, rotated": (True, True)}
JUDGING = 512  # training images whose logits tell what int8 adds; few of them calibrate
Table = tuple[list[str], list[list[object]]]


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("dinov2", "fashion-mnist", "files", "memory"),
                        default="dinov2")
    parser.add_argument("--keeps", type=number(FRACTION), nargs="+", default=[0.5])
    parser.add_argument("--crops", type=number(at_least(1)), default=128,
                        help="dinov2: crops that compress and correct")
    parser.add_argument("--test-crops", type=number(at_least(1)), default=48,
                        help="dinov2: crops of other photographs that judge")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS),
                        help="how weights are rounded (default: in every way)")
    parser.add_argument("--nncf", action="store_true",
                        help="NNCF's int8 of the same models, calibrated on the same images, too")
    parser.add_argument("--model", default="vit_large_patch16_224",
                        help="memory: a timm architecture, with random weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0],
                        help="of the images that compress and correct")
    add_training_arguments(parser)
    return parser.parse_args()


def quantized(model: nn.Module, images: Tensor, feedback: bool, rotate: bool) -> nn.Module:
    made = adacomcat.to_plain(model).eval().requires_grad_(False)
    with torch.no_grad():
        return quantize_(made, calibration_batches(images, made) if feedback else None,
                         rotate=rotate)


class Nncf(nn.Module):
    """NNCF's int8 of ``model``, calibrated on ``images``.

    tokens: whether it gives final tokens, in place of logits.
    """

    def __init__(self, model: nn.Module, images: Tensor, tokens: bool) -> None:
        super().__init__()
        made: Any = adacomcat.to_plain(model).eval()
        if tokens:
            made.forward = made.forward_features
        self.peer = peers.nncf(made, images)
        self.register_parameter("device", nn.Parameter(torch.zeros(())))

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.peer(x)
        return torch.from_numpy(found[0].copy())

    forward_features = forward


def sizes(dense: nn.Module, keeps: list[float], images: Tensor | None) -> dict[str, nn.Module]:
    return {"dense": dense} | {f"keep {keep:g}": adacomcat.compress(
        dense, keep_params=keep, calibration=images) for keep in keeps}


def compare_sizes(models: Mapping[str, nn.Module], images: Tensor, variants: list[str],
                  measure: Callable[[nn.Module, nn.Module], Record],
                  other: Callable[[nn.Module, Tensor], nn.Module] | None) -> dict[str, Record]:
    """'size, variant' → what ``measure(float model, int8 model)`` says.

    other: makes an int8 model of a float one and the images that calibrate.
    """
    found = {}
    for size, model in models.items():
        found[f"{size}, float"] = measure(model, model)
        for name in variants:
            feedback, rotate = VARIANTS[name]
            found[f"{size}, {name}"] = measure(model, quantized(model, images, feedback, rotate))
        if other is not None:
            found[f"{size}, NNCF"] = measure(model, other(model, images))
        print(size, {name: record for name, record in found.items() if name.startswith(size)},
              flush=True)
    return found


def dinov2(args: argparse.Namespace) -> dict[str, Record]:
    import photos
    from backbone import load_backbone
    from fidelity import compare, tokens

    dense = load_backbone()
    calibration_files, test_files = photos.split([], others=False)
    seed = args.seeds[0]
    images = photos.crops(calibration_files, args.crops, seed)
    test = photos.crops(test_files, args.test_crops, seed + 1)
    exact = tokens(dense, test)

    def measure(model: nn.Module, made: nn.Module) -> Record:
        own, found = tokens(model, test), tokens(made, test)
        (added, _), (error, cosine) = compare(own, found), compare(exact, found)
        return {"added": added, "error": error, "cls_cosine": cosine}

    return compare_sizes(sizes(dense, args.keeps, images), images, args.variants, measure,
                         partial(Nncf, tokens=True) if args.nncf else None)


def accuracy(args: argparse.Namespace, seed: int) -> dict[str, Record]:
    subject = fashion_mnist(args, seed)
    images = subject.calibration

    others = torch.stack([subject.train_set[index][0] for index in range(JUDGING)])

    @torch.inference_mode()
    def measure(model: nn.Module, made: nn.Module) -> Record:
        own, found = (torch.cat([of(x) for x in others.split(16)]) for of in (model, made))
        added = (found - own).square().sum() / (own - own.mean(0)).square().sum()
        return subject.measure(made) | {"added": added.item()}

    return compare_sizes(sizes(subject.model, args.keeps, images), images, args.variants, measure,
                         partial(Nncf, tokens=False) if args.nncf else None)


def file_sizes(args: argparse.Namespace) -> dict[str, Record]:
    """Bytes of model.safetensors; their number does not depend on the weights."""
    found = {}
    for name in ("deit_small_patch16_224", "vit_small_patch14_dinov2"):
        dense = timm.create_model(name, img_size=224).eval()
        for size, model in sizes(dense, args.keeps, None).items():
            forms = {"float32": model, "bfloat16": copy.deepcopy(model).bfloat16(),
                     "int8": adacomcat.quantize(model),
                     "int8, the rest bfloat16": adacomcat.quantize(model).bfloat16()}
            found[f"{name}, {size}"] = {form: written(made) for form, made in forms.items()}
    return found


def memory(args: argparse.Namespace) -> dict[str, Record]:
    """The most memory of this process while a model is quantised, beside the model and before."""
    torch.manual_seed(0)
    model: Any = timm.create_model(args.model).eval()
    images = torch.randn(args.crops, *model.pretrained_cfg["input_size"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = adacomcat.quantize(model, images)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {args.model: {"model": cost.model_bytes(model), "int8": cost.model_bytes(made),
                         "before": 1024 * before, "most": 1024 * most}}


def written(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        adacomcat.save(model, Path(scratch) / "model")
        return (Path(scratch) / "model" / folder.WEIGHTS).stat().st_size


def main() -> None:
    args = arguments()
    store = Records(args.output / "int8.json")
    keeps = " ".join(f"{keep:g}" for keep in args.keeps) + ", NNCF" * args.nncf
    if args.variants != list(VARIANTS):
        keeps += f", {'; '.join(args.variants)}"
    if args.data == "dinov2":
        found = store.get(f"dinov2, keeps {keeps}, {args.crops} crops, {args.test_crops} test",
                          partial(dinov2, args))
        table = errors(found)
    elif args.data == "fashion-mnist":
        runs = [store.get(f"fashion-mnist, keeps {keeps}, seed {seed}",
                          partial(accuracy, args, seed)) for seed in args.seeds]
        table = accuracies(runs)
    elif args.data == "memory":
        table = megabytes(memory(args))
    else:
        table = megabytes(store.get(f"files, keeps {keeps}", partial(file_sizes, args)))
    print_table(args.data, *table)
    text = f"{provenance()}\n{markdown(*table)}"
    args.output.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.output / f"int8-{args.data}.md", text)


def errors(found: Mapping[str, Record]) -> Table:
    return ["", "error that int8 adds", "error to dense", "cls cosine"], [
        [name, f"{row['added']:.5f}", f"{row['error']:.4f}", f"{row['cls_cosine']:.4f}"]
        for name, row in found.items()]


def accuracies(runs: list[dict[str, Record]]) -> Table:
    columns = ["", *(heading for index in range(len(runs))
                     for heading in (f"top-1 %, seed {index}", "error that int8 adds"))]
    return columns, [[name, *(text for run in runs for text in (
        f"{run[name]['top1']:.2f}", f"{run[name]['added']:.5f}"))] for name in runs[0]]


def megabytes(found: Mapping[str, Record]) -> Table:
    forms = list(next(iter(found.values())))
    return ["MB", *forms], [[name, *(f"{row[form] / 1e6:.2f}" for form in forms)]
                            for name, row in found.items()]


if __name__ == "__main__":
    command(main)
