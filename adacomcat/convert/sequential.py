"""Compression block by block: inputs from the compressed prefix, targets from the dense model.

Each block repairs the drift of those before it: the output projections are regressed onto
(dense residual stream after the sublayer - compressed stream before it). Every regression is
shrunk towards the dense weights, for calibration knows only the directions that it saw.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from timm.layers import LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH, Moments, calibration_batches
from adacomcat.factorize.factors import (
    AttentionStatistics,
    balance,
    factorize_scores,
    factorize_values,
)
from adacomcat.factorize.linalg import descending_eigh, shrink
from adacomcat.factorize.neurons import REFIT_SHRINKAGE, eliminate, refitted
from adacomcat.layers.attention import LowRankAttention, attention_weights, low_rank_class
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import prune_mlp
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, attention_tier
from adacomcat.utils.model import evaluating
from adacomcat.utils.progress import progress


def sequential_blocks(model: nn.Module) -> bool:
    """Whether this model's blocks are known exactly, so that they can go one after the other."""
    return type(model) is VisionTransformer and all(
        type(block) is Block and type(block.mlp) is Mlp and isinstance(block.mlp.fc1, nn.Linear)
        and isinstance(block.mlp.norm, nn.Identity) and attention_tier(block.attn) == "A"
        for block in model.blocks)


# How strongly what a layer corrects of the drift before it is held to the dense weights: such
# corrections fit the calibration images far better than others. Measured on DINOv2 ViT-S
# (examples/dinov2): error on other photographs 0.463 at 0.1, 0.445 at 1, 0.676 without correction.
CORRECTION_SHRINKAGE = 1.0

# Rows beyond these add time and little knowledge: tokens of one image resemble each other.
ROWS_PER_DIMENSION = 24
LEAST_ROWS = 32768


