"""Differentiable rank search: one gated supernet, and policies for when to search."""

from adacomcat.search.gates import RankGates, reachable_multiple, uniform_plan
from adacomcat.search.policy import POLICIES, make_policy
from adacomcat.search.search import RankSearch, SearchConfig
from adacomcat.search.supernet import (
    build_supernet,
    explicit_plan,
    finalize,
    mixture,
    set_ranks_,
)

__all__ = ["POLICIES", "RankGates", "RankSearch", "SearchConfig", "build_supernet",
           "explicit_plan", "finalize", "make_policy", "mixture", "reachable_multiple",
           "set_ranks_", "uniform_plan"]
