"""ComCAT's released architecture, implemented apart from the package, and its files."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from adacomcat.checkpoint.comcat import import_comcat

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
