"""What only `optimize` uses: attention for one token, and patches as rows of a product."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.cpu_cases import each_dtype
from helpers.op_cases import plain_attention, strided
from helpers.tolerance import assert_close_to_float64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import adacomcat
from adacomcat.layers.fused import FusedPatches
from adacomcat.ops import backends, inference

# images, tokens, width, heads, rank of queries and keys, rank of values
ATTENTION = [(1, 197, 96, 6, 16, 16), (3, 50, 37, 2, 5, 9), (2, 1, 48, 3, 1, 2),
             (5, 23, 64, 5, 0, 3), (0, 7, 16, 2, 3, 4)]
# images, channels, height, width, patch, out
IMAGES = [(1, 3, 64, 64, 16, 130), (2, 3, 30, 33, 8, 37), (3, 1, 28, 14, 4, 16),
          (2, 2, 20, 28, 14, 1), (8, 3, 224, 224, 16, 33), (0, 3, 16, 16, 4, 8), (1, 3, 3, 8, 4, 8)]
EPSILON = 1e-5


def draw_attention(
    sizes: tuple[int, ...], dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor | None, ...]:
    images, tokens, d, heads, qk, vo = sizes

    def weight(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns) / max(columns, 1) ** 0.5).to(dtype)

    x = torch.randn(images, tokens, d).to(dtype)
    bq, bo = ((torch.randn(n).to(dtype) for n in (heads * qk, d)) if bias else (None, None))
    return (x, weight(heads * qk, d), bq, weight(heads * qk, d), weight(heads * vo, d),
            weight(d, heads * vo), bo)


def whole_attention(x: Tensor, *weights: Tensor | None, num_heads: int) -> Tensor:
    """Attention of all tokens by the plain formula, cut to the first token."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    y = plain_attention(normed, *weights, num_heads=num_heads, scale=0.37)
    return (x + y)[:, :1]


def doubled(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.double() for t in tensors)


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", ATTENTION, ids=str)
def test_class_attention(sizes: tuple, bias: bool, dtype: torch.dtype,
                         instruction_set: str, poisoned_memory: None) -> None:
    tensors, heads = draw_attention(sizes, dtype, bias), sizes[3]
    exact = whole_attention(*doubled(tensors), num_heads=heads)
    plain = whole_attention(*tensors, num_heads=heads)
    actual = inference.class_attention(*tensors, heads, 0.37, EPSILON)
    assert_close_to_float64(actual, exact, plain)
    again = inference.class_attention(*map(strided, tensors), heads, 0.37, EPSILON)
    torch.testing.assert_close(again, actual)


def plain_patches(image: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor | None,
                  positions: Tensor | None) -> Tensor:
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).mT
    tokens = tokens if positions is None else tokens + positions
    if prefix is None:
        return tokens
    return torch.stack([torch.cat([prefix, one]) for one in tokens]) if len(tokens) else (
        tokens.new_zeros(0, len(prefix) + tokens.shape[1], tokens.shape[2]))


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix, positioned", [(None, False), (0, True), (1, False), (5, True)])
@pytest.mark.parametrize("sizes", IMAGES, ids=str)
def test_patch_embedding(sizes: tuple, prefix: int | None, positioned: bool, bias: bool,
                         dtype: torch.dtype, instruction_set: str,
                         poisoned_memory: None) -> None:
    images, channels, height, width, patch, out = sizes
    image = torch.randn(images, channels, height, width).to(dtype)
    weight = (torch.randn(out, channels, patch, patch) / (channels**0.5 * patch)).to(dtype)
    b = torch.randn(out).to(dtype) if bias else None
    leading = None if prefix is None else torch.randn(prefix, out).to(dtype)
    patches = height // patch * (width // patch)
    positions = torch.randn(patches, out).to(dtype) if positioned else None
    rest = (weight, b, leading, positions)
    actual = inference.patch_embedding(image, *rest)
    if height < patch:
        assert actual.shape == (images, prefix or 0, out)  # F.conv2d refuses
        return
    exact, plain = plain_patches(*doubled((image, *rest))), plain_patches(image, *rest)
    assert_close_to_float64(actual, exact, plain)
    for layout in (image.contiguous(memory_format=torch.channels_last), strided(image)):
        again = inference.patch_embedding(layout, weight, *map(strided, rest[1:]))
        torch.testing.assert_close(again, actual)
    other = weight.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inference.patch_embedding(image, other, *rest[1:]), actual)


def test_patches_of_an_odd_width_are_convolved() -> None:
    image, weight = torch.randn(2, 3, 21, 35).bfloat16(), torch.randn(8, 3, 7, 7).bfloat16()
    expected = F.conv2d(image, weight, stride=7).flatten(2).mT
    assert torch.equal(inference.patch_embedding(image, weight, None), expected)


