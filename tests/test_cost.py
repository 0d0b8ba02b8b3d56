"""Parameters and multiply-accumulates against counts of their own."""

import contextlib
from math import prod

import pytest
import timm
import torch
from helpers.models import dense_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adacomcat
from adacomcat import RankPlan
from adacomcat.cost import model_macs, model_params, plan_macs, plan_params
from adacomcat.sites import find_sites
from adacomcat.utils.model import input_size

aten = torch.ops.aten
FAMILIES = {
    "vit": "vit_tiny_patch16_224", "deit3": "deit3_small_patch16_224",
    "dinov3": "vit_small_patch16_dinov3", "hybrid": "vit_tiny_r_s16_p8_224",
    "beit": "beit_base_patch16_224", "eva02": "eva02_tiny_patch14_224",
    "swin": "swin_tiny_patch4_window7_224", "swinv2": "swinv2_cr_tiny_ns_224",
    "swinv2 cosine": "swinv2_tiny_window8_256", "cait": "cait_xxs24_224",
    "coat": "coat_tiny", "convit": "convit_tiny", "xcit": "xcit_nano_12_p16_224",
    "pit": "pit_ti_224", "pvt": "pvt_v2_b0", "levit": "levit_128s",
    "efficientformer": "efficientformer_l1", "mobilevit": "mobilevit_xxs",
    "mobilevit v2": "mobilevitv2_050", "twins": "twins_svt_small", "crossvit": "crossvit_tiny_240",
    "tnt": "tnt_s_legacy_patch16_224", "visformer": "visformer_tiny",
    "edgenext": "edgenext_xx_small",
    "maxvit": "maxvit_rmlp_pico_rw_256", "mvit": "mvitv2_tiny", "nest": "nest_tiny",
    "tinyvit": "tiny_vit_5m_224", "hiera": "hiera_tiny_224", "sequencer": "sequencer2d_s",
    "mixer": "mixer_s32_224", "resnet": "resnet10t", "regnet": "regnety_002",
}


class Counter(TorchDispatchMode):
    """Counts multiply-accumulates by formulas of its own; an op that may hide some is an error."""

    PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # place of the left matrix

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        out = func(*args, **kwargs)
        if func.namespace == "adacomcat":  # rows by all matrices of its arguments
            x, *others = args
            rows = x.numel() // x.shape[-1]
            matrices = [a for a in others if isinstance(a, torch.Tensor) and a.ndim == 2]
            self.macs += rows * sum(matrix.numel() for matrix in matrices)
            if "attention" in func._opname:
                wq, _, wv, _ = matrices
                self.macs += rows * x.shape[1] * (len(wq) + len(wv))
        elif packet in self.PRODUCTS:
            left, right = args[self.PRODUCTS[packet]:][:2]
            self.macs += left.numel() * right.shape[-1]
        elif packet is aten.convolution:
            x, weight, transposed = args[0], args[1], args[6]
            places = x if transposed else out
            self.macs += places.numel() * prod(weight.shape[1:])
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            q, k, v = args[:3]
            self.macs += q.numel() * k.shape[2] + q[..., 0].numel() * k.shape[2] * v.shape[3]
        elif packet in (aten.mv, aten.dot, aten.addmv, aten.vdot, aten.addbmm):
            raise AssertionError(f"{func} is not counted")
        else:
            hidden = ("attention", "lstm", "gru", "rnn", "encoder_layer", "matmul", "linear_")
            assert not any(word in str(func) for word in hidden), f"{func} hides products"
        return out


@torch.no_grad()
def counted(model):
    counter = Counter()
    with counter:
        model.eval()(torch.zeros(1, *input_size(model)))
    return counter.macs


@pytest.mark.parametrize("family", FAMILIES)
def test_multiply_accumulates_of_every_family(family):
    model = timm.create_model(FAMILIES[family]).eval()
    plain = torch.backends.mkldnn.flags(enabled=False)  # where recurrent layers show their products
    with plain if family == "sequencer" else contextlib.nullcontext():
        expected = counted(model)
    assert model_macs(model) == expected > 1e6


@pytest.mark.parametrize("family", ["mobilevit", "pvt", "levit", "cait", "swin", "eva02", "xcit"])
def test_a_share_of_the_macs_is_kept(family):
    """By the other counter, before and after."""
    model = timm.create_model(FAMILIES[family]).eval()
    small = adacomcat.compress(model, keep_macs=0.8)
    before, after = counted(model), counted(small)
    assert 0.75 < after / before <= 0.8
    assert plan_macs(model, small.rank_plan) == model_macs(small) == after


@pytest.mark.parametrize("dense", ["qk", "vo"])
def test_parameters_where_one_half_of_an_attention_is_dense(dense):
    model = dense_model()
    plan = RankPlan({site.name: 8 for site in find_sites(model)
                     if site.folded and site.kind != dense})
    small = adacomcat.compress(model, plan=plan)
    assert plan_params(model, plan) == model_params(small)
    assert plan_macs(model, plan) == model_macs(small)


def test_parameters_where_values_stay_dense_beside_low_rank_queries():
    model = dense_model("eva02_tiny_patch14_224")
    plan = RankPlan({site.name: 8 for site in find_sites(model) if site.kind == "q"})
    small = adacomcat.compress(model, plan=plan)
    assert plan_params(model, plan) == model_params(small)


class Called(nn.Module):
    """An attention whose tokens come by name."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 16, 16)
        self.attend = nn.MultiheadAttention(64, 2, batch_first=True)
        self.head = nn.Linear(64, 64)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def forward(self, image):
        x = self.embed(image).flatten(2).mT
        return self.head(input=self.attend(x, x, x, need_weights=False)[0])


def test_products_inside_of_pytorchs_fast_path_count():
    model = Called().eval()
    embedded, projected, attended = 4 * 64 * 3 * 16 * 16, 4 * 4 * 64 * 64, 2 * 4 * 4 * 64
    assert model_macs(model) == embedded + projected + attended + 4 * 64 * 64
    plan = RankPlan({"head": 8})
    assert plan_macs(model, plan) == model_macs(model) - 4 * 64 * 64 + 4 * 8 * 128
