"""Rank search: the gated supernet against explicit mixtures, plans."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adacomcat.convert.calibrate import calibrate
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import build_skeleton
from adacomcat.cost import model_params, plan_params
from adacomcat.distill.config import MLP
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search import (
    RankGates,
    RankSearch,
    SearchConfig,
    build_supernet,
    explicit_plan,
    finalize,
    mixture,
    reachable_multiple,
    set_ranks_,
    uniform_plan,
)
from adacomcat.search.search import budget_loss
from adacomcat.search.supernet import GatedAttention, GatedLinear, GatedMlp
from adacomcat.sites import DENSE, Site, find_sites, prunable_mlps
from adacomcat.utils.distributed import Processes
from adacomcat.utils.random import derived_generator

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2,
                                "num_heads": 2, "num_classes": 5})
MODELS = {
    "vit": VIT,
    "qk_norm": (VIT[0], VIT[1] | {"qk_norm": True}),
    "rope": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "depth": 2,
                                        "num_heads": 2, "num_classes": 5}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1), "embed_dim": 32,
                                              "num_heads": (2, 4), "num_classes": 5}),
}


def make_model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    entry, arguments = MODELS[name]
    model = timm.create_model(entry, **arguments).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms that are neither zero nor one
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def images(name: str, count: int) -> Tensor:
    size = MODELS[name][1]["img_size"]
    return torch.randn(count, 3, size, size)


def make_sites(model: nn.Module, mlp: str = "ranks") -> list[Site]:
    return find_sites(model, prunable_mlps(model) if mlp == "neurons" else ())


def make_supernet(name: str, dtype: torch.dtype = torch.float32,
                  mlp: str = "ranks") -> tuple[nn.Module, nn.Module]:
    """(dense model, calibrated supernet)."""
    model = make_model(name)
    sites = make_sites(model, mlp)
    factors = factorize_model(model, calibrate(model, images(name, 24)), sites=sites)
    return model.to(dtype), build_supernet(model, factors, sites).to(dtype)


class MixedLinear(nn.Module):
    """Σ_i m_i (x W_iᵀ + b_i), every candidate an explicit dense matrix."""

    def __init__(self, source: GatedLinear, ranks: list[int]) -> None:
        super().__init__()
        self.source, self.ranks = source, ranks
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        source, total = self.source, 0.0
        full = source.u @ source.v.T
        for m, rank in zip(self.weights, self.ranks, strict=False):
            weight = source.u[:, :rank] @ source.v[:, :rank].T
            y = x @ weight.T
            if source.bias is not None:
                y = y + source.bias + (full - weight) @ source.mean
            total = total + m * y
        return total


class MixedAttention(nn.Module):
    """Softmax over Σ_i m_i logits_i, values mixed likewise, with explicit d × d candidates."""

    def __init__(self, source: GatedAttention, ranks_qk: list[int], ranks_vo: list[int]) -> None:
        super().__init__()
        self.source, self.ranks_qk, self.ranks_vo = source, ranks_qk, ranks_vo
        self.weights_qk: Tensor | None = None
        self.weights_vo: Tensor | None = None

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        full, heads = self.source.full, self.source.full.num_heads
        ones = torch.ones_like(x[..., :1])
        out = full.bo.clone()
        for head in range(heads):
            wq, bq, wk = (getattr(full, n).unflatten(0, (heads, -1))[head]
                          for n in ("wq", "bq", "wk"))
            wv = full.wv.unflatten(0, (heads, -1))[head]
            wo = full.wo.unflatten(1, (heads, -1))[:, head]
            mixed_m = sum(m * torch.cat([wq[:r], bq[:r, None]], 1).T @ wk[:r]
                          for m, r in zip(self.weights_qk, self.ranks_qk, strict=False))
            logits = torch.cat([x, ones], -1) @ mixed_m @ x.transpose(1, 2) * full.scale
            mixed_vo = sum(m * wo[:, :r] @ wv[:r]
                           for m, r in zip(self.weights_vo, self.ranks_vo, strict=False))
            lost = (wo @ wv - mixed_vo) @ self.source.mean[head]
            out = out + logits.softmax(-1) @ x @ mixed_vo.T + lost
        return out


def explicit_mixture(supernet: nn.Module, gates: RankGates, mixed: Tensor) -> nn.Module:
    reference = copy.deepcopy(supernet)
    rows = {site.name: (mixed[row], [site.full_rank if rank == DENSE else rank
                                     for rank in gates.candidates[row]])
            for row, site in enumerate(gates.sites)}
    for name, module in list(reference.named_modules()):
        if isinstance(module, GatedLinear):
            weights, ranks = rows[name]
            linear = MixedLinear(module, ranks)
            linear.weights = weights
            reference.set_submodule(name, linear)
        elif isinstance(module, GatedAttention):
            (qk, ranks_qk), (vo, ranks_vo) = rows[f"{name}.qk"], rows[f"{name}.vo"]
            attention = MixedAttention(module, ranks_qk, ranks_vo)
            attention.weights_qk, attention.weights_vo = qk, vo
            reference.set_submodule(name, attention)
    return reference


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_supernet_is_the_mixture_of_dense_candidates(dtype: torch.dtype, tolerance: float) -> None:
    _, supernet = make_supernet("vit", dtype)
    gates = RankGates(find_sites(make_model("vit"))).to(dtype)
    gates.logits.data.normal_()
    x, labels = images("vit", 6).to(dtype), torch.randint(5, (6,))
    results = []
    for gated in (True, False):
        mixed = gates.sample(0.7, derived_generator(3))
        if gated:
            with mixture(supernet, gates.gates(mixed)):
                logits = supernet(x)
        else:
            logits = explicit_mixture(supernet, gates, mixed)(x)
        gradient, = torch.autograd.grad(F.cross_entropy(logits, labels), gates.logits)
        results.append((logits, gradient))
    (logits, gradient), (expected, expected_gradient) = results
    assert gradient.abs().max() > 1e-5
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mlp", MLP)
@pytest.mark.parametrize("name", MODELS)
def test_full_ranks_compute_the_dense_model(name: str, mlp: str) -> None:
    model, supernet = make_supernet(name, torch.float64, mlp)
    x = images(name, 3).double()
    torch.testing.assert_close(supernet(x), model(x), rtol=1e-5, atol=1e-5)  # factors in fp32


@pytest.mark.parametrize("mlp", MLP)
@pytest.mark.parametrize("name", MODELS)
def test_finalized_model_computes_the_same_and_loads_strictly(name: str, mlp: str) -> None:
    model, supernet = make_supernet(name, mlp=mlp)
    sites = make_sites(model, mlp)
    gates = RankGates(sites, 4)
    chosen = torch.randint(10_000, (len(sites),), generator=torch.Generator().manual_seed(1))
    plan = RankPlan({site.name: ranks[index % len(ranks)] for site, ranks, index
                     in zip(sites, gates.candidates, chosen.tolist(), strict=True)})
    set_ranks_(supernet, plan)
    x = images(name, 3)
    expected = supernet(x)
    final = finalize(supernet, plan)
    torch.testing.assert_close(final(x), expected, rtol=1e-4, atol=1e-5)
    gated = GatedLinear | GatedAttention | GatedMlp
    assert not any(isinstance(module, gated) for module in final.modules())
    assert final.rank_plan.ranks == plan.ranks
    assert model_params(final) == plan_params(model, final.rank_plan)
    skeleton = build_skeleton(make_model(name, seed=1), final.rank_plan)
    skeleton.load_state_dict(final.state_dict(), strict=True)
    torch.testing.assert_close(skeleton(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mlp", MLP)
@pytest.mark.parametrize("name", MODELS)
def test_what_was_frozen_is_frozen_in_the_supernet_and_after(name: str, mlp: str) -> None:
    model = make_model(name).requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    for parameter in model.parameters():
        parameter.lr_scale = 0.5
    sites = make_sites(model, mlp)
    factors = factorize_model(model, calibrate(model, images(name, 24)), sites=sites)
    supernet = build_supernet(model, factors, sites)
    low = RankPlan({site.name: min(5, site.full_rank) for site in sites})
    for plan in (RankPlan.dense(model), low):
        final = finalize(supernet, explicit_plan(plan, sites))
        for made in (supernet, final):
            for parameter_name, parameter in made.named_parameters():
                assert parameter.requires_grad == parameter_name.startswith("head"), parameter_name
                assert parameter.lr_scale == 0.5, parameter_name


def test_one_hot_gates_equal_cut_ranks_and_cut_columns_get_no_gradient() -> None:
    model, supernet = make_supernet("vit")
    sites = find_sites(model)
    gates = RankGates(sites)
    plan = RankPlan({site.name: ranks[0] for site, ranks in
                     zip(sites, gates.candidates, strict=True)})
    one_hot = torch.zeros_like(gates.logits)
    one_hot[:, 0] = 1
    x = images("vit", 4)
    with mixture(supernet, gates.gates(one_hot)):
        gated = supernet(x)
    set_ranks_(supernet, plan)
    torch.testing.assert_close(supernet(x), gated, rtol=1e-5, atol=1e-5)
    supernet(x).square().sum().backward()
    fc1, rank = supernet.blocks[0].mlp.fc1, plan["blocks.0.mlp.fc1"]
    assert fc1.v.grad[:, :rank].abs().min() > 0 and fc1.v.grad[:, rank:].abs().max() == 0
    wo = supernet.blocks[1].attn.full.wo.grad.unflatten(1, (2, -1))
    assert wo[..., :8].abs().max() > 0 and wo[..., 8:].abs().max() == 0


@pytest.mark.parametrize("mlp", MLP)
def test_ranks_may_rise_again(mlp: str) -> None:
    model, supernet = make_supernet("vit", mlp=mlp)
    sites = make_sites(model, mlp)
    x = images("vit", 2)
    before = supernet(x)
    set_ranks_(supernet, uniform_plan(sites, 0, 8))
    assert (supernet(x) - before).abs().max() > 1e-3
    set_ranks_(supernet, explicit_plan(RankPlan.dense(model), sites))
    torch.testing.assert_close(supernet(x), before, rtol=0, atol=0)


def test_expected_params_are_the_mean_of_the_candidates() -> None:
    sites = find_sites(make_model("vit"))
    gates = RankGates(sites)
    gates.logits.data.normal_()
    mixed = gates.sample(1.3, derived_generator(5))
    expected = sum(float(m) * site.params(rank) for site, ranks, row in
                   zip(sites, gates.candidates, mixed.tolist(), strict=True)
                   for m, rank in zip(row, ranks, strict=False))
    assert gates.expected_params(mixed).item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(mixed.sum(1), torch.ones(len(sites)))


@settings(max_examples=25, deadline=None)
@given(keep=st.floats(0.2, 1.0), seed=st.integers(0, 10_000))
def test_the_plan_meets_the_budget_and_leaves_no_room_for_more(keep: float, seed: int) -> None:
    sites = make_sites(_SHARED, MLP[seed % 2])
    budget = keep * sum(site.dense_params for site in sites)
    gates = RankGates(sites, reachable_multiple(sites, budget))
    gates.logits.data.normal_(generator=torch.Generator().manual_seed(seed))
    plan = gates.plan(budget)
    spent = plan.params(sites)
    assert spent <= budget
    for site, ranks in zip(sites, gates.candidates, strict=True):
        dearer = [site.params(rank) for rank in ranks
                  if site.params(rank) > site.params(plan[site.name])]
        assert all(spent - site.params(plan[site.name]) + cost > budget for cost in dearer)


_SHARED = make_model("vit")


def test_without_a_budget_in_the_way_the_likeliest_candidates_win() -> None:
    sites = find_sites(_SHARED)
    gates = RankGates(sites)
    start = gates.plan(0.6 * sum(site.dense_params for site in sites))
    gates.start_at_(start)
    assert gates.plan(start.params(sites)).ranks == start.ranks


def test_an_unreachable_budget_says_the_least() -> None:
    sites = find_sites(_SHARED)
    with pytest.raises(UserError, match="at least"):
        reachable_multiple(sites, 10)


@pytest.mark.parametrize("beta", [0.0, 1.5])
@pytest.mark.parametrize("params", [80.0, 100.0, 150.0])
def test_budget_loss(beta: float, params: float) -> None:
    loss = budget_loss(torch.tensor(2.0), torch.tensor(params), 100.0, beta)
    assert loss.item() == pytest.approx(2.0 * max(1.0, params / 100.0) ** beta)


@pytest.mark.parametrize("per, count, epoch, expected", [
    ("epoch", 0, 1, 5.0), ("epoch", 7, 5, 0.1), ("epoch", 0, 3, 0.5 ** 0.5),
    ("search", 0, 4, 5.0), ("search", 2, 3, 5 * 0.02 ** (2 / 5)), ("search", 9, 5, 0.1)])
def test_temperature_falls_geometrically(per: str, count: int, epoch: int,
                                         expected: float) -> None:
    search = make_search(SearchConfig(tau_per=per))
    search.count = count
    assert search.temperature(epoch, 5) == pytest.approx(expected)


def make_search(config: SearchConfig, keep: float = 0.4, mlp: str = "ranks") -> RankSearch:
    model, supernet = make_supernet("vit", mlp=mlp)
    sites = make_sites(model, mlp)
    whole = model_params(model)
    fixed = whole - sum(site.dense_params for site in sites)
    multiple = reachable_multiple(sites, keep * whole - fixed)
    gates = RankGates(sites, multiple)
    plan = uniform_plan(sites, keep * whole - fixed, multiple)
    gates.start_at_(plan)
    return RankSearch(supernet, sites, gates, plan, config, target=keep * whole, fixed=fixed)


def test_a_search_moves_the_ranks_within_the_budget_and_leaves_the_weights() -> None:
    search = make_search(SearchConfig(alpha_lr=0.5, confirm=False), keep=0.6)
    before = copy.deepcopy(search.supernet.state_dict())
    labels = torch.arange(8) % 5
    batches = [(images("vit", 8), labels) for _ in range(6)]
    report = search.run(batches, epoch=1, epochs=3, seed=0, processes=Processes())
    assert report["changed"] > 0
    assert search.fixed + search.plan.params(search.sites) <= search.target
    for name, tensor in search.supernet.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in search.supernet.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_is_adopted_only_where_held_out_images_like_it_better(seed: int) -> None:
    torch.manual_seed(seed)
    batches = [(images("vit", 8), torch.randint(5, (8,))) for _ in range(4)]
    proposal = make_search(SearchConfig(alpha_lr=0.5, confirm=False), keep=0.6)
    losses = []
    for again in range(2):
        with torch.no_grad():
            losses.append(sum(F.cross_entropy(proposal.supernet(x), labels).item()
                              for x, labels in batches))
        if not again:
            start = proposal.plan
            proposal.run(batches, epoch=1, epochs=3, seed=seed, processes=Processes())
    assert proposal.plan != start
    search = make_search(SearchConfig(alpha_lr=0.5), keep=0.6)
    report = search.run(batches, epoch=1, epochs=3, seed=seed, processes=Processes())
    assert report["rejected"] == (losses[1] >= losses[0])
    assert search.plan == (start if report["rejected"] else proposal.plan)
    before = search.supernet.blocks[0].mlp.fc1.active
    assert before == search.numeric(search.plan)[2]


@pytest.mark.parametrize("mlp", MLP)
def test_search_state_goes_on_exactly(mlp: str) -> None:
    torch.manual_seed(11)
    batches = [(images("vit", 8), torch.arange(8) % 5) for _ in range(4)]

    def searched(search: RankSearch, epoch: int) -> RankSearch:
        search.run(batches, epoch=epoch, epochs=3, seed=0, processes=Processes())
        return search

    config = SearchConfig(alpha_lr=0.2)
    through = searched(make_search(config, mlp=mlp), 1)
    state = copy.deepcopy(through.state_dict())
    searched(through, 2)
    resumed = make_search(config, mlp=mlp)
    resumed.load_state_dict(state)
    searched(resumed, 2)
    assert torch.equal(resumed.gates.logits, through.gates.logits)
    assert resumed.plan.ranks == through.plan.ranks
    assert resumed.policy.state_dict() == through.policy.state_dict()
