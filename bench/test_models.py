"""Whole models: dense and low-rank, ours and what else a user could pick, in one run.

Every repeat runs all peers in turn; ratios are of medians. Run: make bench, or
``python -m pytest bench/test_models.py``; ``--models deit_small --batches 1 8 --threads 1 2`` as
``python bench/test_models.py`` for a part of it, ``--memory`` for activations instead of time.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import accumulate, product
from pathlib import Path

import peers
import pytest
import timm
import torch
from machine import gemm_peak, machine
from torch import Tensor, nn
from torch.profiler import profile

import adacomcat
from adacomcat.cost import model_macs, model_params

REPEATS = 11
# Half the head dimension for QK and VO, a third of the width in the MLP: 0.465 of DeiT-S.
MODELS = {"deit_small": ("deit_small_patch16_224", 32, 128),
          "deit_base": ("deit_base_patch16_224", 32, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def low_rank(dense: nn.Module, rank: int, rank_mlp: int) -> nn.Module:
    ranks = {"qk": rank, "vo": rank, "fc1": rank_mlp, "fc2": rank_mlp}
    return adacomcat.compress(dense, plan=adacomcat.RankPlan(
        {site.name: ranks[site.name.rpartition(".")[2]] for site in adacomcat.find_sites(dense)
         if site.name.startswith("blocks")}))


def make_peers(name: str, dtype: torch.dtype, batch: int, threads: int,
               wanted: Iterable[str] | None) -> tuple[dict[str, peers.Peer], dict[str, str]]:
    """Name → callable, and name → why there is none."""
    torch.manual_seed(0)
    architecture, rank, rank_mlp = MODELS[name]
    dense = timm.create_model(architecture).eval()
    ours = low_rank(dense, rank, rank_mlp)
    example = torch.randn(batch, 3, 224, 224)
    made: dict[str, peers.Peer] = {}
    missing: dict[str, str] = {}

    def add(peer: str, make: Callable[[], peers.Peer]) -> None:
        if wanted and peer not in wanted:
            return
        try:
            made[peer] = make()
            made[peer](example)
        except Exception as error:  # a runtime that is absent or refuses is a finding, not a crash
            made.pop(peer, None)
            missing[peer] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"

    floats = torch.float32 if dtype == torch.int8 else dtype

    def served(model: nn.Module) -> peers.Peer:
        chosen = adacomcat.quantize(model) if dtype == torch.int8 else model
        return peers.eager(adacomcat.optimize(chosen), floats)

    add("ours", lambda: served(ours))
    add("ours, dense", lambda: served(dense))
    if dtype == torch.int8:
        add("ours, float32", lambda: peers.eager(adacomcat.optimize(ours), floats))
    add("ours, not fused", lambda: peers.eager(copy.deepcopy(ours), floats))
    for label, model in (("dense", dense), ("low-rank", peers.plain(copy.deepcopy(ours)))):
        def fresh(model: nn.Module = model) -> nn.Module:
            return copy.deepcopy(model)
        add(f"{label}, eager", lambda: peers.eager(fresh(), floats))
        add(f"{label}, compiled", lambda: peers.compiled(fresh(), dtype, example))
        add(f"{label}, onnxruntime", lambda: peers.onnxruntime(fresh(), dtype, example, threads))
        add(f"{label}, openvino", lambda: peers.openvino(fresh(), dtype, example, threads))
    made["ours"].macs = model_macs(ours) * batch
    made["ours"].kept = model_params(ours) / model_params(dense)
    return made, missing


def measure(made: dict[str, peers.Peer], x: Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds, A B C A B C …

    Each runs untimed before it runs timed: threads of the one before (onnxruntime's, OpenVINO's)
    go on spinning for a while after its run and would take a core from the next.
    """
    spent: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 2):
        for name, run in made.items():
            run(x)
            start = time.perf_counter()
            run(x)
            if repeat >= 2:
                spent[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in spent.items()}


