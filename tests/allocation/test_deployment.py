"""Ranks that the fused attention of other runtimes takes."""

import itertools

import pytest
from helpers.latency import CostModel
from helpers.models import dense_model
from torch import nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, find_sites, to_plain
from adacomcat.allocation.deployment import allows, decided_together, fuses
from adacomcat.allocation.latency import LatencyAllocator
from adacomcat.allocation.sensitivity import relative_sensitivities
from adacomcat.convert.factors import factorize_model

WIDE = {"img_size": 32, "embed_dim": 192, "depth": 3, "num_heads": 3, "num_classes": 7}


def heads(model: nn.Module) -> list[tuple[int, int]]:
    return [(block.attn.rank_qk, block.attn.rank_vo) for block in model.blocks
            if hasattr(block.attn, "rank_qk")]


def test_widths():
    assert fuses("flash", 24, 24) and not fuses("flash", 24, 16) and not fuses("flash", 12, 12)
    assert fuses("tensorrt", 16, 16) and not fuses("tensorrt", 24, 24)


def test_what_is_not_folded_keeps_the_width_of_its_head():
    sites = find_sites(dense_model("vit_tiny_patch16_224", **WIDE))
    qk, vo = (site for site in sites if site.module == "blocks.0.attn")
    assert allows("tensorrt", (qk, vo), (16, 16)) and not allows("tensorrt", (qk, vo), (16, 32))
    assert not allows("tensorrt", (qk,), (16,)) and allows("tensorrt", (qk,), ("dense",))
    assert allows("any", (qk, vo), (5, 7))
    assert allows("flash", (qk, vo), ("dense", "dense"))
    assert decided_together("flash", [qk, vo]) == [(qk, vo)]
    assert decided_together("any", [qk, vo]) == [(qk,), (vo,)]


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
@pytest.mark.parametrize(("deploy", "allowed"), [("tensorrt", {16, 32}),
                                                 ("flash", {*range(8, 64, 8)})])
def test_budgets_choose_widths_that_fuse(deploy, allowed, keep):
    model = dense_model("vit_tiny_patch16_224", **WIDE)
    free = heads(compress(model, keep_params=keep))
    small = compress(model, keep_params=keep, deploy=deploy)
    found = heads(small)
    assert found and all(qk == vo and qk in allowed for qk, vo in found)
    assert any(qk != vo for qk, vo in free)
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert keep - 0.1 < kept <= keep


def test_rotary_attention_keeps_its_values_dense():
    model = dense_model("vit_small_patch16_dinov3", **WIDE)
    small = compress(model, keep_params=0.6, deploy="flash")
    assert not any(name.endswith(".vo") and rank != "dense"
                   for name, rank in small.rank_plan.ranks.items())


def test_milliseconds_choose_widths_that_fuse():
    model, measure = dense_model("vit_tiny_patch16_224", **WIDE), CostModel()
    sites, factors = find_sites(model), factorize_model(model)
    allocator = LatencyAllocator(model, factors, sites, measure=measure, deploy="tensorrt",
                                 max_latency_ms=0.6 * measure.of(model))
    plan = allocator.plan(relative_sensitivities(sites, factors))
    pairs = itertools.groupby((name for name in plan.ranks if ".attn." in name),
                              key=lambda name: name.rpartition(".")[0])
    ranks = [{plan[name] for name in names} for _, names in pairs]
    assert all(len(found) == 1 and found <= {16, 32, "dense"} for found in ranks)
    assert {16, 32} & set().union(*ranks)


def test_unknown_runtimes_are_refused():
    with pytest.raises(UserError, match="unknown deployment 'npu'; choose one of any, flash"):
        compress(dense_model(), keep_params=0.5, deploy="npu")


def test_inspect_says_what_fuses(run_json, run, tmp_path):
    model = dense_model("vit_tiny_patch16_224", **WIDE)
    small = compress(model, plan=RankPlan({
        "blocks.0.attn.qk": 16, "blocks.0.attn.vo": 16, "blocks.1.attn.qk": 24,
        "blocks.1.attn.vo": 24}))
    adacomcat.save(small, tmp_path / "small")
    rows = run_json("inspect", "-m", tmp_path / "small")["attentions"]
    assert [(row["rank_qk"], row["flash"], row["tensorrt"]) for row in rows] == [
        (16, True, True), (24, True, False), (64, True, True)]
    adacomcat.save(to_plain(small), tmp_path / "plain")
    assert run_json("inspect", "-m", tmp_path / "plain")["attentions"] == rows
    code, out, _ = run("inspect", "-m", tmp_path / "small")
    assert code == 0 and "fused attention of other runtimes" in out


def test_flag(run_json, tmp_path):
    made = run_json("compress", "-m", "vit_tiny_patch16_224", "--img-size", "32", "--model-kwargs",
                    "depth=2", "--keep-params", "0.5", "--deploy", "tensorrt", "-o",
                    tmp_path / "small")
    ranks = {rank for name, rank in made["ranks"].items() if ".attn." in name}
    assert ranks <= {16, 32, "dense"} and ranks != {"dense"}
