"""What a search step costs beside a training step of the dense model, MLPs by neurons or ranks.

Medians of interleaved repeats; design limit: 1.5. Run: ``python bench/test_search.py``
"""

import statistics
import time
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F

from adacomcat.convert.calibrate import calibrate
from adacomcat.convert.factors import factorize_model
from adacomcat.cost import model_params
from adacomcat.distill.config import MLP
from adacomcat.search import RankGates, RankSearch, SearchConfig, build_supernet, uniform_plan
from adacomcat.search.search import frozen
from adacomcat.sites import find_sites, prunable_mlps
from adacomcat.utils.distributed import Processes
from adacomcat.utils.random import derived_generator

LIMIT = 1.5


def make_steps(mlp: str, depth: int = 3,
               batch: int = 8) -> tuple[Callable[[], object], Callable[[], object]]:
    """(dense training step, search step) of one DeiT-S-like model on the same images."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", depth=depth)
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    sites = find_sites(model, prunable_mlps(model) if mlp == "neurons" else ())
    whole = model_params(model)
    fixed = whole - sum(site.dense_params for site in sites)
    factors = factorize_model(model, calibrate(model, images), sites=sites)
    supernet = build_supernet(model, factors, sites).eval()
    plan = uniform_plan(sites, 0.5 * whole - fixed, 8)
    search = RankSearch(supernet, sites, RankGates(sites), plan, SearchConfig(),
                        target=0.5 * whole, fixed=fixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = derived_generator(0)

    def dense_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def search_step() -> None:
        with frozen(supernet):
            search.step(images, labels, 1.0, generator, Processes())

    return dense_step, search_step


def ratio(mlp: str, repeats: int = 9) -> tuple[float, float, float]:
    """(search step / dense step, and the two medians in seconds)."""
    steps = make_steps(mlp)
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):  # the first warms up
        for step, spent in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if repeat:
                spent.append(time.perf_counter() - start)
    dense, search = map(statistics.median, seconds)
    return search / dense, dense, search


@pytest.mark.parametrize("mlp", MLP)
def test_search_step_costs_little_more_than_a_dense_step(mlp: str) -> None:
    torch.set_num_threads(1)
    measured, dense, search = ratio(mlp)
    assert measured <= LIMIT, f"search {search:.3f} s, dense {dense:.3f} s: {measured:.2f}"


if __name__ == "__main__":
    for choice in MLP:
        measured, dense, search = ratio(choice)
        print(f"{choice}: dense step {dense * 1e3:.0f} ms, search step {search * 1e3:.0f} ms, "
              f"ratio {measured:.2f}, limit {LIMIT}")
