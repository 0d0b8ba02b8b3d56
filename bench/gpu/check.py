"""`make gpu-check`: correctness and timings of the GPU kernels, where there is a GPU.

First the tests of tests/gpu that need a GPU run; `ops` or `models` as the argument skips them and
takes only those timings. A timing is the median of CUDA events around replays of a CUDA graph. Our
kernels, as they are chosen by default, and the PyTorch alternatives take turns; of gated MLPs and
rotary attentions Triton is measured, whether it is the default or not. Rooflines use the card's
bandwidth and arithmetic as measured here. The results go to bench/gpu/*.json.
"""

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peers
import timm
import torch
import torch.nn.functional as F
import triton
from test_models import MODELS, low_rank
from torch import Tensor, nn

import adacomcat
from adacomcat import ops
from adacomcat.ops import backends, decompositions, inference, reference

HERE = Path(__file__).parent

REPEATS, CALLS = 9, 5
BATCHES = (1, 8, 64, 256)
SIZES = {"DeiT-S": (384, 128, 6), "DeiT-B": (768, 256, 12)}  # width, rank of the MLP, heads
RANK, HEAD, TOKENS, EPSILON = 32, 64, 197, 1e-6
Ways = Mapping[str, Callable[[], object]]  # label → a call that computes the same
Row = dict[str, Any]  # one measurement, as it stands in the JSON file


def interleaved(ways: Ways, calls: int = CALLS) -> dict[str, float]:
    """Median seconds of one call of each way; a graph captures `calls` calls."""
    graphs, times = {}, {}
    for name, run in ways.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.synchronize()
        graphs[name], times[name] = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graphs[name]):
            for _ in range(calls):
                run()
    for _ in range(REPEATS):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / calls)
    return {name: statistics.median(found) for name, found in times.items()}


def peaks() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy on this card."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b, c = torch.empty_like(a), a.new_empty(1 << 30)
    d = torch.empty_like(c)
    times = interleaved({"product": lambda: torch.mm(a, a, out=b), "copy": lambda: d.copy_(c)}, 3)
    return {"flops": 2 * 8192**3 / times["product"], "bytes": 4 * c.numel() / times["copy"]}


