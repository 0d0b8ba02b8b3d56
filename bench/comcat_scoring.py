"""ComCAT's way to score the ranks of a model, as a baseline.

numpy decomposes the dense d × d products W_qᵀ W_k and W_vᵀ W_oᵀ of every head, and every matrix of
an MLP; every candidate rank's dense matrix is made, and compared with the original. float32, as
the weights are, on all of numpy's threads.
"""

import time
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from torch import nn

from adacomcat.layers.registry import attention_weights
from adacomcat.sites import DENSE, Site, find_sites


class Task(NamedTuple):
    """Matrices of one shape: those of every head of every site of one kind."""

    sites: list[Site]
    count: int
    ranks: list[int]  # the candidates
    every: int  # as many times the candidates' work is that of every rank up to the last of them


class Score(NamedTuple):
    values: np.ndarray  # singular values
    errors: dict[int, float]  # candidate rank → squared error
    svd: float  # seconds
    candidates: float  # seconds


def tasks(model: nn.Module, multiple: int) -> dict[str, Task]:
    """Shape → what there is to do, for a model whose attentions fold (tier A)."""
    groups = defaultdict(list)
    for site in find_sites(model):
        groups[site.kind, site.in_features, site.out_features].append(site)
    result = {}
    for (kind, columns, rows), sites in groups.items():
        ranks = [rank for rank in sites[0].candidates(multiple) if rank != DENSE]
        heads = sites[0].num_heads if kind in ("qk", "vo") else 1
        result[f"{kind} {rows} x {columns}"] = Task(sites, heads * len(sites), ranks,
                                                    ranks[1] - ranks[0])
    return result


def dense_matrix(model: nn.Module, site: Site, head: int = 0) -> np.ndarray:
    module = model.get_submodule(site.module)
    if site.kind == "linear":
        return module.weight.detach().numpy()
    weights = attention_weights(module)
    left, right = ((weights.wq[head].mT, weights.wk[head]) if site.kind == "qk"
                   else (weights.wo[head], weights.wv[head]))
    return left.numpy() @ right.numpy()


def score(matrix: np.ndarray, ranks: list[int]) -> Score:
    start = time.perf_counter()
    u, values, vh = np.linalg.svd(matrix, full_matrices=False)
    decomposed = time.perf_counter()
    errors = {}
    for rank in ranks:
        candidate = (u[:, :rank] * values[:rank]) @ vh[:rank]
        errors[rank] = float(np.square(matrix - candidate).sum())
    return Score(values, errors, decomposed - start, time.perf_counter() - decomposed)


def score_model(model: nn.Module, multiple: int) -> float:
    """Seconds for the whole model, candidates in steps; minutes for a large one."""
    start = time.perf_counter()
    for task in tasks(model, multiple).values():
        for site in task.sites:
            for head in range(task.count // len(task.sites)):
                score(dense_matrix(model, site, head), task.ranks)
    return time.perf_counter() - start
