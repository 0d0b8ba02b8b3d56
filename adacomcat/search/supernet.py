"""A model that holds every rank at once: full nested factors, cut or gated at each forward pass.

All candidates of a site are prefixes of one decomposition, so the mixture Σ_i m_i (U_i V_iᵀ) over
candidate ranks r_i is U diag(g) Vᵀ with g_j = Σ_{i: r_i ≥ j} m_i: one pass at full rank. The
widths of an MLP are prefixes too, of its neurons in the order of their worth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from adacomcat import ops
from adacomcat.convert.factors import Factors
from adacomcat.convert.install import join_mlps_
from adacomcat.convert.record import record_
from adacomcat.factorize.factors import LinearFactors
from adacomcat.factorize.neurons import NeuronFactors
from adacomcat.layers.attention import LowRankAttention, low_rank_class
from adacomcat.layers.inherit import inherit_
from adacomcat.layers.linear import LowRankLinear
from adacomcat.layers.mlp import mlp_of_width, prune_mlp
from adacomcat.layers.registry import mlp_parts
from adacomcat.plan import RankPlan
from adacomcat.sites import DENSE, Rank, Site, find_sites
from adacomcat.utils.model import copied, replace_


class GatedLinear(LowRankLinear):
    """y = ((x V) ∘ g) Uᵀ + b + Σ_j (1 - g_j) u_j (v_j · mean), g of 0 and 1 or a mixture's gate.

    The last term is what a truncated bias absorbs, so the gate mixes truncated layers exactly.
    ``active`` is the rank where no gate is set; columns beyond it then get no gradient.
    """

    mean: Tensor  # (in,) of the inputs
    gate: Tensor | None  # (R,)

    def __init__(self, linear: nn.Linear, factors: LinearFactors) -> None:
        super().__init__(linear.in_features, linear.out_features, factors.v.shape[1],
                         linear.bias is not None, linear.weight.device, linear.weight.dtype)
        self.set_(factors)
        self.register_buffer("mean", factors.mean.to(linear.weight))
        inherit_(self, linear, {"v": linear.weight, "u": linear.weight, "bias": linear.bias})
        self.active, self.gate = self.rank, None
        self.train(linear.training)

    def factors_(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(v, u, bias) cut to the active rank."""
        rank = self.active
        return self.v[:, :rank], self.u[:, :rank], self._bias(rank)

    def _bias(self, rank: int) -> Tensor | None:
        if self.bias is None or rank == self.rank:
            return self.bias
        with torch.no_grad():
            lost = self.u[:, rank:] @ (self.mean @ self.v[:, rank:])
        return self.bias + lost

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return ops.low_rank_linear(x, *self.factors_())
        bias = self.bias
        if bias is not None:
            bias = bias + self.u @ ((1 - self.gate) * (self.mean @ self.v))
        return ops.gated_low_rank_linear(x, self.v, self.gate, self.u, bias)

    @torch.no_grad()
    def finalized(self, rank: Rank) -> nn.Module:
        """The compressed layer at this rank; 'dense' multiplies the factors out."""
        if rank == DENSE:
            return self.to_linear()
        bias = self._bias(rank)
        module = LowRankLinear(self.in_features, self.out_features, rank, bias is not None,
                               self.v.device, self.v.dtype)
        module.v.copy_(self.v[:, :rank])
        module.u.copy_(self.u[:, :rank])
        if module.bias is not None and bias is not None:
            module.bias.copy_(bias)
        inherit_(module, self, dict(self.named_parameters()))
        return module.train(self.training)