def draw(*shape: int) -> Tensor:
    """A random bfloat16 tensor, scaled so that products keep their size."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


def mlp(model: str, batch: int) -> tuple[Ways, int, int]:
    """Ways to compute x + mlp(norm(x)), its FLOPs, and its bytes of inputs and outputs."""
    d, r, _ = SIZES[model]
    x, hidden = draw(batch, TOKENS, d), 4 * d
    v1, u1, b1, v2, u2, b2 = (draw(*shape) for shape in (
        (d, r), (hidden, r), (hidden,), (hidden, r), (d, r), (d,)))
    w1, w2, down1, down2 = draw(hidden, d), draw(d, hidden), v1.T.contiguous(), v2.T.contiguous()

    def norm() -> Tensor:
        return F.layer_norm(x, (d,), eps=EPSILON)

    def plain() -> Tensor:
        h = F.gelu(F.linear(F.linear(norm(), down1), u1, b1))
        return x + F.linear(F.linear(h, down2), u2, b2)

    ways = {
        "ours": lambda: ops.low_rank_mlp(x, v1, u1, b1, v2, u2, b2, "gelu", epsilon=EPSILON,
                                         residual=x),
        "same ranks, PyTorch": plain,
        "dense, PyTorch": lambda: x + F.linear(F.gelu(F.linear(norm(), w1, b1)), w2, b2),
    }
    rows, weights = batch * TOKENS, r * 10 * d
    return ways, 2 * rows * weights, 2 * (2 * rows * d + weights)


def attention(model: str, batch: int) -> tuple[Ways, int, int]:
    """Ways to compute x + attention(norm(x)), its FLOPs, and its bytes of inputs and outputs."""
    d, _, heads = SIZES[model]
    x, rank = draw(batch, TOKENS, d), RANK * heads
    joint, wo, bo, bq = draw(3 * rank, d), draw(d, rank), draw(d), draw(rank)
    wq, wk, wv = joint.split(rank)
    dense, dense_bias, w = draw(3 * d, d), draw(3 * d), draw(d, d)
    bias = torch.cat([bq, bq.new_zeros(2 * rank)])

    def library(weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        qkv = F.linear(F.layer_norm(x, (d,), eps=EPSILON), weight, bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5)
        return x + F.linear(y.transpose(1, 2).flatten(2), out, bo)

    ways = {
        "ours": lambda: ops.low_rank_attention(x, wq, bq, wk, wv, wo, bo, heads, HEAD**-0.5,
                                               epsilon=EPSILON, residual=x),
        "same ranks, PyTorch": lambda: library(joint, bias, wo),
        "dense, PyTorch": lambda: library(dense, dense_bias, w),
    }
    rows = batch * TOKENS
    flops = 2 * rows * (4 * rank * d + 2 * TOKENS * rank)
    return ways, flops, 2 * (2 * rows * d + 4 * rank * d)


def linear(model: str, batch: int) -> tuple[Ways, int, int]:
    """Ways to compute gelu(low_rank_linear(x)), FLOPs, bytes of inputs and outputs."""
    d, r, _ = SIZES[model]
    x, v, u, b, w = (draw(*s) for s in ((batch, TOKENS, d), (d, r), (4 * d, r), (4 * d,),
                                        (4 * d, d)))

    def on(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with backends.use_backend(backend):
                return ops.low_rank_linear(x, v, u, b, "gelu")
        return run

    names = {"triton": "Triton", "cuda": "CUDA", "reference": "same ranks, PyTorch"}
    ways = {label: on(name) for name, label in names.items() if not backends.available()[name]}
    ways["dense, PyTorch"] = lambda: F.gelu(F.linear(x, w, b))
    rows, weights = batch * TOKENS, 5 * d * r
    return ways, 2 * rows * weights, 2 * (5 * rows * d + weights)


def on_triton(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """An op that runs on Triton only where that is asked for."""
    def asked() -> Tensor:
        with backends.use_backend("triton"):
            return run()
    return asked


def gated_mlp(model: str, batch: int, low_rank: bool) -> tuple[Ways, int, int]:
    """Ways to compute x + swiglu(norm(x)) as in EVA-02, FLOPs, bytes of inputs and outputs."""
    d = SIZES[model][0]
    hidden, r = 8 * d // 3, 128
    x, bg, b1, b2 = draw(batch, TOKENS, d), draw(hidden), draw(hidden), draw(d)
    v1, v2 = (draw(d, r), draw(hidden, r)) if low_rank else (None, None)
    inner, outer = (r, r) if low_rank else (d, hidden)
    wg, w1, w2 = draw(hidden, inner), draw(hidden, inner), draw(d, outer)
    weights = (v1, wg, bg, w1, b1, v2, w2, b2)
    gate, up, down = draw(hidden, d), draw(hidden, d), draw(d, hidden)

    def sublayer() -> Tensor:
        return inference.gated_mlp(x, *weights, "silu", epsilon=EPSILON, residual=x)

    def dense() -> Tensor:
        normed = F.layer_norm(x, (d,), eps=EPSILON)
        h = F.silu(F.linear(normed, gate, bg)) * F.linear(normed, up, b1)
        return x + F.linear(h, down, b2)

    ways = {
        "ours": on_triton(sublayer),
        "same ranks, PyTorch": lambda: x + reference.gated_mlp(
            F.layer_norm(x, (d,), eps=EPSILON), *weights, "silu"),
        "dense, PyTorch": dense,
    }
    size = sum(t.numel() for t in weights if t is not None)
    rows = batch * TOKENS
    return ways, 2 * rows * size, 2 * (2 * rows * d + size)


def rotary_attention(model: str, batch: int, low_rank: bool) -> tuple[Ways, int, int]:
    """Ways to compute x + attention(norm(x)) with turned queries and keys, as in DINOv3."""
    d, _, heads = SIZES[model]
    x, values, rank = draw(batch, TOKENS, d), 48 * heads, d // 4
    angle = torch.randn(TOKENS - 1, HEAD, device="cuda")
    sin, cos = angle.sin().bfloat16(), angle.cos().bfloat16()
    vq, vk = (draw(d, rank), draw(d, rank)) if low_rank else (None, None)
    wq, wk = (draw(d, rank if low_rank else d) for _ in range(2))
    weights = (vq, wq, draw(d), vk, wk, draw(d), draw(values, d), draw(d, values), draw(d))
    options = (heads, HEAD**-0.5, sin, cos, True)
    joint, joint_bias, out = draw(3 * d, d), draw(3 * d), draw(d, d)

    def sublayer() -> Tensor:
        return inference.rotary_attention(x, *weights, *options, epsilon=EPSILON, residual=x)

    def dense() -> Tensor:
        qkv = F.linear(F.layer_norm(x, (d,), eps=EPSILON), joint, joint_bias)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (reference.rotate(t, sin, cos, True) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5)
        return x + F.linear(y.transpose(1, 2).flatten(2), out, weights[-1])

    ways = {
        "ours": on_triton(sublayer),
        "same ranks, PyTorch": lambda: x + reference.rotary_attention(
            F.layer_norm(x, (d,), eps=EPSILON), *weights, *options),
        "dense, PyTorch": dense,
    }
    size = sum(t.numel() for t in weights if t is not None)
    rows = batch * TOKENS
    return ways, 2 * rows * (size + TOKENS * (d + values)), 2 * (2 * rows * d + size)


def measure_ops() -> Iterator[Row]:
    """Each sublayer of each model at each batch size."""
    card = peaks()
    yield {"what": "peaks", **card}
    forms = {f"{sublayer.__name__}, {form}": partial(sublayer, low_rank=form == "low-rank")
             for sublayer in (gated_mlp, rotary_attention) for form in ("low-rank", "dense")}
    for name, sublayer in ({f.__name__: f for f in (mlp, attention, linear)} | forms).items():
        for model in SIZES:
            for batch in BATCHES:
                ways, flops, size = sublayer(model, batch)
                times = interleaved(ways)
                floor = max(flops / card["flops"], size / card["bytes"])
                yield {"what": f"{name} {model} b{batch}", "seconds": times,
                       "fraction of the roofline": floor / next(iter(times.values()))}


def measure_svd() -> Iterator[Row]:
    """SVDs without CUDA graphs, since both functions read back whether they converged."""
    for count, side in ((144, 64), (4096, 32)):
        a = torch.randn(count, side, side, device="cuda")
        times: dict[str, list[float]] = {"ours": [], "torch.linalg.svd": []}
        for _ in range(REPEATS):
            for name, found in times.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                with backends.use_backend("cuda" if name == "ours" else "reference"):
                    decompositions.batched_svd(a) if name == "ours" else torch.linalg.svd(a)
                stop.record()
                torch.cuda.synchronize()
                found.append(start.elapsed_time(stop) / 1e3)
        yield {"what": f"svd {count} x {side} x {side}",
               "seconds": {name: statistics.median(found) for name, found in times.items()}}


def measure_models(dtype: torch.dtype, batches: tuple[int, ...]) -> Iterator[Row]:
    """Whole models, and at batch 8 their relative error against float64."""
    for name in MODELS:
        torch.manual_seed(0)
        architecture, rank, rank_mlp = MODELS[name]
        dense = timm.create_model(architecture).eval().requires_grad_(False)
        ours = low_rank(dense, rank, rank_mlp)
        exact = copy.deepcopy(ours).cuda().double()
        models: dict[str, nn.Module] = {
            "same ranks, PyTorch": peers.plain(copy.deepcopy(ours)).cuda().to(dtype),
            "dense, PyTorch": dense.cuda().to(dtype),
        }
        models = {"ours": adacomcat.optimize(ours.cuda().to(dtype)), **models}
        for batch in batches:
            x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=dtype)
            times = interleaved({label: partial(model, x) for label, model in models.items()}, 1)
            row: Row = {"what": f"{architecture} {dtype} b{batch}", "seconds": times}
            if batch == 8:
                reference = exact(x.double())
                row["errors"] = {label: ((model(x).double() - reference).norm()
                                         / reference.norm()).item()
                                 for label, model in models.items() if "dense" not in label}
            yield row


def main(part: str = "") -> int:
    """Test and measure; the exit code of the tests. ``part``: 'ops' or 'models' alone, untested."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run and nothing was written")
        return 0
    failed = 0
    if not part:
        tests = HERE.parents[1] / "tests" / "gpu"
        command = [sys.executable, "-m", "pytest", "-q", tests, "-k", "device"]
        failed = subprocess.run(command).returncode
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                                "triton": triton.__version__, "rows": []}
    name = found["gpu"].lower().replace(" ", "_") + (f"_{part}" if part else "")
    with torch.no_grad():
        for wanted, rows in (
            ("ops", measure_ops), ("ops", measure_svd),
            ("models", lambda: measure_models(torch.bfloat16, BATCHES)),
            ("models", lambda: measure_models(torch.float32, (8, 64))),
        ):
            for row in rows() if part in ("", wanted) else ():
                found["rows"].append(row)
                print(told(row), flush=True)
                (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return failed


def told(row: Row) -> str:
    """One line: the microseconds of each way with their ratio to ours, then all other values."""
    row = dict(row)
    times = row.pop("seconds", {})
    first = next(iter(times.values()), 1.0)
    return "; ".join([
        *(f"{name} {time * 1e6:.1f} us ({time / first:.2f})" for name, time in times.items()),
        *(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
          for key, value in row.items())])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
