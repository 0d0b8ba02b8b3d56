"""Optimised models with rotary attention and gated MLPs, on the emulated PTX of their kernels."""

import pytest
import timm
import torch
from helpers.tolerance import relative_error
from ptx.emulate import emulated

import adacomcat
from adacomcat import kernels
from adacomcat.layers.packed import PackedModule
from adacomcat.ops import backends

# Form → architecture, size of the images, kernels. DINOv3 turns halves, EVA-02 neighbours.
MODELS = {
    "dense": ("vit_small_plus_patch16_dinov3", 48, "gated_project_kernel"),
    "low-rank": ("eva02_tiny_patch14_224", 56, "gated_mlp_kernel"),
}


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors stay on the CPU, where the emulator reads them, as if they lay on a GPU."""
    monkeypatch.setattr(PackedModule, "pack_", lambda module: None)
    monkeypatch.setattr(backends, "direct_kernel", lambda op, x: (
        backends._triton_kernel(op) if op in kernels.SUBLAYERS else None))


@pytest.mark.parametrize("form", MODELS)
@torch.no_grad()
def test_optimized_models_compute_the_same(form: str, on_triton: None) -> None:
    architecture, size, kernel = MODELS[form]
    model = timm.create_model(architecture, depth=1, embed_dim=64, num_heads=2, img_size=size)
    for parameter in model.eval().parameters():  # norms, scales and biases that matter
        parameter.add_(torch.randn_like(parameter) * 0.05)
    if form == "low-rank":
        plan = {site.name: 8 for site in adacomcat.find_sites(model)
                if ".attn" in site.name or ".mlp" in site.name}
        model = adacomcat.compress(model, plan=adacomcat.RankPlan(plan))
    x = torch.randn(2, 3, size, size)
    exact = model.double()(x.double())
    model, x = model.half(), x.half()
    optimized = adacomcat.optimize(model)
    with emulated("sm_90") as launches:
        found = optimized(x)
    names = [launch.name for launch in launches]
    assert names.count("rotary_project_kernel") == names.count(kernel) == 1
    assert names.count("layer_norm_kernel") == (2 if form == "dense" else 1)
    assert relative_error(found, exact) <= 2 * relative_error(model(x), exact) + 1e-6
