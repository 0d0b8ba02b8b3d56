"""`make gpu-check`: correctness and timings of the GPU kernels, where there is a GPU.

    python bench/gpu/check.py
    python bench/gpu/check.py models
    python bench/gpu/check.py --dry-run

First the tests of tests/gpu that need a GPU run; ``ops`` or ``models`` skips them and takes only
those timings. A timing is the median of CUDA events around replays of a CUDA graph. Our kernels, as
they are chosen by default, and the alternatives take turns; of gated MLPs and rotary attentions
Triton is measured, whether it is the default or not. Rooflines use the card's bandwidth and
arithmetic as measured here. The results go to bench/gpu/*.json, and those of whole models also to
*.csv, with the columns of timm's benchmarks. A dry run goes through all of it on the CPU, for one
image, and writes nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from clock import Ways, in_turn, interleaved, on_gpu
from models import Row, as_timm_writes, measure_models
from torch import Tensor

from adacomcat import ops
from adacomcat.ops import backends, decompositions, inference, reference

HERE = Path(__file__).parent

BATCHES = (1, 8, 64, 256)
SIZES = {"DeiT-S": (384, 128, 6), "DeiT-B": (768, 256, 12)}  # width, rank of the MLP, heads
RANK, HEAD, TOKENS, EPSILON = 32, 64, 197, 1e-6


def peaks() -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes/s of a large copy on this card."""
    side, elements = (8192, 1 << 30) if on_gpu() else (64, 1 << 10)
    a = torch.randn(side, side, dtype=torch.bfloat16)
    b, c = torch.empty_like(a), a.new_empty(elements)
    d = torch.empty_like(c)
    times = interleaved({"product": lambda: torch.mm(a, a, out=b), "copy": lambda: d.copy_(c)}, 3)
    return {"flops": 2 * side**3 / times["product"], "bytes": 4 * elements / times["copy"]}


def draw(*shape: int) -> Tensor:
    """A random bfloat16 tensor, scaled so that products keep their size."""
    return torch.randn(*shape, dtype=torch.bfloat16) / shape[-1] ** 0.5


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
    return with_cuda(ways), 2 * rows * weights, 2 * (2 * rows * d + weights)


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
    return with_cuda(ways), flops, 2 * (2 * rows * d + 4 * rank * d)


def with_cuda(ways: Ways) -> Ways:
    """The ways, and ours on the kernels in CUDA C++ where they were built."""
    if backends.available()["cuda"]:
        return ways

    def run() -> object:
        with backends.use_backend("cuda"):
            return ways["ours"]()

    return {**ways, "CUDA": run}


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
    """An op that runs on Triton only where that is asked for; a dry run has no Triton."""
    if not on_gpu():
        return run

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
    angle = torch.randn(TOKENS - 1, HEAD)
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


def measure_ops(batches: tuple[int, ...]) -> Iterator[Row]:
    """Each sublayer of each model at each batch size."""
    card = peaks()
    yield {"what": "peaks", **card}
    forms = {f"{sublayer.__name__}, {form}": partial(sublayer, low_rank=form == "low-rank")
             for sublayer in (gated_mlp, rotary_attention) for form in ("low-rank", "dense")}
    for name, sublayer in ({f.__name__: f for f in (mlp, attention, linear)} | forms).items():
        for model in SIZES:
            for batch in batches:
                ways, flops, size = sublayer(model, batch)
                times = interleaved(ways)
                floor = max(flops / card["flops"], size / card["bytes"])
                yield {"what": f"{name} {model} b{batch}", "seconds": times,
                       "fraction of the roofline": floor / next(iter(times.values()))}


def measure_svd() -> Iterator[Row]:
    """SVDs without CUDA graphs, since both functions read back whether they converged."""
    for count, side in ((144, 64), (4096, 32)) if on_gpu() else ((3, 8),):
        a = torch.randn(count, side, side)

        def ours(a: Tensor = a) -> object:
            with backends.use_backend("cuda") if on_gpu() else nullcontext():
                return decompositions.batched_svd(a)

        yield {"what": f"svd {count} x {side} x {side}", "seconds": in_turn({
            "ours": ours, "torch.linalg.svd": lambda a=a: torch.linalg.svd(a)})}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=("ops", "models"),
                        help="only these timings, and no tests")
    parser.add_argument("--dry-run", action="store_true",
                        help="go through the timings on the CPU and write nothing")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Test and measure; the exit code of the tests."""
    args = arguments(given)
    if not args.dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing was run and nothing was written; --dry-run runs on the CPU")
        return 0
    failed = 0
    if not args.part and not args.dry_run:
        tests = HERE.parents[1] / "tests" / "gpu"
        command = [sys.executable, "-m", "pytest", "-q", tests, "-k", "device"]
        failed = subprocess.run(command).returncode
    with torch.no_grad(), torch.device("cpu" if args.dry_run else "cuda"):
        rows = []
        for row in measure(args.part, (1,) if args.dry_run else BATCHES):
            rows.append(row)
            print(told(row), flush=True)
            if not args.dry_run:
                write(rows, args.part)
        if args.dry_run:
            print(as_timm_writes([row for row in rows if "cold seconds" in row]), end="")
    return failed


def measure(part: str | None, batches: tuple[int, ...]) -> Iterator[Row]:
    if part != "models":
        yield from measure_ops(batches)
        yield from measure_svd()
    if part != "ops":
        yield from measure_models(torch.bfloat16, batches)
        yield from measure_models(torch.float32, batches[1:3] or batches)


def write(rows: list[Row], part: str | None) -> None:
    """The card's files, anew after each row."""
    card = torch.cuda.get_device_name()
    name = card.lower().replace(" ", "_") + (f"_{part}" if part else "")
    found = {"gpu": card, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}
    (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    models = [row for row in rows if "cold seconds" in row]
    if models:
        (HERE / f"{name}.csv").write_text(as_timm_writes(models), encoding="utf-8")


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
    sys.exit(main())