def test_gradients_come_from_the_formula() -> None:
    tensors = [t.requires_grad_() for t in draw_attention(ATTENTION[1], torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *t: inference.class_attention(*t, 2, 0.37, EPSILON), tensors)
    float32 = [t.detach().float().requires_grad_() for t in tensors]
    inference.class_attention(*float32, 2, 0.37, EPSILON).sum().backward()
    assert all(t.grad is not None for t in float32)
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4, requires_grad=True)
    inference.patch_embedding(image, weight, None).sum().backward()
    assert weight.grad is not None


def test_autocast_is_obeyed() -> None:
    image, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert inference.patch_embedding(image, weight, None).dtype == torch.bfloat16


@pytest.mark.skipif(backends.available()["cpp"] is not None, reason="no extension")
class TestKernels:
    def test_opcheck(self) -> None:
        tensors = draw_attention(ATTENTION[1], torch.float32)
        torch.library.opcheck(torch.ops.adacomcat.class_attention_cpu.default,
                              (*tensors, 2, 0.37, EPSILON))
        torch.library.opcheck(
            torch.ops.adacomcat.patch_embedding_cpu.default,
            (torch.randn(2, 3, 16, 24), torch.randn(5, 3, 8, 8), torch.randn(5),
             torch.randn(2, 5), torch.randn(6, 5)))

    def test_wrong_weights_are_named(self) -> None:
        x, wq, *others = draw_attention(ATTENTION[0], torch.float32)
        with pytest.raises(RuntimeError, match="wq must have shape"):
            inference.class_attention(x, wq[:, :-1], *others, 6, 0.37, EPSILON)
        with pytest.raises(RuntimeError, match="weight is torch.float16 and image is"):
            inference.patch_embedding(torch.randn(1, 3, 8, 8), torch.randn(4, 3, 4, 4).half(), None)
        image, weight = torch.randn(1, 3, 16, 8), torch.randn(4, 3, 8, 8)
        with pytest.raises(RuntimeError, match="positions must have shape .2, 4., got .3, 4."):
            inference.patch_embedding(image, weight, None, None, torch.randn(3, 4))
        with pytest.raises(RuntimeError, match="prefix must have shape"):
            inference.patch_embedding(image, weight, None, torch.randn(1, 5))
        with pytest.raises(RuntimeError, match="split into 4 heads"):
            inference.class_attention(x, wq[:-1], *others, 4, 0.37, EPSILON)

    def test_flops_are_those_of_the_formula(self) -> None:
        tensors = draw_attention(ATTENTION[0], torch.float32)
        image, weight = torch.randn(2, 3, 32, 48), torch.randn(5, 3, 16, 16)
        counts = []
        for backend in ("cpp", "reference"):
            with backends.use_backend(backend), FlopCounterMode(display=False) as counter:
                inference.class_attention(*tensors, 6, 0.37, EPSILON)
                inference.patch_embedding(image, weight, None)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("change, fused", [
    ({}, True), ({"stride": (4, 4)}, False), ({"padding": (1, 1)}, False),
    ({"dilation": (2, 2)}, False),
], ids=str)
@torch.no_grad()
def test_optimize_takes_patches_that_do_not_overlap(change: dict, fused: bool) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48,
                              depth=1, num_heads=4, dynamic_img_size=True).eval()
    proj = model.patch_embed.proj
    if change:
        model.patch_embed.proj = nn.Conv2d(3, 48, 8, **{"stride": (8, 8), **change})
    optimized = adacomcat.optimize(model)
    assert (type(optimized.patch_embed.proj) is FusedPatches) == fused
    assert type(proj) is nn.Conv2d and type(model.patch_embed.proj) is nn.Conv2d
    assert optimized.patch_embed.proj.in_channels == 3
    for size in ((32, 32), (48, 40)) if fused else ((32, 32),):
        if fused or change == {"padding": (1, 1)}:
            image = torch.randn(2, 3, *size)
            torch.testing.assert_close(optimized(image), model(image))


@pytest.mark.parametrize("size", [(28, 42), (31, 45), (14, 14)])
def test_patches_give_the_convolution_as_a_product(size: tuple[int, int]) -> None:
    """Which is how GPUs embed them."""
    image, weight, bias = torch.randn(2, 3, *size), torch.randn(5, 3, 14, 7), torch.randn(5)
    expected = F.conv2d(image.double(), weight.double(), bias.double(), stride=(14, 7))
    found = F.linear(inference.patches(image, 14, 7), weight.flatten(1), bias)
    torch.testing.assert_close(found.double(), expected.flatten(2).mT, rtol=1e-4, atol=1e-4)
