"""ComCAT's checkpoints against an independent implementation of their architecture."""

import pytest
import timm
import torch
from helpers.comcat import (
    ARCHITECTURE,
    ARGS,
    CLASSES,
    HEADS,
    RANKS,
    SIZE,
    ReleasedViT,
    Shape,
    imported,
    released,
    save_as_the_program,
)
from helpers.models import dense_model

import adacomcat
from adacomcat import RankPlan
from adacomcat.checkpoint.comcat import import_comcat
from adacomcat.checkpoint.comcat_writer import save_comcat
from adacomcat.errors import UserError
from adacomcat.sites import find_sites


@pytest.mark.parametrize("biases", [True, False])
def test_same_outputs_as_the_released_architecture(tmp_path, biases):
    reference = released(tmp_path, biases=biases)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = reference(images)
        model = imported(tmp_path)
        assert expected.std() > 0.1  # the comparison below can fail
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        adacomcat.save(model, tmp_path / "folder")
        loaded = timm.create_model(f"local-dir:{tmp_path}/folder", pretrained=True).eval()
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)
    assert model.rank_plan["blocks.0.attn.qk"] == 28 // HEADS
    assert model.rank_plan["blocks.1.attn.vo"] == 21 // HEADS


# Widths, heads and menus of DeiT-S and DeiT-B; one block stands for twelve.
SHAPES = {"tiny": (Shape(), RANKS), "DeiT-S": (Shape(384, 1, 6, 1000), [318, 192, 64, 96, 288]),
          "DeiT-B": (Shape(768, 1, 12, 1000), [504, 384, 192, 256, 512])}
# Stage 1 searches on several devices, with biases before the first search and without after it.
STAGES = {"first, unsearched": dict(biases=True, prefix="module.", alphas=True),
          "first, searched": dict(biases=False, prefix="module.", alphas=True),
          "second": dict(biases=True, prefix="", alphas=False),
          "second, without attention biases": dict(biases=False, prefix="", alphas=False)}


