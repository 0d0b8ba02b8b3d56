"""Layers that someone changed stay what they are: nothing folds them, refits or fuses them."""

import types
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import adacomcat
from adacomcat import RankPlan, UserError, compress, optimize
from adacomcat.families import AttentionParts, Projection
from adacomcat.layers import registry
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp
from adacomcat.sites import altered_layers, find_sites, prunable_mlps

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
        "num_classes": 20, "init_values": 0.5}


def vit(**more: object) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **SIZE | more).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, dtype=torch.float64)


class Lora(nn.Linear):
    """An adapter that is not merged: its class is a subclass, its weight that of before."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down @ self.up


def adapt(model: nn.Module, name: str) -> None:
    linear = model.get_submodule(name)
    made = Lora(linear.in_features, linear.out_features).double()
    made.load_state_dict(linear.state_dict())
    made.down = nn.Parameter(0.3 * torch.randn(linear.in_features, 4, dtype=torch.float64))
    made.up = nn.Parameter(0.3 * torch.randn(4, linear.out_features, dtype=torch.float64))
    model.set_submodule(name, made)


class Wrapper(nn.Module):
    """An adapter around a layer, as PEFT's: ``weight`` is that of the layer inside."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def bias(self) -> Tensor:
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)


def wrap(model: nn.Module, name: str) -> None:
    model.set_submodule(name, Wrapper(model.get_submodule(name)))


def parametrize(model: nn.Module, name: str) -> None:
    parametrizations.weight_norm(model.get_submodule(name))
    model.get_submodule(name).parametrizations.weight.original0.data *= 1.5


def mask(model: nn.Module, name: str) -> None:
    prune.random_unstructured(model.get_submodule(name), "weight", 0.5)


def norm_weights(model: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the old form, which is a hook
        weight_norm(model.get_submodule(name)).weight_g.data *= 1.5


def double_output(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * output


def double_input(module: nn.Module, args: tuple) -> tuple:
    return 2 * args[0], *args[1:]


def hook(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(double_output)


def hook_input(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(double_input)


def override(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, x, **more: 1.5 * forward(self, x, **more),
                                      module)


Change = Callable[[nn.Module, str], None]
LAYERS = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
          "head"]
LAYER_CHANGES = [adapt, wrap, parametrize, mask, norm_weights, hook, hook_input, override]
# Everything else that a conversion or a fused block reads instead of calling it.
MODULES = ["blocks.0.attn", "blocks.0.attn.proj_drop", "blocks.0.mlp", "blocks.0.mlp.act",
           "blocks.0.mlp.drop1", "blocks.0.mlp.norm", "blocks.0", "blocks.0.norm1",
           "blocks.0.norm2", "blocks.0.ls1", "blocks.0.ls2", "blocks.0.drop_path1", "blocks",
           "patch_embed", "patch_embed.proj", "norm", ""]
CASES = [(change, name) for name in LAYERS for change in LAYER_CHANGES]
CASES += [(change, name) for name in MODULES for change in (hook, override)]


def ids(case: object) -> str:
    return case.__name__ if callable(case) else str(case) or "model"


each_case = pytest.mark.parametrize(("change", "name"), CASES, ids=ids)
ignoring_warnings = pytest.mark.filterwarnings("ignore:.*stay dense", "ignore:calibration is thin")


def assert_same(actual: nn.Module, expected: nn.Module, tolerance: float) -> None:
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(actual(x), expected(x), rtol=tolerance, atol=tolerance)


@each_case
@ignoring_warnings
def test_full_rank_is_the_changed_model(change: Change, name: str) -> None:
    model = vit()
    change(model, name)
    assert_same(compress(model, plan=RankPlan.full(model)), model, 1e-9)
    fitted = compress(model, plan=RankPlan.full(model), calibration=images(40))
    assert_same(fitted, model, 1e-6)


@each_case
@ignoring_warnings
def test_the_fused_copy_is_the_changed_model(change: Change, name: str) -> None:
    model = vit().float()
    change(model.double(), name)
    model.float()
    optimized, x = optimize(model), images(3).float()
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", LAYER_CHANGES, ids=ids)
@pytest.mark.parametrize("name", LAYERS)
@ignoring_warnings
def test_no_refit_writes_into_a_changed_layer(change: Change, name: str) -> None:
    model = vit()
    change(model, name)
    before = {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
    small = compress(model, keep_params=0.7, calibration=images(40))
    after = small.get_submodule(name)
    if change is not wrap:  # what is wrapped is a layer of its own, and is called
        assert type(after) is type(model.get_submodule(name))
        for key, value in after.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize(("change", "name"), [
    *((change, name) for name in LAYERS for change in LAYER_CHANGES
      if change is not wrap or "attn" in name),
    (hook, "blocks.0.attn"), (hook, "blocks.0.mlp")], ids=ids)
def test_a_warning_names_what_stays_dense(change: Change, name: str) -> None:
    model = vit()
    change(model, name)
    attention = ".".join(name.split(".")[:3])
    expected = attention if change is wrap else name
    assert expected in altered_layers(model)
    with pytest.warns(UserWarning, match=f"stay dense.*{expected}.*merge or remove"):
        compress(model, keep_params=0.8)


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "vit_base_patch16_siglip_224", "vit_small_patch16_rope_224",
    "cait_xxs24_224", "xcit_nano_12_p16_224", "levit_128s", "mvitv2_tiny", "convnext_tiny",
    "resnet18"])
def test_nothing_of_a_library_looks_changed(name: str) -> None:
    with torch.device("meta"):
        assert altered_layers(timm.create_model(name)) == []


def test_an_ordinary_model_keeps_all_its_sites() -> None:
    model = vit()
    assert [site.kind for site in find_sites(model, prunable_mlps(model))] == [
        "qk", "vo", "hidden"] * 2 + ["linear"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, keep_params=0.8)


def test_a_quantised_model_has_no_sites() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(vit().float(), {nn.Linear})
    assert not find_sites(model)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="least is 1.0000"):
        compress(model, keep_params=0.6)


def test_a_layer_in_float8_stays_dense() -> None:
    model = vit().float()
    model.head.weight.data = model.head.weight.data.to(torch.float8_e4m3fn)
    assert "head" not in {site.name for site in find_sites(model)}
    with pytest.warns(UserWarning, match="head"):
        small = compress(model, keep_params=0.6)
    assert small.head.weight.dtype is torch.float8_e4m3fn


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **SIZE)
    with pytest.raises(UserError, match="meta device"):
        compress(model, keep_params=0.6)