class GatedAttention(nn.Module):
    """A folded attention of full rank per head, run with cut or gated factors.

    ``full`` decides what the call means (masks, windows, rotary embeddings); only its factors are
    exchanged. Gates scale the rows of queries and values; bo takes up what value ranks lose.
    """

    mean: Tensor  # (H, d) of what each head averages
    gate_qk: Tensor | None  # (R,)
    gate_vo: Tensor | None  # (R,)

    def __init__(self, full: LowRankAttention, value_mean: Tensor) -> None:
        super().__init__()
        self.full = full
        self.register_buffer("mean", value_mean.to(full.wv))  # (H, d)
        self.rank_qk, self.rank_vo = full.rank_qk, full.rank_vo
        self.active_qk, self.active_vo = self.rank_qk, self.rank_vo
        self.gate_qk = self.gate_vo = None

    @property
    def folds_scores(self) -> bool:
        return hasattr(self.full, "wq")

    def _per_head(self, rows: Tensor) -> Tensor:
        """(H·R, …) → (H, R, …)"""
        return rows.unflatten(0, (self.full.num_heads, -1))

    def _scores(self) -> dict[str, Tensor]:
        if self.gate_qk is None and self.active_qk == self.rank_qk:
            return {}
        wq, bq, wk = (self._per_head(getattr(self.full, name)) for name in ("wq", "bq", "wk"))
        if self.gate_qk is not None:
            gate = self.gate_qk
            return {"wq": (wq * gate[:, None]).flatten(0, 1), "bq": (bq * gate).flatten()}
        return {name: part[:, :self.active_qk].flatten(0, 1)
                for name, part in (("wq", wq), ("bq", bq), ("wk", wk))}

    def _values(self) -> dict[str, Tensor]:
        if self.gate_vo is None and self.active_vo == self.rank_vo:
            return {}
        full, rank = self.full, self.active_vo
        wv = self._per_head(full.wv)
        if self.gate_vo is not None:
            kept = (1 - self.gate_vo).expand(full.num_heads, -1).flatten()
            bo = full.bo + full.wo @ (kept * self._mean_values().flatten())
            return {"wv": (wv * self.gate_vo[:, None]).flatten(0, 1), "bo": bo}
        wo = full.wo.unflatten(1, (full.num_heads, -1))
        with torch.no_grad():
            lost = wo[..., rank:].flatten(1) @ self._mean_values()[:, rank:].flatten()
        return {"wv": wv[:, :rank].flatten(0, 1), "wo": wo[..., :rank].flatten(1),
                "bo": full.bo + lost}

    def _mean_values(self) -> Tensor:
        """(H, R): what every value direction carries on average."""
        return torch.einsum("hrd,hd->hr", self._per_head(self.full.wv), self.mean)

    def factors_(self) -> dict[str, Tensor]:
        """The tensors that stand in for those of ``full``."""
        return (self._scores() if self.folds_scores else {}) | self._values()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(self.full, self.factors_(), args, kwargs)

    @torch.no_grad()
    def finalized(self, ranks: Mapping[str, Rank]) -> LowRankAttention:
        """The compressed attention. ``ranks``: of 'qk' and 'vo', in tier B of 'q', 'k' and 'vo'."""
        module: Any = copied(self.full)
        for name, factor in self.factors_().items():
            setattr(module, name, nn.Parameter(factor.clone()))
        inherit_(module, self.full, dict(self.full.named_parameters()))
        module.rank_vo = self.active_vo
        if self.folds_scores:
            module.rank_qk = self.active_qk
        else:
            module.q, module.k = (getattr(self.full, part).finalized(ranks[part]) for part in "qk")
        return module


class GatedMlp(nn.Module):
    """y = Ŵ h + b + (W - Ŵ) mean, h = act(fc1(x)), Ŵ = W L diag(g) L⁻¹, g of 0 and 1 or mixed.

    The neurons stand in the order of their worth and L is their ``triangle``: with g = 1_{j ≤ n},
    Ŵ takes the first n alone, and what W makes of the others is regressed on them. So the gate
    mixes pruned MLPs exactly, and all ones are the dense MLP. ``active`` is the width where no
    gate is set; neurons beyond it then get no gradient.
    """

    triangle: Tensor  # (H, H) L
    mean: Tensor  # (H,) of the hidden activations
    gate: Tensor | None  # (H,)

    def __init__(self, mlp: nn.Module, factors: NeuronFactors) -> None:
        super().__init__()
        order = factors.order
        self.full = prune_mlp(mlp, order, factors.weight[:, order], factors.bias)
        parts = mlp_parts(self.full)
        assert parts is not None, "find_sites admits known MLPs only"
        self.names = parts.names
        weight = self.projections[1].weight
        self.register_buffer("triangle", factors.triangle.to(weight))
        self.register_buffer("mean", factors.mean[order].to(weight))
        self.rank = self.active = len(order)
        self.gate = None

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear]:
        first, second = (self.full.get_submodule(name) for name in self.names)
        return cast(nn.Linear, first), cast(nn.Linear, second)

    def factors_(self) -> dict[str, Tensor]:
        """The tensors that stand in for those of ``full``."""
        if self.gate is None and self.active == self.rank:
            return {}
        fc1, fc2 = self.projections
        with torch.autocast(fc2.weight.device.type, enabled=False):
            weight, shift = self._cut() if self.gate is None else self._mixed(self.gate)
        width = weight.shape[1]
        first, second = self.names
        found = {f"{first}.weight": fc1.weight[:width], f"{second}.weight": weight}
        if fc1.bias is not None:
            found[f"{first}.bias"] = fc1.bias[:width]
        if fc2.bias is not None:
            found[f"{second}.bias"] = fc2.bias + shift
        return found

    def _mixed(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """W L diag(g) L⁻¹ (out, H), and what W h has on average beyond it."""
        weight = self.projections[1].weight
        mixed = _over(weight @ self.triangle * gate, self.triangle)
        return mixed, (weight - mixed) @ self.mean

    def _cut(self) -> tuple[Tensor, Tensor]:
        """The same for g = 1_{j ≤ n}, n columns: the neurons that go give theirs to the others."""
        weight, width = self.projections[1].weight, self.active
        with torch.no_grad():
            gone, lower = weight[:, width:], self.triangle[:width, :width]
            passed = _over(gone @ self.triangle[width:, :width], lower)
            shift = gone @ self.mean[width:] - passed @ self.mean[:width]
        return weight[:, :width] + passed, shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.full, self.factors_(), x)

    @torch.no_grad()
    def finalized(self) -> nn.Module:
        """The MLP of the active width."""
        mlp = mlp_of_width(self.full, self.active)
        mlp.load_state_dict(self.full.state_dict() | self.factors_())
        return mlp


