"""ComCAT's released architecture, implemented apart from the package, and its files."""

import argparse
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import nn

from adacomcat.checkpoint.comcat import import_comcat

ARCHITECTURE = "deit_tiny_patch16_224"


class Shape(NamedTuple):
    """What a plain ViT is built from; images are square and patches have 16 pixels."""

    dim: int = 48
    depth: int = 2
    heads: int = 3
    classes: int = 10
    size: int = 32

    @property
    def args(self):
        """timm's keyword arguments."""
        return {"img_size": self.size, "embed_dim": self.dim, "depth": self.depth,
                "num_heads": self.heads, "num_classes": self.classes}


TINY = Shape()
DIM, DEPTH, HEADS, CLASSES, SIZE = TINY
ARGS = TINY.args
RANKS = [28, 19, 20, 24, 48, 21, 7, 9, 5]  # totals that do not all divide by the heads


class Factored(nn.Module):
    def __init__(self, into: int, rank: int, out: int, biases: bool, inner: bool) -> None:
        super().__init__()
        self.selected_rank_layer = nn.ModuleDict({
            "first_factor": nn.Linear(into, rank, bias=inner),
            "last_factor": nn.Linear(rank, out, bias=biases)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.selected_rank_layer
        return layer["last_factor"](layer["first_factor"](x))


class HeadFactored(nn.Module):
    def __init__(self, qk: int, vo: int, biases: bool, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        rows_qk, rows_vo = (shape.heads * (total // shape.heads) for total in (qk, vo))
        self.selected_rank_layer = nn.ModuleDict({
            "w_qs": nn.Linear(shape.dim, rows_qk, bias=biases),
            "w_ks": nn.Linear(shape.dim, rows_qk, bias=biases),
            "w_vs": nn.Linear(shape.dim, rows_vo, bias=biases),
            "proj": nn.Linear(rows_vo, shape.dim, bias=biases)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, heads = self.selected_rank_layer, self.shape.heads
        outputs = []
        queries, keys, values = (layer[name](x).chunk(heads, dim=-1)
                                 for name in ("w_qs", "w_ks", "w_vs"))
        for q, k, v in zip(queries, keys, values, strict=True):
            logits = torch.einsum("bic,bjc->bij", q, k) / math.sqrt(self.shape.dim // heads)
            outputs.append(torch.softmax(logits, -1) @ v)
        return layer["proj"](torch.cat(outputs, -1))


class ReleasedViT(nn.Module):
    """DeiT with factored attention and MLPs, under the released checkpoints' keys.

    biases: of attentions, MLPs and head. inner: also of first factors, which the program that is
    published leaves out. Without a last rank the head is dense.
    """

    def __init__(self, ranks: list[int], biases: bool, shape: Shape = TINY,
                 inner: bool | None = None, mlp_biases: bool | None = None) -> None:
        super().__init__()
        inner = biases if inner is None else inner
        mlp_biases = biases if mlp_biases is None else mlp_biases
        dim = shape.dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (shape.size // 16) ** 2, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, 16)})
        self.blocks = nn.ModuleList()
        for block in range(shape.depth):
            qk, vo, fc1, fc2 = ranks[4 * block:4 * block + 4]
            self.blocks.append(nn.ModuleDict({
                "norm1": nn.LayerNorm(dim, eps=1e-6),
                "attn": HeadFactored(qk, vo, biases, shape),
                "norm2": nn.LayerNorm(dim, eps=1e-6),
                "mlp": nn.ModuleDict({"fc1": Factored(dim, fc1, 4 * dim, mlp_biases, inner),
                                      "fc2": Factored(4 * dim, fc2, dim, mlp_biases, inner)})}))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, shape.classes) if len(ranks) == 4 * shape.depth else Factored(
            dim, ranks[-1], shape.classes, mlp_biases, inner)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = x + block["attn"](block["norm1"](x))
            hidden = F.gelu(block["mlp"]["fc1"](block["norm2"](x)))
            x = x + block["mlp"]["fc2"](hidden)
        return self.head(self.norm(x)[:, 0])


def released(tmp_path, ranks=RANKS, biases=True, seed=0, **form):
    torch.manual_seed(seed)
    model = ReleasedViT(ranks, biases, **form).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25 if model.cls_token.shape[-1] < 100 else 0.05)
    (tmp_path / "ranks.txt").write_text(",".join(map(str, ranks)) + "\n")
    torch.save({"model": model.state_dict(), "epoch": 29}, tmp_path / "checkpoint.pth")
    return model


def save_as_the_program(model, path, *, prefix="", alphas=False):
    """checkpoint.pth with all that the training program keeps beside the weights.

    prefix: of a wrapper for several processes. alphas: those of the search, its first stage.
    """
    weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    if alphas:
        for block in range(len(model.blocks)):
            for name in ("attn.qk_rank_alpha", "attn.vp_rank_alpha", "mlp.fc1.rank_alpha",
                         "mlp.fc2.rank_alpha"):
                weights[f"{prefix}blocks.{block}.{name}"] = torch.full((5,), 0.2)
        weights[f"{prefix}head.rank_alpha"] = torch.full((10,), 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule = CosineLRScheduler(optimizer, t_initial=30, lr_min=1e-5)
    args = argparse.Namespace(model=ARCHITECTURE, batch_size=512, lr=5e-4, opt_betas=None,
                              cutmix_minmax=None, search_rank=alphas, distillation_type="hard")
    torch.save({"model": weights, "optimizer": optimizer.state_dict(),
                "lr_scheduler": schedule.state_dict(), "epoch": 29,
                "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
                "args": args}, path)


def imported(tmp_path, architecture=ARCHITECTURE, ranks="ranks.txt", **args):
    return import_comcat(ranks and tmp_path / ranks, tmp_path / "checkpoint.pth", architecture,
                         **(args or ARGS))
