"""What a model costs, counted: parameters and multiply-accumulates."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from adacomcat.layers.attention import LowRankAttention
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import LowRankMlp
from adacomcat.moved import forward
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site, find_sites
from adacomcat.utils.model import evaluating, input_size


def model_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def plan_params(model: nn.Module, plan: RankPlan) -> int:
    """Parameters that ``model`` will have under ``plan``."""
    sites = plan.sites(model)
    fixed = model_params(model) - sum(site.dense_params for site in sites)
    return fixed + plan.params(sites)


@torch.no_grad()
def module_tokens(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Module name → (rows that it sees for one image, rows that attend to each other)."""
    seen: dict[str, tuple[int, int]] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0]
            rows = x.numel() // x.shape[-1] + seen.get(name, (0, 0))[0]
            seen[name] = (rows, x.shape[-2] if x.ndim > 2 else 1)
        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True)
             for name in set(names)]
    parameter = next(model.parameters())
    try:
        with evaluating(model):
            model(torch.zeros(1, *input_size(model), device=parameter.device,
                              dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def site_macs(site: Site, rank: Rank, tokens: dict[str, tuple[int, int]]) -> int:
    return site.macs(rank, *tokens.get(site.module, (0, 0)))


def plan_macs(model: nn.Module, plan: RankPlan) -> int:
    """Multiply-accumulates of one image that ``model`` will have under ``plan``."""
    sites = plan.sites(model)
    tokens = module_tokens(model, (site.module for site in sites))
    return _patch_macs(model) + sum(site_macs(s, plan[s.name], tokens) for s in sites)


def model_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one image: patch embedding, projections and attention."""
    sites = find_sites(model)
    low_rank = {name: module for name, module in model.named_modules()
                if isinstance(module, LowRankLinear | LowRankMlp | LowRankAttention)}
    low_rank = {name: module for name, module in low_rank.items()  # an MLP counts its own linears
                if not isinstance(low_rank.get(name.rpartition(".")[0]), LowRankMlp)}
    tokens = module_tokens(model, [*(site.module for site in sites), *low_rank])
    dense = sum(site_macs(site, DENSE, tokens) for site in sites)
    return _patch_macs(model) + dense + sum(
        _low_rank_macs(module, *tokens.get(name, (0, 0))) for name, module in low_rank.items())


def _low_rank_macs(module: LowRankLinear | LowRankMlp | LowRankAttention, rows: int,
                   span: int) -> int:
    if isinstance(module, LowRankLinear):
        return rows * (module.v.numel() + module.u.numel())
    if isinstance(module, LowRankMlp):
        return _low_rank_macs(module.fc1, rows, span) + _low_rank_macs(module.fc2, rows, span)
    weights = sum(getattr(module, name).numel() for name in ("wq", "wk", "wv", "wo")
                  if hasattr(module, name))
    return rows * (weights + module.num_heads * (module.rank_qk + module.rank_vo) * span)


def _patch_macs(model: nn.Module) -> int:
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        return 0
    _, height, width = input_size(model)
    rows, columns = projection.stride
    return projection.weight.numel() * (height // rows) * (width // columns)


# Names that left this module; their old place works for one more release.
__getattr__ = forward(__name__, ("utils.model", "latency.timing"))
