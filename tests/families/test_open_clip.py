"""open_clip: both towers fold, lose neurons, are fused and run under their masks."""

from typing import Any

import pytest
import torch
from torch import Tensor

import adacomcat
from adacomcat import RankPlan, compress, find_sites
from adacomcat.sites import prunable_mlps

open_clip = pytest.importorskip("open_clip")


def clip(quick_gelu: bool = False, scale: float | None = 0.5) -> Any:
    torch.manual_seed(0)
    model = open_clip.CLIP(16, {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8,
                                "image_size": 32, "ls_init_value": scale},
                           {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2,
                            "layers": 1}, quick_gelu=quick_gelu)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def given(count: int) -> dict[str, Tensor]:
    return {"image": torch.randn(count, 3, 32, 32).double(),
            "text": torch.randint(1, 50, (count, 9))}


def features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.encode_image(inputs["image"]), model.encode_text(inputs["text"])])


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_both_towers(quick_gelu: bool, scale: float | None) -> None:
    dense, inputs = clip(quick_gelu, scale), given(24)
    assert {"qk", "vo", "hidden"} <= {
        site.kind for site in find_sites(dense, prunable_mlps(dense))}
    expected = features(dense, inputs)
    whole = compress(dense, plan=RankPlan.full(dense))
    assert relative(features(whole, inputs), expected) < 1e-12
    small = compress(dense, keep_params=0.8, calibration=inputs)
    assert relative(features(small, inputs), expected) < 0.5
    for model in (whole, small):
        fused: Any = adacomcat.optimize(model)
        assert relative(features(fused, inputs), features(model, inputs)) < 1e-9
        names = [type(module).__name__ for module in fused.modules()]
        assert names.count("FusedAttention") == 3
        assert sum(name in ("FusedMlp", "FusedDenseMlp") for name in names) == 3
        assert "FusedPatches" in names


def test_a_tower_alone() -> None:
    tower = clip().visual
    images = torch.randn(20, 3, 32, 32).double()
    small = compress(tower, keep_macs=0.8, calibration=images)
    assert adacomcat.cost.model_macs(small) <= 0.8 * adacomcat.cost.model_macs(tower)
    assert relative(small(images), tower(images)) < 0.5
