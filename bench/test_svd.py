"""Decompositions on the CPU beside torch.linalg.svd and ComCAT's way, in one run.

`batched_svd` for many sizes and batches; its accuracy; all ranks of all layers of a model, in time
and memory. Runs alternate; medians and their ratios count. ``python bench/test_svd.py`` writes
bench/SVD.md; ``--models``, ``--sizes``, ``--batches`` and ``--dtypes`` do a part of it, ``--whole``
runs ComCAT's way on whole models, for minutes, and not on one matrix of each shape.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import comcat_scoring
import pytest
import timm
import torch
from helpers.memory import allocation_peak
from machine import fastest, machine
from torch import Tensor, nn

from adacomcat.convert.factors import SPECTRA, decompose_site, error_curves
from adacomcat.ops.decompositions import batched_svd
from adacomcat.sites import MULTIPLE, find_sites

MODELS = {"deit_small": "deit_small_patch16_224", "deit_base": "deit_base_patch16_224"}
LIMITS = {"deit_small": 1.5, "deit_base": 6.0}  # seconds on two cores
SIZES, BATCHES = (16, 32, 64, 128), (1, 2, 4, 16, 144, 1024, 4096)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SPEEDUP, SVD_SPEEDUP = 200, 3
Run = Callable[[], object]


def interleaved(runs: dict[str, Run], seconds: float = 1.0, rounds: int = 101) -> dict[str, float]:
    """Name → median seconds. At least three rounds, one where that takes ten times too long."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
        elapsed = time.perf_counter() - begin
        if elapsed > (seconds if done >= 2 else 10 * seconds):
            break
    return {name: statistics.median(times) for name, times in spent.items()}


def on_one_thread(run: Run) -> Run:
    def wrapped() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        run()
        torch.set_num_threads(threads)
    return wrapped


