"""Every op's backends, timed on this machine: what ``adacomcat doctor --measure`` keeps.

The shapes are those of a block of DeiT-S at half its parameters, for one image on a CPU and for 32
on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adacomcat import ops
from adacomcat.latency.timing import interleaved
from adacomcat.ops import backends, inference, measured
from adacomcat.ops.decompositions import batched_svd

TOKENS, WIDTH, HIDDEN, HEADS, RANK, HEAD_RANK = 197, 384, 1536, 6, 128, 32
GATED = 1024  # hidden neurons of a gated MLP, of EVA-02 in this width
BATCH = {"cpu": 1, "cuda": 32}
REPEATS, SECONDS = 10, 1.5  # of one op in one dtype: some forty of them take about a minute

# Runs by backend → their milliseconds. Tests put a model of cost in the place of the clock.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, float]]


class Sample(NamedTuple):
    """One op with arguments: ``run`` calls it on ``tensors``, of which the first one decides."""

    op: str
    tensors: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    trains: bool = True


def measure(device: torch.device, timer: Timer | None = None) -> measured.Times:
    """Milliseconds of each backend that can run an op here, where there is more than one.

    Args:
        device: a CPU or a GPU.
        timer: what measures; None: the clock.
    """
    timer = timer or (lambda runs: interleaved(runs, REPEATS, SECONDS))
    found = {}
    for sample in samples(device):
        names = backends.compatible_backends(sample.op, sample.tensors[0])
        for training in (False, True)[:1 + sample.trains] if len(names) > 1 else ():
            key = measured.key(sample.op, sample.tensors[0].dtype, training)
            found[key] = timer({name: _on(name, sample, training) for name in names})
    return found


def _on(backend: str, sample: Sample, training: bool) -> Callable[[], object]:
    """A call of the op on one backend; in training with the gradients of all its tensors."""
    def run() -> object:
        with backends.use_backend(backend):
            if not training:
                return sample.run(*sample.tensors)
            with torch.inference_mode(False), torch.enable_grad():
                tensors = [tensor.detach().requires_grad_() for tensor in sample.tensors]
                return torch.autograd.grad(sample.run(*tensors).float().sum(), tensors)
    return run


def samples(device: torch.device) -> Iterator[Sample]:
    """Every op that has kernels to choose from and that models call, in each dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    attention, batch = HEADS * HEAD_RANK, BATCH[device.type]
    x = draw(batch, TOKENS, WIDTH)
    factors = (draw(WIDTH, RANK), draw(HIDDEN, RANK), draw(HIDDEN))
    back = (draw(HIDDEN, RANK), draw(WIDTH, RANK), draw(WIDTH))
    rows = [draw(attention, WIDTH) for _ in range(3)]
    for dtype in backends.KERNEL_DTYPES:
        def cast(*tensors: Tensor, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device, dtype) for tensor in tensors)

        yield Sample("low_rank_linear", cast(x, *factors), ops.low_rank_linear)
        yield Sample("gated_low_rank_linear", cast(x, factors[0], draw(RANK), *factors[1:]),
                     ops.gated_low_rank_linear)
        yield Sample("low_rank_mlp", cast(x, *factors, *back),
                     partial(ops.low_rank_mlp, activation="gelu"))
        yield Sample("dense_mlp", cast(x, draw(HIDDEN // 2, WIDTH), draw(HIDDEN // 2),
                                       draw(WIDTH, HIDDEN // 2), draw(WIDTH)),
                     partial(ops.dense_mlp, activation="gelu"))
        yield Sample("low_rank_attention",
                     cast(x, rows[0], draw(attention), *rows[1:], draw(WIDTH, attention),
                          draw(WIDTH)),
                     partial(ops.low_rank_attention, num_heads=HEADS, scale=64 ** -0.5))
        yield Sample("gated_mlp", cast(x, factors[0], draw(GATED, RANK), draw(GATED, RANK),
                                       draw(GATED, RANK), draw(WIDTH, RANK)), _gated, trains=False)
        yield Sample("rotary_attention",
                     cast(x, *(draw(WIDTH, WIDTH) for _ in range(2)), rows[0],
                          draw(WIDTH, attention),
                          *(draw(TOKENS, WIDTH // HEADS) for _ in range(2))),
                     _rotary, trains=False)
    for dtype in backends.DECOMPOSITION_DTYPES:
        yield Sample("batched_svd", (draw(HEADS, 64, 64).to(device, dtype),),
                     lambda a: batched_svd(a)[1])


def _gated(x: Tensor, v1: Tensor, wg: Tensor, w1: Tensor, v2: Tensor, w2: Tensor) -> Tensor:
    return inference.gated_mlp(x, v1, wg, None, w1, None, v2, w2, None, "silu")


def _rotary(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, sin: Tensor, cos: Tensor
            ) -> Tensor:
    return inference.rotary_attention(x, None, wq, None, None, wk, None, wv, wo, None, HEADS,
                                      64 ** -0.5, sin, cos, True)
