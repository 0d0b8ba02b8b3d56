"""bench/quality/latency.py: the plan of a parameter budget that takes as long as another plan."""

import sys
from pathlib import Path
from types import SimpleNamespace

import timm
import torch

from adacomcat.convert.calibrate import calibration_batches
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.model import model_statistics
from adacomcat.cost import model_params
from adacomcat.plan import RankPlan
from adacomcat.sites import find_sites, prunable_mlps

sys.path.append(str(Path(__file__).parents[2] / "bench" / "quality"))

import latency  # noqa: E402


def test_a_plan_of_equal_latency() -> None:
    """With milliseconds that are the parameters, half of them is found to within a rank's step."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=96, depth=2,
                              num_heads=3, num_classes=0).eval()
    batches = calibration_batches(torch.randn(16, 3, 32, 32), model)
    sites = find_sites(model, prunable_mlps(model))
    factors = factorize_model(model, model_statistics(model, batches), sites=sites)
    subject = latency.Subject(model, sites, factors, batches)

    def milliseconds(plan: RankPlan) -> float:
        return model_params(subject.converted(plan)) / model_params(model)

    table = SimpleNamespace(plan_ms=milliseconds)
    plan = latency.plan_of_equal_latency(subject, 0.6, table)
    assert abs(milliseconds(plan) - 0.6) < 0.03
