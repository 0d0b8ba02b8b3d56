"""Whole models as a service calls them: from other threads, beside busy programs, after a pause.

Each runtime has a process of its own; in every situation they take turns, so that a change of the
machine meets all of them. Run: ``python bench/test_serving.py``, with ``--peers``, ``--dtypes``,
``--situations`` for a part of it; ``--tree PATH`` adds our own package of another checkout as the
peer 'before'.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from machine import machine

BENCH = Path(__file__).parent
PEERS = ["ours", "openvino latency", "openvino throughput", "onnxruntime", "eager", "dense eager"]
# Situations of the calls → processes that are busy beside them.
SITUATIONS = {"alone": 0, "another thread": 0, "2 callers": 0, "4 callers": 0,
              "1 busy process": 1, "2 busy processes": 2, "4 busy processes": 4,
              "pause of 10 ms": 0, "pause of 100 ms": 0, "pause of 500 ms": 0, "one core": 0}


class Worker:
    """A runtime in its own process."""

    def __init__(self, peer: str, model: str, dtype: str, batch: int, threads: int,
                 tree: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), str(BENCH)])}
        environment.pop("OMP_NUM_THREADS", None)
        name = "ours" if peer == "before" else peer
        self.process = subprocess.Popen(
            [sys.executable, str(BENCH / "serving_worker.py"), name, model, dtype, str(batch),
             str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment)
        self.missing = ""
        if self.process.stdout is None or not self.process.stdout.readline():
            lines = self.process.communicate()[1].strip().splitlines()
            self.missing = lines[-1][:80] if lines else "ended without a word"

    def ask(self, situation: str, seconds: float) -> list[float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"situation": situation, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Other programs that take all they get of a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def summary(situation: str, spent: list[float], seconds: float, batch: int) -> dict[str, float]:
    found = {"median": statistics.median(spent) * 1e3,
             "p99": sorted(spent)[int(0.99 * (len(spent) - 1))] * 1e3}
    if situation.endswith("callers"):
        found["images/s"] = len(spent) * batch / seconds
    return {name: round(value, 2) for name, value in found.items()}


def compare(model: str, dtype: str, batch: int, threads: int, situations: Iterable[str],
            wanted: Iterable[str], rounds: int = 5, seconds: float = 1.0,
            tree: Path | None = None) -> dict[str, object]:
    """Median and 99th percentile in milliseconds of every peer in every situation."""
    here = BENCH.parent
    workers = {peer: Worker(peer, model, dtype, batch, threads,
                            tree if tree and peer == "before" else here) for peer in wanted}
    missing = {peer: worker.missing for peer, worker in workers.items() if worker.missing}
    present = {peer: worker for peer, worker in workers.items() if not worker.missing}
    results: dict[str, dict[str, dict[str, float]]] = {}
    try:
        for situation in situations:
            spent: dict[str, list[float]] = {peer: [] for peer in present}
            with busy(SITUATIONS[situation]):
                for _ in range(rounds):
                    for peer, worker in present.items():
                        spent[peer] += worker.ask(situation, seconds)
            results[situation] = {peer: summary(situation, times, rounds * seconds, batch)
                                  for peer, times in spent.items()}
            print(situation, json.dumps(results[situation]), file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.end()
    return {"model": model, "dtype": dtype, "batch": batch, "threads": threads,
            "situations": results, "missing": missing}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_serving(benchmark: Callable, situation: str, dtype: str) -> None:
    threads = min(2, os.cpu_count() or 1)
    result = benchmark.pedantic(
        compare, ("deit_small", dtype, 1, threads, [situation], PEERS), rounds=1)
    benchmark.extra_info.update(result, **machine())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_more_threads_than_cores(benchmark: Callable, dtype: str) -> None:
    threads = 2 * (os.cpu_count() or 1)
    result = benchmark.pedantic(
        compare, ("deit_small", dtype, 1, threads, ["alone"], PEERS), rounds=1)
    benchmark.extra_info.update(result, **machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--situations", nargs="+", default=list(SITUATIONS), choices=SITUATIONS)
    parser.add_argument("--peers", nargs="+", default=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tree", type=Path, help="of the peer 'before'")
    args = parser.parse_args()
    wanted = [*args.peers, "before"] if args.tree else args.peers
    for dtype in args.dtypes:
        result = compare(args.model, dtype, args.batch, args.threads, args.situations, wanted,
                         args.rounds, args.seconds, args.tree)
        print(json.dumps(result), flush=True)
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
