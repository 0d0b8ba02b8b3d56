"""Compression block by block: inputs from the compressed prefix, targets from the dense model.

Each block repairs the drift of those before it: the output projections are regressed onto
(dense residual stream after the sublayer - compressed stream before it). Every regression is
shrunk towards the dense weights, for calibration knows only the directions that it saw.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import BATCH
from adacomcat.convert.moments import (
    AveragedTokens,
    TokenMoments,
    at_least_float32,
    averaged_values,
)
from adacomcat.convert.regression import Regression
from adacomcat.factorize.factors import AttentionStatistics, factorize_scores, factorize_values
from adacomcat.factorize.linalg import shrink
from adacomcat.factorize.neurons import REFIT_SHRINKAGE, eliminate, exchange, refitted
from adacomcat.layers.attention import LowRankAttention, low_rank_class
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import prune_mlp
from adacomcat.layers.registry import (
    BlockParts,
    EncoderParts,
    Residual,
    attention_tier,
    attention_weights,
    block_parts,
    encoder_parts,
    mlp_parts,
)
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank
from adacomcat.utils.model import copied, evaluating, replace_
from adacomcat.utils.progress import progress


def sequential_blocks(model: nn.Module) -> bool:
    """Whether this model's blocks are known exactly, so that they can go one after the other."""
    return sequential_encoder(model) is not None


def sequential_encoder(model: nn.Module) -> EncoderParts | None:
    """The parts of such a model; None for others."""
    encoder = encoder_parts(model)
    fits = encoder is not None and all(_sequential(block) for block in encoder.blocks)
    return encoder if fits else None


def in_sequence(model: nn.Module) -> tuple[str, ...]:
    """How the names of all sites begin that are fitted in sequence."""
    encoder = sequential_encoder(model)
    return () if encoder is None else (f"{encoder.name}.",)


def _sequential(block: nn.Module) -> bool:
    """A known block of a tier-A attention and a plain MLP."""
    parts = block_parts(block)
    if parts is None or attention_tier(parts.attn.inner) != "A":
        return False
    mlp = mlp_parts(parts.mlp.inner)
    return mlp is not None and mlp.dense