def test_an_attention_of_ones_own_stays_dense_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def read(attn: Mine) -> AttentionParts:
        return AttentionParts(*map(Projection.of, (attn.query, attn.key, attn.value, attn.out)),
                              num_heads=2, scale=1.0)

    for kind in (nn.Linear, timm.layers.Attention):  # what is registered later would be forgotten
        registry.load_family(kind)
    monkeypatch.setattr(registry, "_attentions", dict(registry._attentions))
    adacomcat.register_attention(Mine, read, {"A": adacomcat.LowRankAttention})
    assert [site.name for site in find_sites(nn.Sequential(Mine()))] == ["0.qk", "0.vo"]
    model = nn.Sequential(Mine())
    hook(model, "0.value")
    assert [site.name for site in find_sites(model)] == ["0.query", "0.key", "0.out"]
    assert altered_layers(model) == ["0", "0.value"]


@pytest.mark.parametrize("change", LAYER_CHANGES, ids=ids)
def test_a_changed_layer_is_not_factorised_by_hand(change: Change) -> None:
    model = vit()
    LowRankLinear.from_linear(model.head, 8)
    change(model, "head")
    with pytest.raises(UserError, match="is no plain nn.Linear"):
        LowRankLinear.from_linear(model.head, 8)
    change(model, "blocks.0.attn.proj")
    with pytest.raises(UserError, match="does not fold whole"):
        adacomcat.LowRankAttention.from_timm(model.blocks[0].attn)
    change(model, "blocks.0.mlp.fc2")
    with pytest.raises(UserError, match="is not timm's Mlp"):
        LowRankMlp.from_timm(model.blocks[0].mlp)


def test_an_adapter_on_factors_counts() -> None:
    mlp = vit().blocks[0].mlp
    small = LowRankMlp.from_timm(mlp, 8, 8)
    x = torch.randn(2, 5, 48, dtype=torch.float64)

    class Adapted(LowRankLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    expected = small.fc2(small.act(2 * small.fc1(x)))
    small.fc1.__class__ = Adapted
    torch.testing.assert_close(small(x), expected)
    small.fc1.__class__ = LowRankLinear
    handle = small.fc1.register_forward_hook(double_output)
    torch.testing.assert_close(small(x), expected)
    handle.remove()
    small.act = nn.Tanh()
    torch.testing.assert_close(small(x), small.fc2(torch.tanh(small.fc1(x))))
    small.act = nn.ReLU()
    torch.testing.assert_close(small(x), small.fc2(F.relu(small.fc1(x))))


def test_a_hook_on_factors_is_not_fused_away() -> None:
    model = vit().float()
    small = compress(model, plan=RankPlan.uniform(model, 0.8))
    for name in ("blocks.0.attn", "blocks.0.mlp", "blocks.0.mlp.fc1", "blocks.1.norm2"):
        hook(small, name)
    x = images(2).float()
    with torch.no_grad():
        torch.testing.assert_close(optimize(small)(x), small(x), rtol=1e-4, atol=1e-4)