def row_stride(tokens: int, width: int) -> int:
    """Take every k-th of ``tokens`` rows of this width."""
    return max(1, tokens // max(LEAST_ROWS, ROWS_PER_DIMENSION * width))


class Regression:
    """Streaming least squares of targets (M, out) on inputs (M, in), shrunk towards ``weight``."""

    def __init__(self, weight: Tensor, shrinkage: float, tokens: int = 0) -> None:
        self.weight, self.shrinkage = weight.double(), shrinkage
        self.stride = row_stride(tokens, weight.shape[1])
        self.inputs = Moments()
        self.cross: Tensor | float = 0.0
        self.target_sum: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = (rows.flatten(0, -2)[::self.stride] for rows in (inputs, targets))
        self.inputs.add(inputs)
        self.cross = self.cross + (inputs.mT @ targets).double()
        self.target_sum = self.target_sum + targets.sum(0).double()

    def narrowed(self, kept: Tensor, weight: Tensor) -> "Regression":
        """On a part of the inputs, shrunk towards ``weight`` (out, kept)."""
        part = Regression(weight, self.shrinkage)
        part.inputs.count, part.inputs.sum = self.inputs.count, self.inputs.sum[kept]
        part.inputs.products = self.inputs.products[kept][:, kept]
        part.cross, part.target_sum = self.cross[kept], self.target_sum
        return part

    def solve(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """(v, u, bias) of the best map of this rank: reduced-rank regression.

        The rank keeps the top right singular vectors R of Lᵀ B, C + λ m I = L Lᵀ: v = B R, u = R.
        """
        solution = self._solution()
        lower = torch.linalg.cholesky(shrink(self.inputs.covariance, self.shrinkage))
        right = _top_right_singular_vectors(lower.mT @ solution, rank)
        v, u = balance(solution @ right, right)
        return v, u, self._bias(v @ u.mT)

    def solve_dense(self) -> tuple[Tensor, Tensor]:
        """(weight (out, in), bias)."""
        solution = self._solution()
        return solution.mT, self._bias(solution)

    def _bias(self, solution: Tensor) -> Tensor:
        return self.target_sum / self.inputs.count - self.inputs.mean @ solution

    def _solution(self) -> Tensor:
        """B = Wᵀ + (C + κ m I)⁻¹ (Cxy - C Wᵀ), κ the correction's own, stronger shrinkage."""
        covariance, weight = self.inputs.covariance, self.weight.mT
        cross = self.cross / self.inputs.count - torch.outer(
            self.inputs.mean, self.target_sum / self.inputs.count)
        lower = torch.linalg.cholesky(shrink(covariance, CORRECTION_SHRINKAGE))
        return weight + torch.cholesky_solve(cross - covariance @ weight, lower)


def _top_right_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """(columns, rank), from the smaller of the two Gram matrices."""
    rows, columns = matrix.shape
    if columns <= rows:
        return descending_eigh(matrix.mT @ matrix)[1][:, :rank]
    energy, left = descending_eigh(matrix @ matrix.mT)
    return matrix.mT @ left[:, :rank] / energy[:rank].sqrt().clamp_min(1e-150)


class BlockCompression:
    """One block: dense and compressed residual streams in, both streams out, layers replaced."""

    def __init__(self, block: Block, ranks: dict[str, int | str], shrinkage: float) -> None:
        self.dense, self.ranks, self.shrinkage = block, ranks, shrinkage
        self.block = copy.deepcopy(block)
        self.tokens = 0

    def run(self, dense: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens = dense.shape[0] * dense.shape[1]
        dense_middle = _mapped(lambda x: x + _attention(self.dense, x), dense)
        self._replace_attention(compressed, dense_middle)
        compressed = _mapped(lambda x: x + _attention(self.block, x), compressed)
        dense = _mapped(lambda x: x + _mlp(self.dense, x), dense_middle)
        if self.ranks["mlp.hidden"] == DENSE:
            self._replace_fc1(compressed, dense_middle)
        self._replace_fc2(compressed, dense)
        return dense, _mapped(lambda x: x + _mlp(self.block, x), compressed)

    def _replace_attention(self, stream: Tensor, dense_middle: Tensor) -> None:
        ranks = {part: self.ranks[f"attn.{part}"] for part in ("qk", "vo")}
        if all(rank == DENSE for rank in ranks.values()):
            return
        attn, head_dim = self.dense.attn, self.dense.attn.head_dim
        ranks = {part: head_dim if rank == DENSE else rank for part, rank in ranks.items()}
        weights = attention_weights(attn)
        replacement = low_rank_class(attn, "A").like(attn, ranks["qk"], ranks["vo"]).eval()
        statistics = self._score_statistics(stream)
        replacement.set_scores_(factorize_scores(
            weights.wq, weights.bq, weights.wk, attn.scale, statistics, shrinkage=self.shrinkage))
        statistics = self._value_statistics(stream, replacement, statistics)
        values = factorize_values(weights.wv, weights.bv, weights.wo, weights.bo, statistics,
                                  shrinkage=self.shrinkage)
        replacement.set_values_(values)
        self.block.attn = replacement
        self._refit_output(stream, dense_middle)

    def _score_statistics(self, stream: Tensor) -> AttentionStatistics:
        inputs, keys = Moments(), Moments()
        for x in _batches(stream):
            x = self.dense.norm1(x)
            inputs.add(x.flatten(0, 1))
            keys.add((x - x.mean(1, keepdim=True)).flatten(0, 1))
        none = inputs.mean.new_zeros(0)
        return AttentionStatistics(inputs.mean, inputs.covariance, keys.products / keys.count,
                                   none, none, inputs.count)

    def _value_statistics(self, stream: Tensor, replacement: LowRankAttention,
                          statistics: AttentionStatistics) -> AttentionStatistics:
        values, stride = Moments(), row_stride(self.tokens, stream.shape[-1])
        for x in _batches(stream):
            x = self.dense.norm1(x)
            averaged = replacement.average(x, x.unsqueeze(1), None)
            values.add(averaged.transpose(0, 1).flatten(1, 2)[:, ::stride])
        return statistics._replace(value_mean=values.mean, value_covariance=values.covariance)

    def _refit_output(self, stream: Tensor, dense_middle: Tensor) -> None:
        """The output projection of all heads at once, onto what the residual stream lacks."""
        attn, scale = self.block.attn, _layer_scale(self.block.ls1)
        regression = Regression(attn.wo, self.shrinkage, self.tokens)
        for x, target in zip(_batches(stream), _batches(dense_middle), strict=True):
            normed = self.block.norm1(x)
            values = attn._heads(nn.functional.linear(normed, attn.wv))
            heads = attn.average(normed, values, None).transpose(1, 2).flatten(2)
            regression.add(heads, (target - x) / scale)
        weight, bias = regression.solve_dense()
        attn.wo.copy_(weight)
        attn.bo.copy_(bias)

    def _replace_fc1(self, stream: Tensor, dense_middle: Tensor) -> None:
        rank, fc1 = self.ranks["mlp.fc1"], self.dense.mlp.fc1
        if rank == DENSE:
            return
        regression = Regression(fc1.weight, self.shrinkage, self.tokens)
        for x, dense in zip(_batches(stream), _batches(dense_middle), strict=True):
            regression.add(self.block.norm2(x), fc1(self.dense.norm2(dense)))
        self.block.mlp.fc1 = _low_rank(fc1, rank, *regression.solve(rank))

    def _replace_fc2(self, stream: Tensor, dense: Tensor) -> None:
        """Onto the dense stream after the block, in the metric of the stream."""
        rank, fc2, mlp = self.ranks["mlp.fc2"], self.dense.mlp.fc2, self.block.mlp
        scale = _layer_scale(self.block.ls2)
        regression = Regression(scale.unsqueeze(1) * fc2.weight, self.shrinkage, self.tokens)
        for x, target in zip(_batches(stream), _batches(dense), strict=True):
            regression.add(mlp.act(mlp.fc1(self.block.norm2(x))), target - x)
        if self.ranks["mlp.hidden"] != DENSE:
            self.block.mlp = _narrowed(mlp, scale, regression, self.ranks["mlp.hidden"])
            return
        if rank == DENSE:
            weight, bias = regression.solve_dense()
            mlp.fc2.weight.copy_(weight / scale.unsqueeze(1))
            if mlp.fc2.bias is not None:
                mlp.fc2.bias.copy_(bias / scale)
            return
        v, u, bias = regression.solve(rank)
        mlp.fc2 = _low_rank(fc2, rank, v, u / scale.unsqueeze(1), bias / scale)


def _attention(block: Block, x: Tensor) -> Tensor:
    return block.ls1(block.attn(block.norm1(x)))


def _mlp(block: Block, x: Tensor) -> Tensor:
    return block.ls2(block.mlp(block.norm2(x)))


def _layer_scale(module: nn.Module) -> Tensor:
    gamma = module.gamma.detach() if isinstance(module, LayerScale) else torch.ones(1)
    return torch.where(gamma.abs() < 1e-8, torch.full_like(gamma, 1e-8), gamma)


def _narrowed(mlp: Mlp, scale: Tensor, regression: Regression, width: int) -> Mlp:
    """The neurons that the regression's weight, in the metric of the stream, can spare the least.

    What the others did is refitted first, with little shrinkage; the drift then as everywhere.
    """
    covariance, dense = regression.inputs.covariance, regression.weight
    order, _ = eliminate(dense, shrink(covariance, REFIT_SHRINKAGE))
    kept = order[:width].sort().values
    base = refitted(dense, covariance, kept)
    weight, bias = regression.narrowed(kept, base).solve_dense()
    return prune_mlp(mlp, kept, weight / scale.unsqueeze(1), bias / scale)


def _low_rank(linear: nn.Linear, rank: int, v: Tensor, u: Tensor, bias: Tensor) -> LowRankLinear:
    module = LowRankLinear.like(linear, rank).eval()
    module.v.copy_(v)
    module.u.copy_(u)
    if module.bias is not None:
        module.bias.copy_(bias)
    return module


def _batches(stream: Tensor) -> tuple[Tensor, ...]:
    return stream.split(BATCH)


def _mapped(function: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
    return torch.cat([function(x) for x in _batches(stream)])


def _streams(model: VisionTransformer, calibration: Tensor | Iterable) -> Tensor:
    """The tokens that enter the first block."""
    def embed(images: Tensor) -> Tensor:
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    return torch.cat([embed(images) for images in calibration_batches(calibration, model)])


@torch.no_grad()
def compress_blocks_(model: VisionTransformer, plan: RankPlan, calibration: Tensor | Iterable,
                     shrinkage: float) -> None:
    """Replace every site inside the blocks, first block to last."""
    with evaluating(model):
        dense = compressed = _streams(model, calibration)
        for index in progress(range(len(model.blocks)), "compressing"):
            prefix = f"blocks.{index}."
            ranks = {part: plan[prefix + part]
                     for part in ("attn.qk", "attn.vo", "mlp.fc1", "mlp.fc2", "mlp.hidden")}
            job = BlockCompression(model.blocks[index], ranks, shrinkage)
            dense, compressed = job.run(dense, compressed)
            model.blocks[index] = job.block