@pytest.mark.parametrize("ranks_file", ["ranks.txt", None])
@pytest.mark.parametrize("head", ["factorised", "dense"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_as_the_program_writes_them(shape, stage, head, ranks_file, tmp_path):
    (form, ranks), how = SHAPES[shape], dict(STAGES[stage])
    if shape != "tiny" and ranks_file is None:
        return
    ranks = ranks[:-1] if head == "dense" else ranks
    reference = released(tmp_path, ranks, how.pop("biases"), shape=form, inner=False,
                         mlp_biases=True)
    save_as_the_program(reference, tmp_path / "checkpoint.pth", **how)
    model = imported(tmp_path, ranks=ranks_file, **form.args)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = reference(images)
        assert expected.std() > 0.02
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert ("head" in model.rank_plan.ranks) == (head == "factorised")


def test_a_missing_rank_of_the_head_is_told(tmp_path):
    released(tmp_path)
    (tmp_path / "ranks.txt").write_text(",".join(map(str, RANKS[:-1])))
    with pytest.raises(UserError, match="head of this checkpoint is factorised"):
        imported(tmp_path)


def plans(model):
    """Plans with every kind of layer dense, and with low-rank ones beside them."""
    full = RankPlan.uniform(model, 0.6, multiple=2)
    yield "all low-rank", full
    yield "dense", RankPlan()
    for part in ("attn.qk", "attn.vo", "mlp.fc1", "head"):
        yield f"{part} dense", RankPlan({name: rank for name, rank in full.ranks.items()
                                         if not name.endswith(part)})


@pytest.mark.parametrize("what", [name for name, _ in plans(dense_model(ARCHITECTURE, **ARGS))])
def test_what_is_written_loads_in_the_released_architecture(what, tmp_path):
    dense = dense_model(ARCHITECTURE, **ARGS)
    model = adacomcat.compress(dense, plan=dict(plans(dense))[what])
    save_comcat(model, tmp_path / "written")
    numbers = list(map(int, (tmp_path / "written" / "ranks.txt").read_text().split(",")))
    reference = ReleasedViT(numbers, True, inner=False).eval()
    found = torch.load(tmp_path / "written" / "checkpoint.pth", weights_only=False)["model"]
    reference.load_state_dict(found)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(reference(images), model(images), rtol=1e-4, atol=1e-5)


def test_another_scale_of_the_logits_moves_into_the_queries(tmp_path):
    model = adacomcat.compress(dense_model(ARCHITECTURE, **ARGS), keep_params=0.8)
    for block in model.blocks:
        block.attn.scale *= 3.0
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = model(images)
    save_comcat(model, tmp_path / "written")
    files = (tmp_path / "written" / name for name in ("ranks.txt", "checkpoint.pth"))
    again = import_comcat(*files, ARCHITECTURE, **ARGS)
    torch.testing.assert_close(again(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "args", "says"), [
    ("deit3_small_patch16_224", {}, "no place for blocks.0.ls1.gamma"),
    ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}, "global_pool is 'avg'"),
    ("vit_small_patch16_224", {"mlp_ratio": 2.0}, "blocks.0.mlp has 96 hidden neurons"),
    ("vit_small_patch16_224", {"act_layer": "relu"}, "computes something else"),
    ("vit_small_patch16_224", {"qk_norm": True}, "blocks.0.attn is a Attention"),
])
def test_what_the_layout_has_no_place_for(architecture, args, says, tmp_path):
    model = dense_model(architecture, **ARGS | args)
    with pytest.raises(UserError, match=says):
        save_comcat(model, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_pruned_mlps_cannot_be_written(tmp_path):
    model = dense_model(ARCHITECTURE, **ARGS)
    plan = RankPlan({site.name: 8 for site in find_sites(model, ["blocks.0.mlp"])
                     if site.kind == "hidden"})
    pruned = adacomcat.compress(model, plan=plan, calibration=torch.randn(8, 3, SIZE, SIZE))
    with pytest.raises(UserError, match="8 hidden neurons, and ComCAT's MLPs have 192"):
        save_comcat(pruned, tmp_path / "written")


def test_every_bias_counts_and_the_key_bias_cancels(tmp_path):
    """Each released bias moves the outputs of the import as it moves the reference's."""
    reference = released(tmp_path, seed=1)
    images = torch.randn(2, 3, SIZE, SIZE)
    weights = reference.state_dict()
    before = imported(tmp_path)(images)
    for name in ("attn.{}w_ks", "attn.{}w_qs", "attn.{}w_vs", "mlp.fc1.{}first_factor"):
        key = f"blocks.0.{name.format('selected_rank_layer.')}.bias"
        changed = weights | {key: weights[key] + torch.randn_like(weights[key])}
        torch.save({"model": changed}, tmp_path / "checkpoint.pth")
        moved = (imported(tmp_path)(images) - before).abs().max()
        assert (moved == 0) == ("w_ks" in key), key


@pytest.mark.parametrize(("text", "says"), [
    ("28,19,20", "3 ranks; this model of 2 blocks needs 9"),
    ("28,19,20,24,48,21,7,9,x", "'x' is no rank"),
    ("28,19,20,24,48,21,7,9,0", "'0' is no rank"),
    ("2,19,20,24,48,21,7,9,5", "total qk rank of 2 for 3 heads"),
    ("480,19,20,24,48,21,7,9,5", "rank 160"),
    ("28,19,20,24,48,21,8,9,5", "blocks.1.mlp.fc1"),
])
def test_wrong_ranks(tmp_path, text, says):
    released(tmp_path)
    (tmp_path / "ranks.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        imported(tmp_path)


@pytest.mark.parametrize("key", ["blocks.1.attn.selected_rank_layer.w_vs.weight", "norm.weight",
                                 "head.selected_rank_layer.last_factor.weight"])
def test_missing_keys_are_named(tmp_path, key):
    weights = released(tmp_path).state_dict()
    del weights[key]
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match=key):
        imported(tmp_path)


def test_other_architectures_are_refused(tmp_path):
    released(tmp_path)
    with pytest.raises(UserError, match=r"cls_token \(1, 1, 48\) instead of"):
        imported(tmp_path, **ARGS | {"embed_dim": 96, "num_heads": 3})
    with pytest.raises(UserError, match="plain ViT and DeiT models; swin_tiny"):
        imported(tmp_path, "swin_tiny_patch4_window7_224", num_classes=CLASSES)
    with pytest.raises(UserError, match="did you mean deit_tiny_patch16_224"):
        imported(tmp_path, "deit_tiny_patch16_225")


def test_dense_and_pickled_checkpoints_are_refused(tmp_path):
    released(tmp_path)
    torch.save({"model": timm.create_model(ARCHITECTURE, **ARGS).state_dict()},
               tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="no ComCAT checkpoint"):
        imported(tmp_path)
    torch.save({"model": ReleasedViT(RANKS, True)}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="holds an object of helpers.comcat.ReleasedViT"):
        imported(tmp_path)
