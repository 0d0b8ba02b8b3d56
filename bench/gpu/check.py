"""The day a GPU is there: correctness, then timings, of every Triton kernel. `make gpu-check`.

Correctness against float64 is tests/gpu/test_device.py. Here: medians of CUDA events around replays
of a CUDA graph, of ours and of what a user would run instead, with and without gradients, and the
forward pass's fraction of the roofline that follows from the card's memory bandwidth and arithmetic
as measured here. Writes bench/gpu/*.json.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
REPEATS = 30
MODELS = {"deit_s": (384, 128, 6), "deit_b": (768, 256, 12)}


def seconds(run: Callable[[], object], replays: int = 20) -> float:
    """The median time of one replay of `run`, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / replays)
    return statistics.median(times)


def peaks() -> dict[str, float]:
    """What this card reaches: FLOP/s of a large product in bfloat16, bytes/s of a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b, c = torch.empty_like(a), a.new_empty(256 << 20)
    d = torch.empty_like(c)
    return {
        "flops": 2 * 8192**3 / seconds(lambda: torch.mm(a, a, out=b), 3),
        "bytes": 2 * 2 * c.numel() / seconds(lambda: d.copy_(c), 3),
    }


def training(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """`run`, and the gradients of all its tensors; its result stands for the incoming gradient."""

    def step() -> object:
        with torch.enable_grad():
            out = run()
        return torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)

    return step


def runs(model: str, batch: int) -> tuple[dict[str, dict[str, Callable[[], Tensor]]], list[Tensor]]:
    """Op → who computes it → how: ours, the dense weights, plain products, torch.compile.

    Also all tensors that any of them takes.
    """
    from adacomcat import ops, reference

    leaves: list[Tensor] = []

    def draw(*shape: int) -> Tensor:
        value = torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5
        leaves.append(value.requires_grad_())
        return value

    d, r, heads = MODELS[model]
    x, hidden = draw(batch, 197, d), 4 * d
    v1, u1, v2, u2 = draw(d, r), draw(hidden, r), draw(hidden, r), draw(d, r)
    b1, b2, w1, w2 = draw(hidden), draw(d), draw(hidden, d), draw(d, hidden)
    qk, vo = 32 * heads, 48 * heads
    attention = (x, draw(qk, d), draw(qk), draw(qk, d), draw(vo, d), draw(d, vo), b2, heads, 0.125)
    wqkv, wo = draw(3 * d, d), draw(d, d)

    def dense_attention() -> Tensor:
        q, k, v = F.linear(x, wqkv).unflatten(-1, (3, heads, d // heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.transpose(1, 2).flatten(2), wo, b2)

    compiled = {name: torch.compile(getattr(reference, name)) for name in
                ("low_rank_linear", "gated_low_rank_linear", "low_rank_mlp", "low_rank_attention")}
    gated = (x, v1, draw(r), u1, b1)
    linear, mlp = (x, v1, u1, b1, "gelu"), (x, v1, u1, b1, v2, u2, b2, "gelu")
    ways = {
        "low_rank_linear": {
            "ours": lambda: ops.low_rank_linear(*linear),
            "dense": lambda: F.gelu(F.linear(x, w1, b1)),
            "products": lambda: reference.low_rank_linear(*linear)[0],
            "compiled": lambda: compiled["low_rank_linear"](*linear)[0],
        },
        "gated_low_rank_linear": {
            "ours": lambda: ops.gated_low_rank_linear(*gated),
            "dense": lambda: F.linear(x, w1, b1),
            "products": lambda: reference.gated_low_rank_linear(*gated)[0],
            "compiled": lambda: compiled["gated_low_rank_linear"](*gated)[0],
        },
        "low_rank_mlp": {
            "ours": lambda: ops.low_rank_mlp(*mlp),
            "dense": lambda: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
            "products": lambda: reference.low_rank_mlp(*mlp)[0],
            "compiled": lambda: compiled["low_rank_mlp"](*mlp)[0],
        },
        "low_rank_attention": {
            "ours": lambda: ops.low_rank_attention(*attention),
            "dense": dense_attention,
            "products": lambda: reference.low_rank_attention(*attention)[0],
            "compiled": lambda: compiled["low_rank_attention"](*attention)[0],
        },
    }
    return ways, leaves


def bounds(model: str, batch: int) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes that each op cannot do without: inputs and outputs once."""
    d, r, heads = MODELS[model]
    m, qk, vo = 197 * batch, 32 * heads, 48 * heads
    linear, mlp = r * 5 * d, r * 10 * d
    projections = d * (2 * qk + 2 * vo)
    attention = 2 * m * (projections + 197 * (qk + vo))
    return {
        "low_rank_linear": (2 * m * linear, 2 * (5 * m * d + linear)),
        "gated_low_rank_linear": (2 * m * linear, 2 * (5 * m * d + linear)),
        "low_rank_mlp": (2 * m * mlp, 2 * (2 * m * d + mlp)),
        "low_rank_attention": (attention, 2 * (2 * m * d + projections)),
    }


def measure() -> dict[str, object]:
    from adacomcat import backends

    card = peaks()
    found: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "peaks": card, "ops": {},
    }
    for model in MODELS:
        for batch in (1, 2, 8, 64):
            limits = bounds(model, batch)
            ops, leaves = runs(model, batch)
            for op, ways in ops.items():
                row = {}
                for name, run in ways.items():
                    with backends.use_backend("triton" if name == "ours" else "reference"):
                        row[name] = seconds(run)
                        row[f"{name}, with gradients"] = seconds(training(run, leaves))
                flop, byte = limits[op]
                floor = max(flop / card["flops"], byte / card["bytes"])
                row["roofline_fraction"] = floor / row["ours"]
                found["ops"][f"{op} {model} b{batch}"] = row
                print(op, model, f"b{batch}", {k: f"{v:.3g}" for k, v in row.items()}, flush=True)
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run and nothing was written")
        return 0
    tests = HERE.parent.parent / "tests" / "gpu" / "test_device.py"
    correct = subprocess.run([sys.executable, "-m", "pytest", "-q", tests], check=False).returncode
    with torch.no_grad():
        found = measure() | {"tests_passed": correct == 0}
    name = torch.cuda.get_device_name().lower().replace(" ", "_")
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return correct


if __name__ == "__main__":
    sys.exit(main())