def _over(a: Tensor, lower: Tensor) -> Tensor:
    """a L⁻¹"""
    return torch.linalg.solve_triangular(lower, a, upper=False, left=False)


@torch.no_grad()
def build_supernet(model: nn.Module, factors: Factors,
                   sites: list[Site] | None = None) -> nn.Module:
    """A copy of ``model`` in which every site holds its full factors, all of them active.

    sites: the decisions to take; every rank of ``model`` where not given.
    """
    supernet = copied(model)
    sites = find_sites(model) if sites is None else sites
    for name, group in groupby(sites, key=lambda site: site.module):
        replace_(supernet, name, _gated(model.get_submodule(name), list(group), factors))
    return supernet


def _gated(module: nn.Module, sites: list[Site], factors: Factors) -> nn.Module:
    """The gated module for one dense module, from the factors of its sites."""
    site, prefix = sites[0], sites[0].module
    # The kind of a site says which class its module and its factors have.
    found, dense = cast(dict[str, Any], factors), cast(Any, module)
    if site.kind == "linear":
        return GatedLinear(dense, found[site.name])
    if site.kind == "hidden":
        return GatedMlp(dense, found[site.name])
    full = low_rank_class(module, site.tier).like(module, site.head_dim, site.head_dim)
    values = found[f"{prefix}.vo"]
    full.set_values_(values)
    if site.tier == "A":
        full.set_scores_(found[f"{prefix}.qk"])
    else:
        for part in "qk":
            projection = GatedLinear(getattr(full, part), found[f"{prefix}.{part}"])
            setattr(full, part, projection)
    return GatedAttention(full, values.mean)


def explicit_plan(plan: RankPlan, sites: list[Site]) -> RankPlan:
    """Every site named, and no folded site 'dense': in a supernet they fold at full rank."""
    return RankPlan({site.name: site.full_rank if site.folded and plan[site.name] == DENSE
                     else plan[site.name] for site in sites})


def set_ranks_(supernet: nn.Module, plan: RankPlan) -> None:
    """Cut every site to its rank of ``plan``; what is beyond stays, and may come back."""
    for name, module, part in _targets(supernet):
        rank = plan[name]
        full = getattr(module, f"rank{part}")
        setattr(module, f"active{part}", full if rank == DENSE else rank)


@contextmanager
def mixture(supernet: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every site computes the mixture that its gate (R,) stands for."""
    targets = list(_targets(supernet))
    for name, module, part in targets:
        setattr(module, f"gate{part}", gates[name])
    try:
        yield
    finally:
        for _, module, part in targets:
            setattr(module, f"gate{part}", None)


def _targets(supernet: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(site name, gated module, suffix of its rank attributes)."""
    for name, module in supernet.named_modules():
        if isinstance(module, GatedLinear):
            yield name.replace(".full.", "."), module, ""
        elif isinstance(module, GatedMlp):
            yield f"{name}.hidden", module, ""
        elif isinstance(module, GatedAttention):
            if module.folds_scores:
                yield f"{name}.qk", module, "_qk"
            yield f"{name}.vo", module, "_vo"


@torch.no_grad()
def finalize(supernet: nn.Module, plan: RankPlan) -> nn.Module:
    """The compressed model at ``plan``, without gates; the plan of its record names every site."""
    set_ranks_(supernet, plan)
    model = copied(supernet)
    names = [name for name, _, _ in _targets(supernet)]
    ranks: dict[str, Rank] = {name: plan[name] for name in names}
    for name, module in list(supernet.named_modules()):
        if isinstance(module, GatedAttention):
            for part, rank in (("qk", module.active_qk), ("vo", module.active_vo)):
                if f"{name}.{part}" in ranks:
                    ranks[f"{name}.{part}"] = rank
            parts: dict[str, Rank] = {
                part: ranks[f"{name}.{part}"] for part in ("q", "k", "qk", "vo")
                if f"{name}.{part}" in ranks}
            replace_(model, name, module.finalized(parts).train(module.training))
        elif isinstance(module, GatedLinear) and ".full." not in name:
            replace_(model, name, module.finalized(plan[name]))
        elif isinstance(module, GatedMlp):
            replace_(model, name, module.finalized().train(module.training))
    join_mlps_(model)
    record_(model, plan=RankPlan(ranks))
    return model
