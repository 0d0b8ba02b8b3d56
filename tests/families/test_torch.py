"""PyTorch's own attentions, MLPs and encoder layers, torchvision's models, and bare layers."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, find_sites
from adacomcat.families.torch import LowRankMultiheadAttention


def roughened(model: nn.Module) -> nn.Module:
    """In float64, biases and norms not trivial."""
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double().eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def whole(model: nn.Module) -> nn.Module:
    return compress(model, plan=RankPlan.full(model))


def vit() -> nn.Module:
    return roughened(torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5))


def swin() -> nn.Module:
    return roughened(torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [3, 3], num_classes=5, stochastic_depth_prob=0.0))


def kinds(model: nn.Module) -> set[str]:
    return {site.kind for site in find_sites(model, [
        name for name, _ in model.named_modules() if name.endswith("mlp")])}


# Attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("crossed", [True, False])
def test_full_rank_is_multihead_attention(batch_first: bool, bias: bool, crossed: bool) -> None:
    attn: Any = roughened(nn.MultiheadAttention(24, 3, bias=bias, batch_first=batch_first))
    small: Any = whole(attn)
    assert isinstance(small, LowRankMultiheadAttention)
    x, other = torch.randn(2, 7, 24).double(), torch.randn(2, 7, 24).double()
    given = (x, other, other) if crossed else (x, x, x)
    for average in (True, False):
        expected = attn(*given, average_attn_weights=average)
        found = small(*given, average_attn_weights=average)
        torch.testing.assert_close(found, expected)
    assert small(*given, need_weights=False)[1] is None
    unbatched = [one[0] for one in given]
    torch.testing.assert_close(small(*unbatched), attn(*unbatched))


@pytest.mark.parametrize("floating", [True, False])
def test_masks_mean_what_they_mean_in_pytorch(floating: bool) -> None:
    attn: Any = roughened(nn.MultiheadAttention(24, 3, batch_first=True))
    small: Any = whole(attn)
    x = torch.randn(2, 5, 24).double()
    mask, padding = torch.rand(6, 5, 5) > 0.7, torch.zeros(2, 5, dtype=torch.bool)
    mask.diagonal(dim1=1, dim2=2).fill_(False)
    padding[1, 4] = True
    if floating:
        mask, padding = (torch.zeros(m.shape).double().masked_fill(m, -1e9)
                         for m in (mask, padding))
    for attn_mask, key_padding in ((mask, None), (mask[0], None), (None, padding),
                                   (mask, padding)):
        expected = attn(x, x, x, key_padding, attn_mask=attn_mask)
        torch.testing.assert_close(small(x, x, x, key_padding, attn_mask=attn_mask), expected,
                                   equal_nan=True)


@pytest.mark.parametrize("arguments", [{"kdim": 8, "vdim": 8}, {"add_bias_kv": True},
                                       {"add_zero_attn": True}])
def test_what_does_not_fold_stays(arguments: dict[str, Any]) -> None:
    attn = nn.MultiheadAttention(24, 3, batch_first=True, **arguments)
    assert find_sites(nn.Sequential(attn)) == []


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_an_encoder_leaves_the_path_that_reads_dense_weights(norm_first: bool,
                                                             activation: str) -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 48, activation=activation, batch_first=True,
                                       norm_first=norm_first)
    encoder = roughened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    x, padding = torch.randn(3, 6, 24).double(), torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = True
    for exclude in (None, "*.self_attn"):
        small = compress(encoder, plan=RankPlan({
            site.name: site.full_rank for site in find_sites(encoder, exclude=exclude)}))
        with torch.no_grad():
            assert relative(small(x), encoder(x)) < 1e-12
            found, expected = (made(x, src_key_padding_mask=padding)[~padding]
                               for made in (small, encoder))
            assert relative(found, expected) < 1e-12


def test_a_decoder_folds_both_attentions() -> None:
    layer = nn.TransformerDecoderLayer(24, 2, 48, batch_first=True)
    decoder = roughened(nn.TransformerDecoder(layer, 1))
    x, memory = torch.randn(3, 6, 24).double(), torch.randn(3, 9, 24).double()
    assert relative(whole(decoder)(x, memory), decoder(x, memory)) < 1e-12
    calibrated = compress(decoder, keep_params=0.6, calibration=[(x, memory)])
    assert calibrated(x, memory).isfinite().all()


# torchvision


@pytest.mark.parametrize("make", [vit, swin])
def test_torchvision_folds(make: Any, tmp_path: Any) -> None:
    dense = make()
    assert {"qk", "vo", "hidden"} <= kinds(dense)
    images = torch.randn(12, 3, 32, 32).double()
    small = whole(dense)
    assert relative(small(images), dense(images)) < 1e-12
    assert relative(adacomcat.to_plain(small)(images), dense(images)) < 1e-12
    data_free = compress(dense, keep_params=0.7)
    calibrated = compress(dense, keep_params=0.7, calibration=images)
    assert relative(calibrated(images), dense(images)) < relative(data_free(images), dense(images))
    fused = adacomcat.optimize(calibrated)
    assert relative(fused(images), calibrated(images)) < 1e-10
    rebuilt = adacomcat.convert.build_skeleton(make(), calibrated.rank_plan)
    rebuilt.load_state_dict(calibrated.state_dict())
    assert torch.equal(rebuilt(images), calibrated(images))


def test_windows_are_shifted_padded_and_large() -> None:
    """Sides that no window divides, and sides that one window covers."""
    dense = swin()
    small = whole(dense)
    for height, width in ((32, 32), (40, 28), (8, 36), (12, 12)):
        images = torch.randn(2, 3, height, width).double()
        assert relative(small(images), dense(images)) < 1e-12


def test_torchvision_blocks_are_fused() -> None:
    fused = adacomcat.optimize(compress(vit(), keep_params=0.7))
    names = {type(module).__name__ for module in fused.modules()}
    assert {"FusedAttention", "FusedMlp", "FusedPatches"} <= names
    assert "LowRankMultiheadAttention" not in names


# Layers alone


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Linear(40, 30), torch.randn(64, 40)),
    (nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24)), torch.randn(64, 24)),
])
def test_a_layer_alone_is_compressed(layer: nn.Module, x: Tensor) -> None:
    layer, x = roughened(layer), x.double()
    assert relative(whole(layer)(x), layer(x)) < 1e-12
    for calibration in (None, x):
        small = compress(layer, keep_params=0.6, calibration=calibration)
        assert sum(p.numel() for p in small.parameters()) <= 0.6 * sum(
            p.numel() for p in layer.parameters())
        assert small(x).shape == layer(x).shape
        assert small.rank_plan.ranks
    with pytest.raises(UserError, match="use compress, which returns another"):
        adacomcat.compress_(layer, keep_params=0.6, calibration=x)


def test_an_attention_alone_is_calibrated() -> None:
    attn: Any = roughened(nn.MultiheadAttention(32, 2, batch_first=True))
    x = torch.randn(8, 16, 32).double() * torch.logspace(0, -2, 32).double()
    small: Any = compress(attn, keep_params=0.7, calibration=[(x, x, x)])
    free: Any = compress(attn, keep_params=0.7)
    expected = attn(x, x, x)[0]
    assert relative(small(x, x, x)[0], expected) < relative(free(x, x, x)[0], expected)


@pytest.mark.parametrize("layers", [
    [nn.Linear(8, 16), nn.Softmax(-1), nn.Linear(16, 8)],  # mixes neurons
    [nn.Linear(8, 16), nn.GLU(), nn.Linear(8, 8)],
    [nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8)],
    [nn.Linear(8, 16), nn.GELU()],
])
def test_only_plain_mlps_lose_neurons(layers: list[nn.Module]) -> None:
    held = nn.Sequential(nn.Sequential(*layers))
    assert {site.kind for site in find_sites(held, ["0"])} == {"linear"}


def test_pruned_sequences_keep_their_names() -> None:
    mlp = nn.Sequential()
    mlp.add_module("c_fc", nn.Linear(16, 64))
    mlp.add_module("act", nn.ReLU())
    mlp.add_module("drop", nn.Dropout(0.25))
    mlp.add_module("c_proj", nn.Linear(64, 16))
    held = nn.Sequential(nn.Linear(16, 16), mlp).double()
    small = compress(held, keep_params=0.5, calibration=torch.randn(300, 16).double())
    assert [name for name, _ in small[1].named_children()] == ["c_fc", "act", "drop", "c_proj"]
    assert small[1].c_fc.out_features < 64