@torch.inference_mode()
def compare(name: str, dtype: str, batch: int, threads: int, repeats: int = REPEATS,
            wanted: Iterable[str] | None = None) -> dict[str, object]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(False), torch.no_grad():
            made, missing = make_peers(name, DTYPES[dtype], batch, threads, wanted)
        times = measure(made, torch.randn(batch, 3, 224, 224), repeats)
        peak = gemm_peak(torch.float32 if dtype == "int8" else DTYPES[dtype])
    finally:
        torch.set_num_threads(before)
    ours = times["ours"]

    def fastest(kind: str) -> float | None:
        found = [t for peer, t in times.items() if peer.startswith(kind)]
        return round(min(found) / ours, 2) if found else None

    gflops = 2 * made["ours"].macs / ours / 1e6
    return {"model": name, "dtype": dtype, "batch": batch, "threads": threads,
            "milliseconds": {k: round(t, 2) for k, t in times.items()}, "missing": missing,
            "vs dense eager": round(times.get("dense, eager", float("nan")) / ours, 2),
            "vs fastest dense": fastest("dense"), "vs fastest low-rank": fastest("low-rank"),
            "GFLOP/s": round(gflops), "peak GFLOP/s": round(peak),
            "fraction of peak": round(gflops / peak, 2)}


@torch.inference_mode()
def activation_bytes(run: peers.Peer, x: Tensor) -> int:
    """What a forward pass holds at most beside weights and input, the kernels' scratch too."""
    scratch = import_module("adacomcat._C").scratch_bytes
    before = scratch()
    with profile(profile_memory=True) as found:
        run(x)
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive, default=0) + scratch() - before


def compare_memory(name: str, dtype: str, batch: int) -> dict[str, object]:
    """Megabytes of activations, and their ratio to those of the dense model in PyTorch."""
    wanted = ["ours", "ours, not fused", "dense, eager"]
    x = torch.randn(batch, 3, 224, 224)
    x = x if dtype == "int8" else x.to(DTYPES[dtype])
    # In a thread of its own no scratch is there yet; the first pass of a peer packs its weights.
    with torch.no_grad():
        made, _ = make_peers(name, DTYPES[dtype], 1, 1, wanted)
    used = {peer: ThreadPoolExecutor(1).submit(activation_bytes, made[peer], x).result()
            for peer in wanted}
    return {"model": name, "dtype": dtype, "batch": batch,
            "megabytes": {peer: round(n / 1e6, 1) for peer, n in used.items()},
            "vs dense eager": round(used["ours"] / used["dense, eager"], 3)}


def table(results: list[dict]) -> str:
    columns = ["model", "dtype", "batch", "threads", "vs dense eager", "vs fastest dense",
               "vs fastest low-rank", "GFLOP/s", "peak GFLOP/s", "fraction of peak"]
    rows = [columns, ["---"] * len(columns)] + [[str(r[c]) for c in columns] for r in results]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_model(benchmark: Callable, name: str, dtype: str, batch: int, threads: int) -> None:
    result = benchmark.pedantic(compare, (name, dtype, batch, threads), rounds=1)
    benchmark.extra_info.update(result, **machine())
    print("\n" + table([result]) + "\n" + json.dumps(result["milliseconds"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_memory(benchmark: Callable, name: str, dtype: str) -> None:
    result = benchmark.pedantic(compare_memory, (name, dtype, 32), rounds=1)
    benchmark.extra_info.update(result, **machine())
    print("\n" + json.dumps(result))
    if name == "deit_small":
        assert result["vs dense eager"] <= 0.35


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--peers", nargs="+", help="only these, 'ours' included")
    parser.add_argument("--memory", action="store_true", help="of activations, instead of time")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if args.memory:
        for name, dtype, batch in product(args.models, args.dtypes, args.batches):
            print(json.dumps(compare_memory(name, dtype, batch)), flush=True)
        return
    results = []
    for name in args.models:
        for dtype in args.dtypes:
            for batch in args.batches:
                for threads in args.threads:
                    results.append(compare(name, dtype, batch, threads, args.repeats, args.peers))
                    print(json.dumps(results[-1]), flush=True)
    print(json.dumps(machine()))
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
