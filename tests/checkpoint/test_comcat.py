"""Released ComCAT checkpoints against an independent implementation of their architecture."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import adacomcat
from adacomcat.checkpoint.comcat import import_comcat
from adacomcat.errors import UserError

ARCHITECTURE = "deit_tiny_patch16_224"
DIM, DEPTH, HEADS, CLASSES, SIZE = 48, 2, 3, 10, 32
ARGS = {"img_size": SIZE, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS,
        "num_classes": CLASSES}
RANKS = [28, 19, 20, 24, 48, 21, 7, 9, 5]  # totals that do not all divide by the heads


class Factored(nn.Module):
    def __init__(self, into: int, rank: int, out: int, biases: bool) -> None:
        super().__init__()
        self.selected_rank_layer = nn.ModuleDict({
            "first_factor": nn.Linear(into, rank, bias=biases),
            "last_factor": nn.Linear(rank, out, bias=biases)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.selected_rank_layer
        return layer["last_factor"](layer["first_factor"](x))


class HeadFactored(nn.Module):
    def __init__(self, qk: int, vo: int, biases: bool) -> None:
        super().__init__()
        rows_qk, rows_vo = (HEADS * (total // HEADS) for total in (qk, vo))
        self.selected_rank_layer = nn.ModuleDict({
            "w_qs": nn.Linear(DIM, rows_qk, bias=biases),
            "w_ks": nn.Linear(DIM, rows_qk, bias=biases),
            "w_vs": nn.Linear(DIM, rows_vo, bias=biases),
            "proj": nn.Linear(rows_vo, DIM, bias=biases)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.selected_rank_layer
        outputs = []
        queries, keys, values = (layer[name](x).chunk(HEADS, dim=-1)
                                 for name in ("w_qs", "w_ks", "w_vs"))
        for q, k, v in zip(queries, keys, values, strict=True):
            logits = torch.einsum("bic,bjc->bij", q, k) / math.sqrt(DIM // HEADS)
            outputs.append(torch.softmax(logits, -1) @ v)
        return layer["proj"](torch.cat(outputs, -1))


class ReleasedViT(nn.Module):
    """DeiT with factored attention, MLPs and head, under the released checkpoints' keys."""

    def __init__(self, ranks: list[int], biases: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (SIZE // 16) ** 2, DIM))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, DIM, 16, 16)})
        self.blocks = nn.ModuleList()
        for block in range(DEPTH):
            qk, vo, fc1, fc2 = ranks[4 * block:4 * block + 4]
            self.blocks.append(nn.ModuleDict({
                "norm1": nn.LayerNorm(DIM, eps=1e-6), "attn": HeadFactored(qk, vo, biases),
                "norm2": nn.LayerNorm(DIM, eps=1e-6),
                "mlp": nn.ModuleDict({"fc1": Factored(DIM, fc1, 4 * DIM, biases),
                                      "fc2": Factored(4 * DIM, fc2, DIM, biases)})}))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.head = Factored(DIM, ranks[-1], CLASSES, biases)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            hidden = F.gelu(block["mlp"]["fc1"](block["norm2"](x)))
            x = x + block["mlp"]["fc2"](hidden)
        return self.head(self.norm(x)[:, 0])


def released(tmp_path, ranks=RANKS, biases=True, seed=0):
    torch.manual_seed(seed)
    model = ReleasedViT(ranks, biases).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25)
    (tmp_path / "ranks.txt").write_text(",".join(map(str, ranks)) + "\n")
    torch.save({"model": model.state_dict(), "epoch": 29}, tmp_path / "checkpoint.pth")
    return model


def imported(tmp_path, architecture=ARCHITECTURE, **args):
    return import_comcat(tmp_path / "ranks.txt", tmp_path / "checkpoint.pth", architecture,
                         **(args or ARGS))


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
    with pytest.raises(UserError, match="truncated or no weights file"):
        imported(tmp_path)
