"""Block by block finds what whole passes find, and takes few of them."""

import math
from typing import Any

import pytest
import torch
from helpers.models import dense_model
from torch import nn

from adacomcat import compress
from adacomcat.allocation.sensitivity import PROBE_IMAGES, probed_changes
from adacomcat.allocation.survey import survey
from adacomcat.convert.calibrate import BATCH, calibration_batches, collect_statistics
from adacomcat.convert.factors import ErrorCurve, factorize_model
from adacomcat.sites import find_sites, prunable_mlps

IMAGES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pruning", [True, False])
def test_curves_and_changes_are_those_of_whole_passes(pruning: bool) -> None:
    model = dense_model("vit_tiny_patch16_224")
    sites = find_sites(model, prunable_mlps(model) if pruning else ())
    batches = calibration_batches(IMAGES, model)
    found = survey(model, sites, batches)
    assert found.in_sequence
    factors = factorize_model(model, collect_statistics(model, batches, sites=sites), sites=sites)
    changes = probed_changes(model, factors, batches[0][:PROBE_IMAGES], sites)
    assert found.changes is not None and found.changes.keys() == changes.keys()
    for site in sites:
        torch.testing.assert_close(found.factors[site.name].errors, factors[site.name].errors,
                                   rtol=1e-4, atol=1e-6 * factors[site.name].errors[0].item())
        assert math.isclose(found.changes[site.name], changes[site.name], rel_tol=1e-3)
    inside = [name for name in found.factors if name.startswith("blocks.")]
    assert inside and all(isinstance(found.factors[name], ErrorCurve) for name in inside)


class Passes:
    """Counts the images that go through blocks, compressed or not, as passes of a dense model."""

    def __init__(self, model: nn.Module, images: int) -> None:
        self.kind, self.whole, self.seen = type(model.blocks[0].mlp), images * len(model.blocks), 0

    def __enter__(self) -> "Passes":
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, self.kind):
                self.seen += len(args[0])
        self.hook = nn.modules.module.register_module_forward_pre_hook(count)
        return self

    def __exit__(self, *args: object) -> None:
        self.hook.remove()

    @property
    def count(self) -> float:
        return self.seen / self.whole


def test_a_compression_takes_three_passes_and_the_probes() -> None:
    """Dense statistics, dense and compressed side by side; three probes of four images for each
    block, from that block on."""
    model = dense_model("vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=4, num_heads=2,
                        num_classes=7)
    images = torch.randn(3 * BATCH, 3, 32, 32)
    with Passes(model, len(images)) as passes:
        compress(model, keep_params=0.5, calibration=images)
    probes = PROBE_IMAGES * (1 + 3 * (4 + 1) / 2 + 1 / 4)
    assert passes.count <= 3 + probes / len(images) + 1e-9