class BlockCompression:
    """One block: dense and compressed residual streams in, both streams out, layers replaced.

    Args:
        block: The dense block; a copy of it is compressed, and lies in ``block`` after ``run``.
        ranks: Kind of site ('qk', 'vo', 'fc1', 'fc2', 'hidden') → rank.
        shrinkage: Ridge of every whitening covariance, relative to its mean diagonal.
    """

    def __init__(self, block: nn.Module, ranks: dict[str, Rank], shrinkage: float) -> None:
        self.dense, self.ranks, self.shrinkage = _parts(block), ranks, shrinkage
        self.block = copied(block)
        self.tokens = 0

    @property
    def compressed(self) -> BlockParts:
        return _parts(self.block)

    def run(self, dense: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens = dense.shape[0] * dense.shape[1]
        dense_middle = _added(self.dense.attn, dense)
        compressed = self._replace_attention(compressed, dense_middle)
        dense = _added(self.dense.mlp, dense_middle)
        if self.ranks["hidden"] == DENSE:
            self._replace_fc1(compressed, dense_middle)
        self._replace_fc2(compressed, dense)
        return dense, _added(self.compressed.mlp, compressed)

    def _replace_attention(self, stream: Tensor, dense_middle: Tensor) -> Tensor:
        """Returns the compressed stream behind the attention.

        Values are averaged once, dense, with the probabilities of the low-rank scores. Those of
        any rank are linear maps of them, and so are the sums that fit the output projection.
        """
        if self.ranks["qk"] == self.ranks["vo"] == DENSE:
            return _added(self.compressed.attn, stream)
        attn = self.dense.attn.inner
        weights = attention_weights(attn)
        rank_qk, rank_vo = (weights.wq.shape[1] if rank == DENSE else rank
                            for rank in (self.ranks["qk"], self.ranks["vo"]))
        replacement = low_rank_class(attn, "A").like(attn, rank_qk, rank_vo).eval()
        statistics = self._score_statistics(stream)
        replacement.set_scores_(factorize_scores(
            weights.wq, weights.bq, weights.wk, weights.scale, statistics,
            shrinkage=self.shrinkage))
        averaged, fit, tokens = self._average(replacement, weights.wv, stream, dense_middle)
        statistics = statistics._replace(
            value_mean=tokens.mean(fit.inputs.mean), value_covariance=fit.inputs.covariance,
            value_variance=tokens.variance)
        replacement.set_values_(factorize_values(
            weights.wv, weights.bv, weights.wo, weights.bo, statistics, shrinkage=self.shrinkage))
        mixing = _mixing(replacement.wv, weights.wv)
        weight, bias = fit.on_mapped(mixing, replacement.wo).solve_dense()
        replacement.wo.copy_(weight)
        replacement.bo.copy_(bias)
        replace_(self.block, self.dense.attn.name, replacement)
        output = (weight @ mixing).to(stream.dtype)
        scale = self.compressed.attn.scale
        return torch.cat([
            x + scale(nn.functional.linear(values, output, replacement.bo))
            for x, values in zip(_batches(stream), _batches(averaged), strict=True)])

    def _score_statistics(self, stream: Tensor) -> AttentionStatistics:
        moments = TokenMoments()
        for x in _batches(stream):
            moments.add(self.dense.attn.norm(x))
        mean, covariance = moments.tokens.mean, moments.tokens.covariance
        none = mean.new_zeros(0)
        return AttentionStatistics(mean, covariance, moments.key_covariance(covariance), none, none,
                                   none, moments.tokens.count)

    def _average(self, attn: LowRankAttention, wv: Tensor, stream: Tensor,
                 dense_middle: Tensor) -> tuple[Tensor, Regression, AveragedTokens]:
        """(averaged dense values (B, N, H·r), the regression on them of what the residual stream
        lacks, moments of the averaged tokens)."""
        part, found = self.dense.attn, []
        scale = _layer_scale(part, stream)
        zeros = wv.new_zeros(stream.shape[-1], len(wv) * wv.shape[1])
        fit, tokens = Regression(zeros, self.shrinkage, self.tokens), AveragedTokens(wv)
        for x, target in zip(_batches(stream), _batches(dense_middle), strict=True):
            normed = part.norm(x)
            averaged = averaged_values(attn, normed, wv, (None, None))
            fit.add(averaged, (target - x) / scale)
            tokens.add(attn, normed, (None, None))
            found.append(averaged)
        return torch.cat(found), fit, tokens

    def _replace_fc1(self, stream: Tensor, dense_middle: Tensor) -> None:
        rank, fc1 = self.ranks["fc1"], _linears(self.dense.mlp)[0]
        if rank == DENSE:
            return
        regression = Regression(fc1.weight, self.shrinkage, self.tokens)
        part = self.compressed.mlp
        for x, dense in zip(_batches(stream), _batches(dense_middle), strict=True):
            regression.add(part.norm(x), fc1(self.dense.mlp.norm(dense)))
        part.inner.fc1 = _low_rank(fc1, rank, *regression.solve(rank))

    def _replace_fc2(self, stream: Tensor, dense: Tensor) -> None:
        """Onto the dense stream after the block, in the metric of the stream."""
        rank, part = self.ranks["fc2"], self.compressed.mlp
        fc2, mlp = _linears(self.dense.mlp)[1], mlp_parts(part.inner)
        assert mlp is not None
        scale = _layer_scale(part, stream)
        regression = Regression(scale.unsqueeze(1) * fc2.weight, self.shrinkage, self.tokens)
        for x, target in zip(_batches(stream), _batches(dense), strict=True):
            regression.add(mlp.act(mlp.fc1(part.norm(x))), target - x)
        if (width := self.ranks["hidden"]) != DENSE:
            pruned = _pruned(part, scale, regression, width)
            replace_(self.block, part.name, pruned)
        elif rank == DENSE:
            weight, bias = regression.solve_dense()
            kept = _linears(part)[1]
            kept.weight.copy_(weight / scale.unsqueeze(1))
            if kept.bias is not None:
                kept.bias.copy_(bias / scale)
        else:
            v, u, bias = regression.solve(rank)
            part.inner.fc2 = _low_rank(fc2, rank, v, u / scale.unsqueeze(1), bias / scale)


def _mixing(cut: Tensor, wv: Tensor) -> Tensor:
    """(H·n, H·r), block by block T_h with cut_h = T_h wv_h, for cut (H·n, d) and wv (H, r, d)."""
    wv = wv.double()
    found = cut.double().unflatten(0, (len(wv), -1)) @ wv.mT
    return torch.block_diag(*(found @ torch.linalg.pinv(wv @ wv.mT, hermitian=True)))


def _parts(block: nn.Module) -> BlockParts:
    parts = block_parts(block)
    assert parts is not None, "sequential_blocks admits known blocks only"
    return parts


def _linears(part: Residual) -> tuple[nn.Linear, nn.Linear]:
    """fc1 and fc2; those of the compressed block only while they are dense."""
    mlp = mlp_parts(part.inner)
    assert mlp is not None, "sequential_blocks admits known MLPs only"
    return mlp.linears


def _added(part: Residual, stream: Tensor) -> Tensor:
    """x + scale(inner(norm(x)))"""
    return _mapped(lambda x: x + part.scale(part.run(part.inner, part.norm(x))), stream)


def _layer_scale(part: Residual, stream: Tensor) -> Tensor:
    """(d,) on the stream's device, away from zero: it is divided by."""
    gamma = stream.new_ones(stream.shape[-1]) if part.gamma is None else part.gamma
    gamma = at_least_float32(gamma)
    return torch.where(gamma.abs() < 1e-8, torch.full_like(gamma, 1e-8), gamma)


def _pruned(part: Residual, scale: Tensor, regression: Regression, width: int) -> nn.Module:
    """The MLP without the neurons that the regression's weight can spare the most easily.

    The metric is that of the stream. What the others did is refitted first, with little shrinkage;
    the drift then as everywhere.
    """
    covariance, dense = regression.inputs.covariance, regression.weight
    metric = shrink(covariance, REFIT_SHRINKAGE)
    order, _ = eliminate(dense, metric, width)
    kept = exchange(dense, metric, order[:width])
    base = refitted(dense, covariance, kept)
    weight, bias = regression.on_inputs(kept, base).solve_dense()
    return prune_mlp(part.inner, kept, weight / scale.unsqueeze(1), bias / scale)


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


@torch.no_grad()
def compress_blocks_(model: nn.Module, plan: RankPlan, batches: list[Tensor],
                     shrinkage: float) -> None:
    """In place: replace every site inside the blocks, first block to last.

    Two residual streams go through the blocks side by side: the dense model's, which gives the
    targets, and that of the blocks compressed so far, which gives the inputs.

    Args:
        model: A model for which ``sequential_blocks`` holds.
        plan: Ranks of the sites inside the blocks; other entries are not looked at.
        batches: Calibration images, from ``calibration_batches``.
        shrinkage: Ridge of every whitening covariance, relative to its mean diagonal.
    """
    encoder = sequential_encoder(model)
    assert encoder is not None, "ask sequential_blocks first"
    modes = [{name: module.training for name, module in block.named_modules()}
             for block in encoder.blocks]
    with evaluating(model):
        dense = compressed = torch.cat([encoder.tokens(images) for images in batches])
        for index in progress(range(len(encoder.blocks)), "compressing"):
            block = encoder.blocks[index]
            job = BlockCompression(block, _ranks(plan, f"{encoder.name}.{index}", block), shrinkage)
            dense, compressed = job.run(dense, compressed)
            encoder.blocks[index] = job.block
    for block, known in zip(encoder.blocks, modes, strict=True):
        _set_modes(block, known)


def _set_modes(block: nn.Module, modes: dict[str, bool]) -> None:
    """The modes of the dense block's modules, by name; new modules have that of their holder."""
    for name, module in block.named_modules():
        module.training = modes.setdefault(name, modes.get(name.rpartition(".")[0], False))


def _ranks(plan: RankPlan, name: str, block: nn.Module) -> dict[str, Rank]:
    """Kind → rank of the sites inside the block ``name``."""
    parts = _parts(block)
    kinds = [(parts.attn, "qk"), (parts.attn, "vo"),
             (parts.mlp, "fc1"), (parts.mlp, "fc2"), (parts.mlp, "hidden")]
    return {kind: plan[f"{name}.{part.name}.{kind}"] for part, kind in kinds}
