"""What ComCAT's published search does in its own way, beside the gates and the supernet.

It trains without the attentions' biases, and trains them from zero once the ranks stand. Its
candidates are menus of ranks for each width, whose values are those of its code. Before every
search it multiplies the factors in force out and decomposes them again, so that ranks which were
cut do not come back with their weights.
"""

from typing import cast

import torch
from torch import Tensor, nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.search.supernet import GatedAttention, GatedLinear
from adacomcat.sites import Site

# Width → total ranks of an attention's heads, and ranks of a linear layer whose smaller side it is.
ATTENTION_MENUS = {192: (32, 64, 96, 128, 160), 384: (64, 128, 192, 256, 320),
                   768: (128, 192, 256, 320, 384, 448, 512)}
LINEAR_MENUS = {192: (6, 12, 24, 48, 64, 96, 128, 144),
                384: (12, 24, 32, 48, 64, 96, 128, 144, 192, 288),
                768: (24, 32, 48, 64, 128, 192, 256, 320, 384, 448, 512)}
MODEL_WIDTH = 384  # whose menus, as shares of the width, serve the widths that are not published


def menu(site: Site) -> tuple[int, ...]:
    """The ranks that ComCAT chooses from at ``site``, per head where it folds, ascending."""
    if site.folded:
        totals = _menu(ATTENTION_MENUS, site.in_features)
        ranks = {total // site.num_heads for total in totals}
    else:
        ranks = set(_menu(LINEAR_MENUS, min(site.in_features, site.out_features)))
    return tuple(sorted({min(max(1, rank), site.full_rank) for rank in ranks}))


def _menu(menus: dict[int, tuple[int, ...]], width: int) -> tuple[int, ...]:
    if width in menus:
        return menus[width]
    return tuple(rank * width // MODEL_WIDTH for rank in menus[MODEL_WIDTH])


@torch.no_grad()
def drop_attention_biases_(model: nn.Module, sites: list[Site]) -> None:
    """Zero the biases of q, k, v and proj, as ComCAT's published code leaves them out."""
    for name in {site.module for site in sites if site.kind != "linear"}:
        attention = model.get_submodule(name)
        for key, parameter in attention.named_parameters():
            if key.endswith(("qkv.bias", "proj.bias", "q_bias", "k_bias", "v_bias")):
                parameter.zero_()


def freeze_attention_biases_(supernet: nn.Module) -> None:
    """The biases that were dropped stay zero in training."""
    for parameter in _attention_biases(supernet):
        parameter.requires_grad_(False)


def free_attention_biases_(supernet: nn.Module) -> bool:
    """Train them again; whether any was frozen."""
    frozen = [parameter for parameter in _attention_biases(supernet)
              if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return bool(frozen)


def _attention_biases(model: nn.Module) -> list[nn.Parameter]:
    """Those of a supernet, or of a compressed model."""
    return [parameter for module in model.modules() if isinstance(module, LowRankAttention)
            for name, parameter in module.named_parameters()
            if name in ("bq", "bo", "q.bias", "k.bias")]


@torch.no_grad()
def decompose_anew_(supernet: nn.Module) -> None:
    """Every site's factors in force become the singular vectors of their own product.

    The first factor is orthonormal, as ComCAT leaves it, and the second one has the singular
    values, which are zero beyond the ranks in force.
    """
    for module in supernet.modules():
        if isinstance(module, GatedLinear):
            _linear_anew_(module)
        elif isinstance(module, GatedAttention):
            _attention_anew_(module)


def _linear_anew_(module: GatedLinear) -> None:
    rank = module.active
    bias = module._bias(rank)
    if module.bias is not None and bias is not None:
        module.bias.copy_(bias)
    v, u, _ = _anew(module.v[:, :rank], module.u[:, :rank], module.rank)
    module.v.copy_(v)
    module.u.copy_(u)


def _attention_anew_(module: GatedAttention) -> None:
    full, heads = module.full, module.full.num_heads
    values = module._values()
    full.bo.copy_(values.get("bo", full.bo))
    rank = module.active_vo
    wv = full.wv.unflatten(0, (heads, -1))[:, :rank].mT  # (H, d, r)
    wo = full.wo.unflatten(1, (heads, -1))[..., :rank].transpose(0, 1)  # (H, out, r)
    first, second, _ = _anew(wv, wo, module.rank_vo)
    full.wv.copy_(first.mT.flatten(0, 1))
    full.wo.copy_(second.transpose(0, 1).flatten(1))
    if not module.folds_scores:
        return
    rank = module.active_qk
    wq, wk = (part.unflatten(0, (heads, -1))[:, :rank].mT for part in (full.wq, full.wk))
    bq = full.bq.unflatten(0, (heads, -1))
    first, second, mixing = _anew(wq, wk, module.rank_qk)
    full.wq.copy_(first.mT.flatten(0, 1))
    full.wk.copy_(second.mT.flatten(0, 1))
    bias = torch.zeros_like(bq)
    bias[:, :rank] = (bq[:, None, :rank].double() @ mixing)[:, 0].to(bias)
    full.bq.copy_(bias.flatten())


def _anew(left: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """L and S with L Sᵀ = left rightᵀ, L orthonormal, S by falling singular values.

    Args:
        left: (..., m, r).
        right: (..., n, r).
        width: columns of L and S, at most m; those beyond r are zero in S.

    Returns:
        L (..., m, width), S (..., n, width) and A (..., r, r) with left A = L[..., :r].
    """
    rank = left.shape[-1]
    basis, upper = torch.linalg.qr(left.double(), mode="complete")
    other, triangle = torch.linalg.qr(right.double())
    upper = upper[..., :rank, :]
    inner, singular, transposed = torch.linalg.svd(upper @ triangle.mT, full_matrices=False)
    first = torch.cat([basis[..., :rank] @ inner, basis[..., rank:width]], -1)
    second = other @ (transposed.mT * singular.unsqueeze(-2))
    padding = second.new_zeros(*second.shape[:-1], width - rank)
    mixing = torch.linalg.pinv(upper) @ inner
    return (cast(Tensor, first).to(left.dtype), torch.cat([second, padding], -1).to(left.dtype),
            mixing)