def svd_times(size: int, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """ms of ours and of torch's, the latter also on one thread, which is often faster; the ratio
    is to the better of the two."""
    torch.manual_seed(0)
    a = torch.randn(batch, size, size, dtype=dtype)

    def library() -> None:
        torch.linalg.svd(a, full_matrices=False)

    few = a[:1]
    batched_svd(few), torch.linalg.svd(few)
    ms = {name: 1e3 * median for name, median in interleaved(
        {"ours": lambda: batched_svd(a), "torch": library,
         "torch, 1 thread": on_one_thread(library)}).items()}
    return ms | {"ratio": min(ms["torch"], ms["torch, 1 thread"]) / ms["ours"]}


def svd_errors(decompose: Callable[[Tensor], tuple[Tensor, ...]], a: Tensor) -> list[float]:
    """Largest |a - u s vᵀ| / |a|, |uᵀu - 1| and |vᵀv - 1| of a batch, seen in float64."""
    u, s, v = (t.double() for t in decompose(a))
    norm = torch.linalg.matrix_norm
    identity = torch.eye(s.shape[-1], dtype=torch.float64)
    errors = (norm(a.double() - (u * s.unsqueeze(-2)) @ v.mT) / norm(a.double()),
              norm(u.mT @ u - identity), norm(v.mT @ v - identity))
    return [error.max().item() for error in errors]


def library_svd(a: Tensor) -> tuple[Tensor, ...]:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u, s, vh.mT


def dense_model(name: str, **options: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(MODELS[name], pretrained=False, **options).eval()


def scoring(name: str, repeats: int = 3, whole: bool = False) -> dict[str, float]:
    """Seconds of ours, of ComCAT's way with candidates in steps and with every rank, and the
    largest relative difference of singular values."""
    model = dense_model(name)
    tasks = comcat_scoring.tasks(model, MULTIPLE)
    scores: dict[str, list[comcat_scoring.Score]] = {shape: [] for shape in tasks}

    def one_of_each() -> None:
        for shape, task in tasks.items():
            matrix = comcat_scoring.dense_matrix(model, task.sites[0])
            scores[shape].append(comcat_scoring.score(matrix, task.ranks))

    error_curves(model)
    ours = interleaved({"ours": lambda: error_curves(model), "comcat": one_of_each},
                       rounds=repeats, seconds=1e9)["ours"]
    result = {"ours": ours, "in steps": 0.0, "every rank": 0.0, "difference": 0.0}
    for shape, task in tasks.items():
        svd = statistics.median(score.svd for score in scores[shape])
        candidates = statistics.median(score.candidates for score in scores[shape])
        result["in steps"] += task.count * (svd + candidates)
        result["every rank"] += task.count * (svd + task.every * candidates)
        result["difference"] = max(result["difference"],
                                   _difference(model, task, scores[shape][0]))
    if whole:
        result["in steps, whole"] = comcat_scoring.score_model(model, MULTIPLE)
    return result


@torch.no_grad()
def _difference(model: nn.Module, task: comcat_scoring.Task,
                score: comcat_scoring.Score) -> float:
    """The largest relative difference of our singular values from numpy's, logits unscaled."""
    site = task.sites[0]
    values = decompose_site(SPECTRA, model, site, {}, 0.0)[0]
    if site.kind == "qk":
        values = values / model.get_submodule(site.module).scale
    expected = torch.from_numpy(score.values[:len(values)]).double()
    return ((values - expected).abs() / expected).max().item()


def layer_bytes(model: nn.Module) -> int:
    """The weights of the largest layer that has ranks: an attention or a linear layer."""
    modules = (model.get_submodule(site.module) for site in find_sites(model))
    return max(sum(p.numel() * p.element_size() for p in module.parameters())
               for module in modules)


def inspect_seconds(name: str) -> float:
    command = [sys.executable, "-m", "adacomcat", "inspect", "-m", MODELS[name]]
    return fastest(lambda: subprocess.run(command, check=True, capture_output=True), 1)


def work(model: nn.Module) -> float:
    """GFLOP without which spectra are not had: half a Gram matrix and its tridiagonal form for a
    linear, two Gram matrices for a head."""
    flops = 0.0
    for site in find_sites(model):
        if site.kind in ("qk", "vo"):
            flops += site.num_heads * (site.in_features + site.out_features) * site.head_dim**2
        else:
            small, large = sorted((site.in_features, site.out_features))
            flops += small**2 * large + 4 / 3 * small**3
    return flops / 1e9


def product_rate() -> float:
    """GFLOP/s of float64 products, one core."""
    a = torch.randn(1024, 1024, dtype=torch.float64)
    return 2 * 1.024**3 / fastest(on_one_thread(lambda: a @ a))


@pytest.mark.parametrize("direction", ["forward"])
@pytest.mark.parametrize("dtype", ["fp32"])
@pytest.mark.parametrize("shape", [f"{batch}x{size}x{size}" for size in SIZES
                                   for batch in (1, 4, 144)])
@pytest.mark.parametrize("name", ["batched_svd"])
def test_batched_svd(benchmark: Callable, name: str, shape: str, dtype: str,
                     direction: str) -> None:
    batch, size, _ = map(int, shape.split("x"))
    a = torch.randn(batch, size, size)
    benchmark(lambda: batched_svd(a))
    benchmark.extra_info.update(machine(), threads=torch.get_num_threads(),
                                **svd_times(size, batch))


@pytest.mark.parametrize("direction", ["forward"])
@pytest.mark.parametrize("dtype", ["fp32"])
@pytest.mark.parametrize("shape", MODELS)
@pytest.mark.parametrize("name", ["error_curves"])
def test_scoring(benchmark: Callable, name: str, shape: str, dtype: str, direction: str) -> None:
    model = dense_model(shape)
    benchmark.pedantic(lambda: error_curves(model), rounds=3, warmup_rounds=1)
    measured = scoring(shape, repeats=1)
    benchmark.extra_info.update(machine(), threads=torch.get_num_threads(), **measured)
    assert measured["difference"] < 1e-5


def report(sizes: list[int], batches: list[int], dtypes: list[str], models: list[str],
           whole: bool) -> str:
    load, cores = os.getloadavg()[0], os.cpu_count()
    about = ", ".join(f"{key} {value}" for key, value in machine().items() if key != "extension")
    shared = ", so the machine was shared" if load > 0.5 else ""
    lines = ["# Decompositions on the CPU", "",
             f"Date: {time.strftime('%Y-%m-%d')}. Machine and versions: {about}; "
             f"{torch.get_num_threads()} threads. The load was {load:.1f} on {cores} cores at the "
             f"start{shared}. Times are medians of alternating runs. Command: "
             f"`{' '.join(['python', 'bench/test_svd.py', *sys.argv[1:]])}`.", "",
             "## All ranks of all layers", ""]
    lines += _scoring_lines(models, whole)
    for dtype in dtypes:
        lines += _svd_lines(sizes, batches, dtype)
    return "\n".join(lines) + "\n"


def _svd_lines(sizes: list[int], batches: list[int], dtype: str) -> list[str]:
    lines = ["", f"## batched_svd, {dtype}", "",
             "Milliseconds. `torch.linalg.svd` also runs on one thread, where it is often faster. "
             "The ratio is the faster of its two times, divided by ours. Targets: "
             f"{SVD_SPEEDUP} for 144 matrices of 64 x 64 in float32, and at least 1 everywhere.",
             "",
             "| matrices | ours | torch | torch, 1 thread | ratio |",
             "| --- | --- | --- | --- | --- |"]
    for size in sizes:
        for batch in batches:
            ms = svd_times(size, batch, DTYPES[dtype])
            lines.append(f"| {batch} of {size} x {size} | {ms['ours']:.3f} | {ms['torch']:.3f} | "
                         f"{ms['torch, 1 thread']:.3f} | {ms['ratio']:.2f} |")
            print(lines[-1], flush=True)
    lines += ["", "Largest errors, computed in float64: |U S Vᵀ - A| / |A|, |UᵀU - I|, |VᵀV - I|.",
              "",
              "| 144 matrices | ours | torch |", "| --- | --- | --- |"]
    for size in sizes:
        a = torch.randn(144, size, size, dtype=DTYPES[dtype])
        ours, library = ([f"{error:.1e}" for error in svd_errors(decompose, a)]
                         for decompose in (batched_svd, library_svd))
        lines.append(f"| {size} x {size} | {', '.join(ours)} | {', '.join(library)} |")
    return lines


def _scoring_lines(models: list[str], whole: bool) -> list[str]:
    rate = product_rate()
    lines = ["Seconds to score every rank of every layer. ComCAT's way "
             "(`bench/comcat_scoring.py`) makes the dense matrix of every candidate rank. It is "
             "timed on one matrix of each shape, and the time is multiplied by their number. Its "
             "candidates are every rank below break-even, as ours, or ranks in steps of "
             f"{MULTIPLE} per head and {2 * MULTIPLE} elsewhere. The ratio is its time divided by "
             f"ours; target: {SPEEDUP}.", "",
             "| model | ours | limit | ComCAT's, every rank | ratio | in steps | ratio | "
             "singular values differ by |", "|" + " --- |" * 8]
    notes = []
    for name in models:
        t = scoring(name, whole=whole)
        lines.append(f"| {name} | {t['ours']:.2f} | {LIMITS[name]} | {t['every rank']:.0f} | "
                     f"{t['every rank'] / t['ours']:.0f} | {t['in steps']:.0f} | "
                     f"{t['in steps'] / t['ours']:.0f} | {t['difference']:.0e} |")
        print(lines[-1], flush=True)
        if whole:
            notes.append(f"{name}, the whole model ComCAT's way, in steps: "
                         f"{t['in steps, whole']:.0f} s, {t['in steps, whole'] / t['ours']:.0f} "
                         "times ours.")
        notes += _notes(name, t["ours"], rate)
    return [*lines, "", *notes]


def _notes(name: str, seconds: float, rate: float) -> list[str]:
    model, block = dense_model(name), dense_model(name, depth=1)
    needed, threads = work(model), torch.get_num_threads()
    floor = needed / (rate * threads)
    torch.set_num_threads(1)
    peak, largest = allocation_peak(lambda: error_curves(block))
    torch.set_num_threads(threads)
    layer = layer_bytes(block)
    return [f"- {name}: the work is {needed:.0f} GFLOP in float64. At {rate:.0f} GFLOP/s a core, "
            f"the library's rate for large products here, it would take {floor:.2f} s; "
            f"{floor / seconds:.0%} of that rate is reached. Each thread needs at most "
            f"{peak / 1e6:.1f} MB, {peak / layer:.2f} times the weights of one layer; the largest "
            f"tensor has {largest / 1e6:.1f} MB. `adacomcat inspect` takes "
            f"{inspect_seconds(name):.1f} s, imports included."]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--whole", action="store_true", help="ComCAT's way on whole models")
    args = parser.parse_args()
    Path(__file__).with_name("SVD.md").write_text(
        report(args.sizes, args.batches, args.dtypes, args.models, args.whole), encoding="utf-8")
