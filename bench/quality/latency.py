"""A latency budget against the parameter budget that leads to the same latency.

    python bench/quality/latency.py
    python bench/quality/latency.py --model deit_small_patch16_224 --pretrained --share 0.4

The budget is a share of the dense model's latency. Both models come from the same factors and the
same calibration crops. ``adacomcat.optimize`` runs them. They are compared with the dense model by
their final tokens, on photographs that did not calibrate.
"""

import argparse
import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.allocation.budget import Budget
from adacomcat.allocation.candidates import choose, plan_of
from adacomcat.allocation.fraction import FractionAllocator, parameter_cost
from adacomcat.allocation.sensitivity import error_weights
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import Factors, factorize_model
from adacomcat.convert.model import convert_, model_statistics
from adacomcat.cost import model_macs, model_params
from adacomcat.latency.table import LatencyTable
from adacomcat.latency.timing import measure, model_latencies
from adacomcat.plan import RankPlan
from adacomcat.sites import MULTIPLE, Site, find_sites, prunable_mlps

DINOV2 = Path(__file__).resolve().parents[2] / "examples/dinov2"
ROUNDS = 8  # bisections at most
EQUAL = 0.005  # latencies are equal where their ratio is nearer to 1


class Subject(NamedTuple):
    model: nn.Module
    sites: list[Site]
    factors: Factors
    batches: list[Tensor]

    def converted(self, plan: RankPlan) -> nn.Module:
        return convert_(copy.deepcopy(self.model), plan, self.factors, self.batches)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="dinov2", help="dinov2, or a timm architecture")
    parser.add_argument("--pretrained", action="store_true",
                        help="timm's weights for the architecture")
    parser.add_argument("--share", type=float, default=0.5,
                        help="the budget ÷ the dense model's latency")
    parser.add_argument("--batch", type=int, default=1, help="images of a timed pass")
    parser.add_argument("--crops", type=int, default=256, help="crops that calibrate")
    parser.add_argument("--test-crops", type=int, default=96, help="crops that test")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(args: argparse.Namespace) -> nn.Module:
    """The dense model without classifier and pooling.

    All of its tokens are the output, so that nothing in the last block can be skipped.
    """
    model: Any
    if args.model == "dinov2":
        model = runpy.run_path(str(DINOV2 / "backbone.py"))["load_backbone"]()
    else:
        torch.manual_seed(args.seed)
        model = timm.create_model(args.model, pretrained=args.pretrained).eval()
    model.reset_classifier(0, "")
    return model


def plan_of_equal_latency(subject: Subject, milliseconds: float, table: LatencyTable) -> RankPlan:
    """The plan of a parameter budget, bisected until the table's latency is ``milliseconds``."""
    weights = error_weights(subject.model, subject.factors, subject.batches, subject.sites)
    cost, whole = parameter_cost(subject.model, subject.sites)
    allocator = FractionAllocator(subject.sites, subject.factors, cost, whole, keep=1.0)
    items = [allocator.candidates((site,), weights, MULTIPLE) for site in subject.sites]
    least = sum(item.choices[0].cost for item in items)
    most = sum(site.dense_params for site in subject.sites)
    for _ in range(ROUNDS):
        budget = (least + most) / 2
        plan = plan_of(items, choose(items, budget))
        found = table.plan_ms(plan)
        if abs(found / milliseconds - 1) < EQUAL:
            break
        least, most = (least, budget) if found > milliseconds else (budget, most)
    return plan


@torch.inference_mode()
def tokens(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model.forward_features(batch) for batch in images.split(16)])


def judge(dense: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    """A function of tokens: (|tokens - dense|² / |dense - mean token|², cosine of class tokens)."""
    spread = (dense - dense.mean((0, 1))).square().sum()

    def judged(found: Tensor) -> tuple[float, float]:
        error = (found - dense).square().sum() / spread
        return error.item(), F.cosine_similarity(dense[:, 0], found[:, 0]).mean().item()
    return judged


def main() -> None:
    args = arguments()
    photos = runpy.run_path(str(DINOV2 / "photos.py"))
    calibration_files, test_files = photos["split"]([])
    test = photos["crops"](test_files, args.test_crops, args.seed + 1)
    model = load(args)
    batches = calibration_batches(
        photos["calibration_crops"](calibration_files, args.crops, args.seed), model)
    sites = find_sites(model, prunable_mlps(model))
    factors = factorize_model(model, model_statistics(model, batches), sites=sites)
    subject = Subject(model, sites, factors, batches)

    budget = args.share * model_latencies({"dense": model}, args.batch)["dense"]
    print(f"{args.model}, batch {args.batch}, {torch.get_num_threads()} threads; budget "
          f"{budget:.2f} ms", flush=True)
    allocator = Budget("latency_ms", budget, args.batch).allocator(model, factors, sites)
    plan = allocator.plan(error_weights(model, factors, batches, sites))
    table = LatencyTable(model, sites, args.batch, MULTIPLE, measure)
    rival = plan_of_equal_latency(subject, table.plan_ms(plan), table)
    models = {"dense": model, "max_latency_ms": subject.converted(plan),
              "keep_params": subject.converted(rival)}
    milliseconds = model_latencies(models, args.batch)
    dense = tokens(model, test)
    judged = judge(dense)
    for name, network in models.items():
        error, cosine = judged(tokens(network, test))
        print(f"{name:15s} {milliseconds[name]:7.2f} ms  "
              f"{milliseconds[name] / milliseconds['dense']:.3f} of dense  "
              f"{milliseconds[name] / budget:.3f} of the budget  "
              f"params {model_params(network) / model_params(model):.3f}  "
              f"MACs {model_macs(network) / model_macs(model):.3f}  "
              f"error {error:.3f}  cls cosine {cosine:.3f}", flush=True)


if __name__ == "__main__":
    main()
