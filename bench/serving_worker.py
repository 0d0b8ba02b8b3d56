"""One runtime in a process of its own, as ``test_serving.py`` starts and asks it.

``python bench/serving_worker.py PEER MODEL DTYPE BATCH THREADS`` answers each line of JSON on
standard input, {"situation": NAME, "seconds": S}, by one with the seconds of every call.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import peers
import timm
import torch
from test_models import DTYPES, MODELS, low_rank
from torch import Tensor

import adacomcat

PAUSES = {"pause of 10 ms": 0.01, "pause of 100 ms": 0.1, "pause of 500 ms": 0.5}

Run = Callable[[], object]
# Makes what one calling thread runs.
Caller = Callable[[], Run]


def openvino(low_rank_model: torch.nn.Module, dtype: torch.dtype, x: Tensor, threads: int,
             hint: str) -> Caller:
    import openvino as ov

    converted = ov.convert_model(low_rank_model, example_input=x, input=list(x.shape))
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    model = ov.Core().compile_model(converted, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": hint})

    def caller() -> Run:
        request = model.create_infer_request()
        return lambda: request.infer([x.numpy()])

    return caller


def make(peer: str, model: str, dtype: torch.dtype, batch: int, threads: int) -> Caller:
    """``peer`` is ours, eager, dense eager, onnxruntime, openvino latency or throughput."""
    torch.manual_seed(0)
    architecture, rank, rank_mlp = MODELS[model]
    dense = timm.create_model(architecture).eval()
    x = torch.randn(batch, 3, 224, 224)
    if peer == "dense eager":
        run = peers.eager(dense, dtype)
        return lambda: lambda: run(x)
    compressed = low_rank(dense, rank, rank_mlp)
    if peer == "ours":
        run = peers.eager(adacomcat.optimize(compressed.to(dtype)), dtype)
        return lambda: lambda: run(x)
    if peer.startswith("openvino"):
        return openvino(peers.plain(compressed), dtype, x, threads, peer.split()[1].upper())
    plain = peers.plain(compressed)
    run = (peers.eager(plain, dtype) if peer == "eager"
           else peers.onnxruntime(plain, dtype, x, threads))
    return lambda: lambda: run(x)


def timed(run: Run) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    return time.perf_counter() - start


def calls(run: Run, seconds: float, pause: float = 0, least: int = 5) -> list[float]:
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent) < least:
        time.sleep(pause)
        spent.append(timed(run))
    return spent


def in_threads(caller: Caller, count: int, seconds: float) -> list[float]:
    """Seconds of each call of ``count`` threads that call at the same time."""
    spent: list[float] = []
    ready = threading.Barrier(count)

    def work() -> None:
        run = caller()
        timed(run)
        ready.wait()
        spent.extend(calls(run, seconds))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return spent


@contextmanager
def pinned(threads: int):
    """Every thread of this process on as many cores."""
    before = os.sched_getaffinity(0)
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    cores = set(sorted(before)[:threads])
    for task in tasks:
        os.sched_setaffinity(task, cores)
    time.sleep(0.02)
    try:
        yield
    finally:
        for task in tasks:
            os.sched_setaffinity(task, before)
        time.sleep(0.02)


def answer(caller: Caller, run: Run, situation: str, seconds: float) -> list[float]:
    if situation in PAUSES:
        return calls(run, seconds, PAUSES[situation])
    if situation == "one core":
        with pinned(1):
            return calls(run, seconds)
    if situation == "another thread":
        return in_threads(caller, 1, seconds)
    if situation.endswith("callers"):
        return in_threads(caller, int(situation.split()[0]), seconds)
    return calls(run, seconds)


def main() -> None:
    warnings.simplefilter("ignore")
    peer, model, dtype, batch, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    caller = make(peer, model, DTYPES[dtype], int(batch), int(threads))
    run = caller()
    for _ in range(3):
        timed(run)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        timed(run)
        print(json.dumps(answer(caller, run, request["situation"], request["seconds"])),
              flush=True)


if __name__ == "__main__":
    main()
