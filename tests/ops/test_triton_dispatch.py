"""Rotary attention and gated MLPs reach their Triton kernels, and only where these may run.

Tensors on the meta device stand for those on a GPU: they take the same way, without numbers.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat import kernels
from adacomcat.layers.fused import FusedGatedMlp, FusedRotaryAttention
from adacomcat.ops import backends, inference, measured

META = torch.device("meta")
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The launches, on a machine that has Triton and a GPU on which every kernel runs."""
    found: Calls = []

    def load(op: str) -> SimpleNamespace:
        def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            found.append((op, arguments, options))
            return x.new_empty(x.shape)
        return SimpleNamespace(forward=forward)

    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(backends, "_no_triton", lambda: None)
    monkeypatch.setattr(backends, "_no_cuda", lambda: None)
    monkeypatch.setattr(backends, "_no_triton_kernel",
                        lambda op, x: None if op in kernels.KERNELS else "no kernel")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    backends._triton_kernel.cache_clear()
    yield found
    backends._triton_kernel.cache_clear()


def gated(x: Tensor, **options: Any) -> Tensor:
    w, w2 = (torch.empty(size, dtype=x.dtype, device=META) for size in ((24, 8), (8, 24)))
    return inference.gated_mlp(x, None, w, None, w, None, None, w2, None, "silu", **options)


@torch.no_grad()
def test_the_gated_mlp_runs_on_triton_where_it_is_asked_for(
    launched: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(3, 8, dtype=torch.float16, device=META)
    gated(x)
    assert not launched  # nobody measured that it is faster
    with backends.use_backend("triton"):
        gated(x, epsilon=1e-5, residual=x)
    with backends.prefer_backend("triton"):
        gated(x)
    ((_, arguments, options), (_, _, plain)) = launched
    assert len(arguments) == 9 and arguments[-1] == "silu"
    assert options == {"epsilon": 1e-5, "residual": x} and plain == dict.fromkeys(options)
    monkeypatch.setattr(measured, "ranked", lambda *key: ("triton", "reference"))
    gated(x)
    assert len(launched) == 3


def test_the_formula_serves_where_no_kernel_may_run(launched: Calls) -> None:
    x = torch.empty(3, 8, dtype=torch.float16, device=META)
    with backends.use_backend("triton"):
        gated(x.requires_grad_())
        with torch.no_grad():
            torch.vmap(gated)(x)
    with backends.use_backend("cuda"), torch.no_grad():  # no kernel, and no refusal
        assert gated(x).shape == (3, 8)
    assert not launched


@torch.no_grad()
def test_what_the_kernel_would_misread_is_refused(launched: Calls) -> None:
    x = torch.empty(3, 8, dtype=torch.float16, device=META)
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="residual must have"):
        gated(x, residual=x[:2])
    w, angle = torch.empty(8, 8, device=META), torch.empty(5, 4)
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="sin is on cpu"):
        inference.rotary_attention(torch.empty(1, 5, 8, device=META), None, w, None, None, w, None,
                                   w, w, None, 2, 0.5, angle, angle, True)


def model() -> tuple[nn.Module, Tensor]:
    """DINOv3 with gated MLPs."""
    architecture = timm.create_model("vit_small_plus_patch16_dinov3", depth=2, embed_dim=96,
                                     num_heads=3, img_size=64).eval()
    return architecture, torch.empty(2, 3, 64, 64, device=META)


@pytest.mark.parametrize("form", ["dense", "low-rank"])
@torch.no_grad()
def test_optimized_models_launch_both_kernels(form: str, launched: Calls) -> None:
    dense, images = model()
    if form == "low-rank":
        plan = {site.name: 4 for site in adacomcat.find_sites(dense)
                if ".attn" in site.name or ".mlp" in site.name}
        dense = adacomcat.compress(dense, plan=adacomcat.RankPlan(plan))
    with backends.use_backend("triton"):
        optimized = adacomcat.optimize(dense.to(META))
        assert optimized(images).shape == (2, 96)
    assert [op for op, *_ in launched] == ["rotary_attention", "gated_mlp"] * 2
    assert all(options["residual"].shape == (2, 21, 96) for *_, options in launched)
    rotary, gated = (arguments for _, arguments, _ in launched[:2])
    factors = [rotary[0], rotary[3], gated[0], gated[5]]
    assert [v is None for v in factors] == [form == "dense"] * 4
    assert [rotary[place].shape for place in (11, 12)] == [(16, 32)] * 2 and rotary[13] is True


@torch.no_grad()
def test_dense_rotary_attention_is_fused_on_gpus_only_for_the_kernel(launched: Calls) -> None:
    """In PyTorch's operators one product for q, k and v is faster than the op's three."""
    optimized = adacomcat.optimize(model()[0].to(META))
    kinds = [type(block.attn) for block in optimized.blocks]
    assert not any(issubclass(kind, FusedRotaryAttention) for kind in kinds)
    assert all(type(block.mlp) is FusedGatedMlp for block in optimized.blocks)
    with backends.prefer_backend("triton"):
        optimized = adacomcat.optimize(model()[0].to(META))
    assert all(isinstance(block.attn, FusedRotaryAttention) for block in optimized.blocks)
