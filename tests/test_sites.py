"""Tiers by exact type, the arithmetic of every site, and filters."""

import re

import pytest
import timm
from timm.layers import Attention
from torch import nn

from adacomcat import RankPlan, UserError, find_sites
from adacomcat.cost import model_params
from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.registry import attention_tier
from adacomcat.sites import DENSE, prunable_mlps

TINY = {"img_size": 32, "embed_dim": 64, "depth": 1, "num_heads": 2}


class OtherAttention(Attention):
    """A subclass may compute anything: its type is not known."""


@pytest.mark.parametrize(("arguments", "tier"), [
    ({}, "A"), ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "B"),
    ({"scale_norm": True, "norm_layer": nn.LayerNorm}, None), ({"gated": True}, None)])
def test_tiers_of_timm_attention(arguments: dict, tier: str | None) -> None:
    assert attention_tier(Attention(32, 4, **arguments)) == tier
    assert attention_tier(OtherAttention(32, 4, **arguments)) is None


@pytest.mark.parametrize("arguments", [
    {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True}])
def test_attention_that_does_not_fold_whole_is_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match="does not fold"):
        LowRankAttention.from_timm(Attention(32, 4, **arguments), 4, 4)


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch16_rope_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_dense_sites_count_the_parameters_that_they_stand_for(name: str) -> None:
    model = timm.create_model(name, **TINY | ({"img_size": 28} if "eva" in name else {}))
    sites = find_sites(model)
    for module in {site.module for site in sites}:
        dense = model.get_submodule(module)
        counted = sum(site.dense_params for site in sites if site.module == module)
        tables = sum(p.numel() for n, p in dense.named_parameters() if "table" in n)
        assert counted == model_params(dense) - tables, module


def test_candidates_are_multiples_below_break_even_then_dense() -> None:
    model = timm.create_model("vit_small_patch16_224", depth=1)
    sites = {site.name: site for site in find_sites(model)}
    assert sites["blocks.0.attn.qk"].candidates() == (*range(8, 64, 8), DENSE)
    fc1 = sites["blocks.0.mlp.fc1"]
    assert fc1.candidates() == (*range(16, 308, 16), DENSE)
    assert all(fc1.params(rank) < fc1.params(DENSE) for rank in fc1.candidates()[:-1])
    assert list(sites) == ["blocks.0.attn.qk", "blocks.0.attn.vo", "blocks.0.mlp.fc1",
                           "blocks.0.mlp.fc2", "head"]


def test_a_plan_validates_against_its_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    assert set(RankPlan.full(model).ranks.values()) == {32, 64}
    RankPlan.full(model).validate(model)
    with pytest.raises(UserError, match="from 1 to 32"):
        RankPlan({"blocks.0.attn.qk": 33}).validate(model)


ATTENTION, MLP = ["attn.qk", "attn.vo"], ["mlp.fc1", "mlp.fc2"]


def inside(blocks: str, parts: list[str]) -> list[str]:
    return [f"blocks.{block}.{part}" for block in blocks for part in parts]


@pytest.mark.parametrize(("filters", "names"), [
    ({"include": "head"}, ["head"]),
    ({"include": "blocks.1"}, inside("1", ATTENTION + MLP)),
    ({"include": "*.attn", "exclude": "*.0.*"}, inside("1", ATTENTION)),
    ({"include": ["*.vo", "head"]}, [*inside("01", ["attn.vo"]), "head"]),
    ({"exclude": ["blocks.*"]}, ["head"]),
    ({"exclude": re.compile(r"\.fc\d|head")}, inside("01", ATTENTION)),
    ({"exclude": lambda name, module: isinstance(module, Attention)},
     [*inside("01", MLP), "head"]),
    ({"include": lambda name, module: name == "blocks.0", "exclude": "*.qk"},
     inside("0", ["attn.vo", *MLP])),
    ({"include": ()}, []),
])
def test_filters_by_name_and_by_module(filters: dict, names: list[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY | {"depth": 2})
    assert [site.name for site in find_sites(model, **filters)] == names


@pytest.mark.parametrize(("filters", "parts"), [
    ({}, ["hidden"]), ({"exclude": "*.fc1"}, ["fc2"]), ({"exclude": "*.hidden"}, ["fc1", "fc2"]),
    ({"include": "*.mlp"}, ["hidden"]), ({"include": "*.hidden"}, ["hidden"]),
    ({"include": "*.fc[12]"}, ["hidden"]), ({"include": "*.fc2"}, ["fc2"]),
    ({"exclude": "*.mlp"}, [])])
def test_filters_of_mlps_whose_neurons_are_counted(filters: dict, parts: list[str]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    names = [site.name for site in find_sites(model, prunable_mlps(model), **filters)]
    assert [name for name in names if ".mlp." in name] == [f"blocks.0.mlp.{part}" for part in parts]


@pytest.mark.parametrize("pattern", ["haed", re.compile("atn")], ids=str)
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_filter_that_fits_nothing_is_a_mistake(argument: str, pattern: object) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(UserError, match="haed|atn"):
        find_sites(model, **{argument: [pattern, "head"]})
