"""The errors of all candidate ranks of a model, computed as ComCAT does: a baseline for timings.

numpy decomposes the dense d × d products W_qᵀ W_k and W_o W_v of every head, and every matrix of an
MLP. For each candidate rank the dense matrix of that rank is computed and compared with the
original. All is float32, the weights' dtype, on numpy's threads.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from adacomcat.layers.registry import attention_weights
from adacomcat.sites import Site, find_sites


@dataclass(frozen=True)
class Task:
    """Matrices of one shape: those of all heads of all sites of one kind."""

    sites: list[Site]
    count: int  # of matrices
    ranks: list[int]  # the candidates
    every: int  # step between candidates


class Score(NamedTuple):
    """One matrix: its spectrum, the candidates' errors, and what they took."""

    values: np.ndarray  # singular values
    errors: dict[int, float]  # candidate rank → squared error
    svd: float  # seconds
    candidates: float  # seconds


def tasks(model: nn.Module, multiple: int) -> dict[str, Task]:
    """'KIND ROWS x COLUMNS' → its task, for a model whose attentions are all of tier A."""
    groups = defaultdict(list)
    for site in find_sites(model):
        groups[site.kind, site.in_features, site.out_features].append(site)
    result = {}
    for (kind, columns, rows), sites in groups.items():
        ranks = [rank for rank in sites[0].candidates(multiple) if isinstance(rank, int)]
        heads = sites[0].num_heads if kind in ("qk", "vo") else 1
        result[f"{kind} {rows} x {columns}"] = Task(sites, heads * len(sites), ranks,
                                                    ranks[1] - ranks[0])
    return result


def dense_matrix(model: nn.Module, site: Site, head: int = 0) -> np.ndarray:
    """The site's weight (out, in), or one head's product."""
    module: Any = model.get_submodule(site.module)
    if site.kind == "linear":
        return module.weight.detach().numpy()
    weights = attention_weights(module)
    left, right = ((weights.wq[head].mT, weights.wk[head]) if site.kind == "qk"
                   else (weights.wo[head], weights.wv[head]))
    return left.numpy() @ right.numpy()


def score(matrix: np.ndarray, ranks: list[int]) -> Score:
    """Decompose one matrix and measure the error of every candidate rank."""
    start = time.perf_counter()
    u, values, vh = np.linalg.svd(matrix, full_matrices=False)
    decomposed = time.perf_counter()
    errors = {}
    for rank in ranks:
        candidate = (u[:, :rank] * values[:rank]) @ vh[:rank]
        errors[rank] = float(np.square(matrix - candidate).sum())
    return Score(values, errors, decomposed - start, time.perf_counter() - decomposed)


def score_model(model: nn.Module, multiple: int) -> float:
    """Seconds to score the candidates of the whole model; a large model takes minutes."""
    start = time.perf_counter()
    for task in tasks(model, multiple).values():
        for site in task.sites:
            for head in range(task.count // len(task.sites)):
                score(dense_matrix(model, site, head), task.ranks)
    return time.perf_counter() - start
