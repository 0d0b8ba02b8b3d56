"""Published methods without training, written from their formulas, at uniform ranks.

The first four replace every matrix W (out, in) by Ŵ = SVD_r(W C^½) C^-½, the best matrix of rank r
in the metric C of the inputs x (in). They differ in C only:

plain      C = I
ASVD       C = diag(E|x_j|): columns scaled by (E|x_j|)^α, α = ½ (Yuan et al. 2023,
           arXiv 2312.05821)
SVD-LLM    C = E[x xᵀ], truncation-aware whitening (Wang et al. 2024, arXiv 2403.07378)
AFM        C = Cov(x) and b̂ = b + (W - Ŵ) E[x]: the PCA of the outputs y = W x + b, since
           W Cov(x) Wᵀ = Cov(y) (Yu and Wu, "Compressing Transformers: Features Are Low-Rank, but
           Weights Are Not!", AAAI 2023)

ComCAT (Xiao et al. 2023, arXiv 2305.17235) truncates the products W_qᵀ W_k and W_o W_v of each head
instead of their four factors. In every method an MLP is two low-rank linear layers.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adacomcat.convert.calibrate import Statistics, calibration_batches
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import install_, join_mlps_
from adacomcat.convert.moments import Moments
from adacomcat.cost import model_params
from adacomcat.errors import UserError
from adacomcat.factorize.factors import LinearStatistics, factorize_linear
from adacomcat.layers.linear import LowRankLinear
from adacomcat.plan import RankPlan
from adacomcat.search.published import drop_attention_biases_
from adacomcat.sites import Site, find_sites
from adacomcat.utils.model import evaluating


class Inputs(NamedTuple):
    """Moments of the inputs of one linear layer, over all tokens."""

    mean: Tensor  # (in,)
    covariance: Tensor  # (in, in), centred
    magnitude: Tensor  # (in,) E|x_j|
    tokens: int


Metric = Callable[[Inputs], LinearStatistics]


def asvd_metric(inputs: Inputs) -> LinearStatistics:
    return _uncentred(torch.diag(inputs.magnitude), inputs)


def svd_llm_metric(inputs: Inputs) -> LinearStatistics:
    return _uncentred(inputs.covariance + torch.outer(inputs.mean, inputs.mean), inputs)


def afm_metric(inputs: Inputs) -> LinearStatistics:
    return LinearStatistics(inputs.mean, inputs.covariance, inputs.tokens)


def _uncentred(metric: Tensor, inputs: Inputs) -> LinearStatistics:
    """Statistics with the mean 0, for which ``factorize_linear`` leaves the bias as it is."""
    return LinearStatistics(torch.zeros_like(inputs.mean), metric, inputs.tokens)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the blocks: qkv, proj, fc1 and fc2."""
    head = classifier(model)
    return {name: module for name, module in model.named_modules()
            if type(module) is nn.Linear and module is not head}


def classifier(model: Any) -> nn.Module | None:
    return model.get_classifier() if hasattr(model, "get_classifier") else None


@torch.no_grad()
def collect_inputs(model: nn.Module, calibration: Tensor) -> dict[str, Inputs]:
    """Layer name → moments of its inputs, in one pass of the dense model."""
    moments = {name: Moments() for name in linears(model)}
    magnitudes: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].flatten(0, -2)
            moments[name].add(rows)
            magnitudes[name] = magnitudes.get(name, 0.0) + rows.abs().sum(0).double()
        return hook

    hooks = [linear.register_forward_pre_hook(watch(name))
             for name, linear in linears(model).items()]
    try:
        with evaluating(model):
            for images in calibration_batches(calibration, model):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Inputs(m.mean, m.covariance, magnitudes[name] / m.count, m.count)
            for name, m in moments.items() if m.count}


def matrix_sites(model: nn.Module) -> list[Site]:
    """One site for every matrix, those of the attentions included."""
    sites = []
    for name, linear in linears(model).items():
        bias = 0 if linear.bias is None else linear.out_features
        sites.append(Site(name, name, "linear", linear.in_features, linear.out_features,
                          dense_bias=bias, bias=bias))
    return sites


def joint_sites(model: nn.Module) -> list[Site]:
    """The sites of ``find_sites`` without the classifier: QK, VO, and each other matrix."""
    head = classifier(model)
    return [site for site in find_sites(model) if model.get_submodule(site.module) is not head]


def uniform_plan(model: nn.Module, sites: list[Site], keep: float) -> RankPlan:
    """⌊f · break-even⌋ at every site, with the largest f that ``keep`` of the parameters allows.

    Raises:
        UserError: rank 1 everywhere is already more than that.
    """
    whole = model_params(model)
    budget = keep * whole - whole + sum(site.dense_params for site in sites)
    fractions = sorted({rank / site.break_even for site in sites
                        for rank in range(1, 1 + int(site.break_even))})
    plan = None
    for fraction in fractions:
        larger = RankPlan({site.name: max(1, int(fraction * site.break_even + 1e-9))
                           for site in sites})
        if larger.params(sites) > budget:
            break
        plan = larger
    if plan is None:
        raise UserError(f"keep {keep:g} is below rank 1 everywhere; keep more")
    return plan


@torch.no_grad()
def cut_matrices(model: nn.Module, keep: float, metric: Metric | None = None,
                 inputs: dict[str, Inputs] | None = None) -> nn.Module:
    """A copy whose matrices are truncated one by one, in the ``metric`` of their ``inputs``.

    Without a metric the truncation is the plain SVD.
    """
    plan = uniform_plan(model, matrix_sites(model), keep)
    model = copy.deepcopy(model)
    for name, rank in plan.ranks.items():
        linear: Any = model.get_submodule(name)
        statistics = None if metric is None or inputs is None else metric(inputs[name])
        low_rank = LowRankLinear.like(linear, int(rank))
        low_rank.set_(factorize_linear(linear.weight, linear.bias, statistics))
        model.set_submodule(name, low_rank)
    join_mlps_(model)
    return model


def cut_products(model: nn.Module, keep: float, statistics: Statistics | None = None,
                 biases: bool = True) -> nn.Module:
    """A copy whose attentions are truncated head by head.

    ComCAT's published code drops the biases of the attentions: ``biases`` False.
    """
    sites = joint_sites(model)
    plan = uniform_plan(model, sites, keep)
    model = copy.deepcopy(model)
    if not biases:
        drop_attention_biases_(model, sites)
    return install_(model, plan, factorize_model(model, statistics, shrinkage=0.0, sites=sites))
