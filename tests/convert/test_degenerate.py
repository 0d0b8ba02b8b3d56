"""Models and images at the edge: half precision, layers that are zero, inputs that never change."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat import UserError, compress, optimize
from adacomcat.convert.calibrate import calibrate
from adacomcat.convert.moments import Moments
from adacomcat.convert.sequential import sequential_blocks
from adacomcat.utils.model import tokens_and_outputs

SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3,
        "num_classes": 5}
pytestmark = pytest.mark.filterwarnings("ignore:calibration is thin")


def vit(name: str = "vit_tiny_patch16_224", **more: object) -> nn.Module:
    model = timm.create_model(name, **SIZE | more).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(count: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 32, 32)


@torch.no_grad()
def relative(actual: nn.Module, expected: nn.Module, x: Tensor) -> float:
    found, wanted = actual(x).double(), expected(x).double()
    return ((found - wanted).norm() / wanted.norm()).item()


# Half precision


@pytest.mark.parametrize("more", [{}, {"init_values": 0.1}, {"qk_norm": True}],
                         ids=["plain", "layer scale", "not in sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_calibrates(dtype: torch.dtype, more: dict[str, Any]) -> None:
    half, x = vit(**more).to(dtype), images(48)
    exact = compress(half.float(), keep_params=0.6, calibration=x)
    expected = relative(exact, half.float(), images(8))
    half = half.to(dtype)
    small = compress(half, keep_params=0.6, calibration=x)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    assert relative(small.float(), half.float(), images(8)) < 1.2 * expected + 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    half, x, name = vit().to(dtype), images(32), "blocks.0.mlp.fc1"
    seen: list[Tensor] = []
    hook = half.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in x.to(dtype).split(16):
            half(batch)
    hook.remove()
    rows = torch.cat(seen).double().flatten(0, 1)
    found = calibrate(half, x)[name]
    torch.testing.assert_close(found.covariance, torch.cov(rows.mT, correction=0),
                               rtol=1e-4, atol=1e-6)


def test_a_model_in_float64_keeps_its_digits() -> None:
    model, x = vit().double(), images(32).double()
    name, seen = "blocks.0.mlp.fc1", []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach()))
    model(x)
    hook.remove()
    rows = seen[0].flatten(0, 1)
    torch.testing.assert_close(calibrate(model, x)[name].mean, rows.mean(0), rtol=0, atol=1e-13)


def test_variance_beside_a_large_mean() -> None:
    """The difference of E[x²] and E[x]² in float32 would have no digit of it."""
    exact = torch.randn(4096, 6, dtype=torch.float64) * 1e-2 + 300
    rows, moments = exact.float(), Moments()
    for part in rows.split(512):
        moments.add(part)
    expected = torch.cov(rows.double().mT, correction=0)
    torch.testing.assert_close(moments.covariance, expected, rtol=0.1, atol=1e-6)
    assert torch.linalg.eigvalsh(moments.covariance).min() > 0


# Layers that do nothing


def zero(*modules: nn.Module) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.data.zero_()


def dead_mlp(block: Any) -> None:
    zero(block.mlp.fc1)


def dead_fc2(block: Any) -> None:
    zero(block.mlp.fc2)


def constant_mlp(block: Any) -> None:
    block.mlp.fc1.weight.data.zero_()


def silent_neurons(block: Any) -> None:
    block.mlp.fc1.bias.data.fill_(-100.0)


def half_silent(block: Any) -> None:
    block.mlp.fc1.bias.data[::2] = -100.0


def dead_qkv(block: Any) -> None:
    zero(block.attn.qkv)


def dead_values(block: Any) -> None:
    block.attn.qkv.weight.data[-48:] = 0


def dead_proj(block: Any) -> None:
    zero(block.attn.proj)


def dead_norms(block: Any) -> None:
    zero(block.norm1, block.norm2)


def constant_norms(block: Any) -> None:
    block.norm1.weight.data.zero_(), block.norm2.weight.data.zero_()


DAMAGES = [dead_mlp, dead_fc2, constant_mlp, silent_neurons, half_silent, dead_qkv, dead_values,
           dead_proj, dead_norms, constant_norms]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("calibration", [None, 4, 40])
@pytest.mark.parametrize("more", [{}, {"qk_norm": True}], ids=["sequence", "sites"])
def test_a_layer_that_does_nothing_is_compressed(
        damage: Callable[[Any], None], calibration: int | None, more: dict[str, Any]) -> None:
    model = vit(**more)
    intact = copy.deepcopy(model)
    damage(model.blocks[0])
    x, judges = None if calibration is None else images(calibration), images(32)
    small = compress(model, keep_params=0.6, calibration=x)
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    bound = relative(compress(intact, keep_params=0.6, calibration=x), intact, judges)
    assert relative(small, model, judges) < 3 * bound + 0.05


@pytest.mark.parametrize("value", [0.0, 1.0, -300.0])
def test_images_of_one_colour_calibrate(value: float) -> None:
    model = vit()
    same = torch.full((6, 3, 32, 32), value)
    small = compress(model, keep_params=0.6, calibration=same)
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    assert relative(small, model, same[:1]) < 0.1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_pooling_attention_calibrates_with_few_images(count: int) -> None:
    """Its MLP sees one token of each image."""
    model = vit("vit_base_patch16_siglip_224")
    small = compress(model, keep_params=0.6, calibration=images(count))
    assert all(parameter.isfinite().all() for parameter in small.parameters())
    assert small(images(2)).isfinite().all()


# Devices and dtypes


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("more", [{}, {"init_values": 0.1}, {"qk_norm": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constants_do_not_take_the_default_dtype(dtype: torch.dtype, more: dict[str, Any]) -> None:
    model, x = vit(**more), images(24)
    expected = compress(model, keep_params=0.6, calibration=x)
    with default_dtype(dtype):
        found = compress(model, keep_params=0.6, calibration=x)
        optimize(found)
    for name, parameter in found.named_parameters():
        assert parameter.dtype is torch.float32
        torch.testing.assert_close(parameter, expected.get_parameter(name))


@pytest.mark.parametrize("more", [{}, {"init_values": 0.1}, {"qk_norm": True}])
@pytest.mark.parametrize("calibrated", [False, True])
def test_constants_do_not_take_the_default_device(calibrated: bool, more: dict[str, Any]) -> None:
    """As with torch.set_default_device("cuda") and a model on the CPU, and the other way round."""
    model, x = vit(**more), images(24)
    given = x if calibrated else None
    expected = compress(model, keep_params=0.6, calibration=given)
    with torch.device("meta"):
        found = compress(model, keep_params=0.6, calibration=given)
        optimize(found)
    for name, parameter in found.named_parameters():
        assert parameter.device.type == "cpu", name
        torch.testing.assert_close(parameter, expected.get_parameter(name))


# Outputs of other libraries


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


class Wrapped(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.net, self.make = vit(), make

    def forward(self, pixel_values: Tensor) -> object:
        return self.make(self.net(pixel_values))


OUTPUTS = {
    "dataclass": lambda y: Output(y, y.sum(), (2 * y, y.argmax(1))),
    "namespace": lambda y: SimpleNamespace(logits=y, name="vit"),
    "dict": lambda y: {"logits": y, "count": torch.tensor(3)},
    "tuple": lambda y: (y, None, [y[:, :2]]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_objects_are_measured(kind: str) -> None:
    model, x = Wrapped(OUTPUTS[kind]).eval(), images(24)
    found = tokens_and_outputs(model, x)
    assert torch.equal(found[0], model.net(x))
    assert len(found) == {"dataclass": 2, "tuple": 2}.get(kind, 1)
    small = compress(model, keep_params=0.7, calibration=x, refine=2)
    assert relative(small.net, model.net, x) < 0.7


def test_an_output_without_tensors_is_refused() -> None:
    model = Wrapped(lambda y: y.argmax(1)).eval()
    assert not sequential_blocks(model)
    with pytest.raises(UserError, match="Wrapped returns no floating-point tensor"):
        compress(model, keep_params=0.7, calibration=images(8))
