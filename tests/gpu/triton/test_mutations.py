"""The emulator notices kernels that are damaged in one place."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from kernel_cases import Case, draw, incoming, run_kernels
from ptx.emulate import Launch, emulated
from ptx.machine import Machine
from ptx.memory import Fault
from ptx.mutations import ALL_MUTANTS, KINDS, place_of
from ptx.parser import Kernel

from adacomcat.kernels import load, tiles
from adacomcat.kernels import reductions as sums
from adacomcat.kernels.expand_splits import expand_splits
from adacomcat.kernels.matmul import matmul_sum, project
from adacomcat.kernels.reductions import weight_and_bias_grads, weight_grad

LINEAR = Case("low_rank_linear", "mutated", {"lead": (150,), "d": 150, "r": 30, "out": 70},
              {"ACTIVATION": "relu"})
MLP = Case("low_rank_mlp", "mutated",
           {"lead": (100,), "d": 128, "r1": 32, "hidden": 180, "r2": 32, "out": 64},
           {"ACTIVATION": "relu"})
ATTENTION = Case("low_rank_attention", "mutated",
                 dict(batch=1, tokens=150, d=32, rank_qk=32, rank_vo=32),
                 {"NUM_HEADS": 1, "SCALE": 0.2})
GATED = Case("gated_mlp", "mutated", MLP.sizes, {"ACTIVATION": "silu"})


def apart(x: torch.Tensor, padding: int = 50) -> torch.Tensor:
    """The same matrix with NaN between its rows, so that a read between rows shows."""
    wide = x.new_full((x.shape[0], x.shape[1] + padding), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def normal(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(size, generator=generator).half()


def linear() -> None:
    x, v, u, bias, activation, residual = draw(LINEAR, torch.float16)
    x, v, u, residual = map(apart, (x, v, u, residual))
    load("low_rank_linear").forward(x, v, u, bias, activation, residual, tile=TILE)


def linear_backward() -> None:
    """The gradients of x and of the middle."""
    x, v, u, bias, activation, _ = draw(LINEAR, torch.float16)
    grad, middle = incoming(LINEAR, [x]), normal(*LINEAR.sizes["lead"], LINEAR.sizes["r"])
    load("low_rank_linear").backward(
        apart(grad), x, apart(v), apart(u), bias, activation, apart(middle),
        needs=[True, True, False, False], tile=TILE)


def attention() -> None:
    load("low_rank_attention").forward(*draw(ATTENTION, torch.float16), tile=TILE)


def attention_backward() -> None:
    arguments = draw(ATTENTION, torch.float16)
    run_kernels(ATTENTION, arguments, incoming(ATTENTION, arguments), TILE)


def projection() -> None:
    project(apart(normal(150, 90)), normal(70), *(apart(normal(n, 90)) for n in (70, 70, 40)),
            tile=TILE)


def expansion() -> None:
    """One matrix with bias, activation, residual and grad; only its columns fill whole tiles."""
    residual, grad = normal(150, 64), normal(150, 64)
    project(apart(normal(150, 90)), normal(64), apart(normal(64, 90)), activation="relu",
            residual=residual, grad=grad, tile=TILE)


def summed_projections() -> None:
    matmul_sum(*((apart(normal(150, n)), apart(normal(n, 64))) for n in (90, 90, 40)), tile=TILE)


def reduction() -> None:
    weight_grad(normal(230, 128), normal(230, 64))


def reductions() -> None:
    """The gradients of U and b through an activation."""
    grad, middle, u = apart(normal(230, 64)), apart(normal(230, 30)), apart(normal(64, 30))
    weight_and_bias_grads(grad, middle, u, normal(64), "relu", (True, True))


def arguments_of(case: Case) -> list:
    return [apart(a, 48) if isinstance(a, torch.Tensor) and a.dim() == 2 else a
            for a in draw(case, torch.float16)]


def mlp() -> None:
    """Two programs share the same rows, with several steps along the hidden layer each."""
    with patch.object(tiles, "multiprocessors", lambda: 8):
        load("low_rank_mlp").forward(*arguments_of(MLP), keep_intermediates=False, tile=TILE)


def mlp_apart() -> None:
    """With x V1 as a product of its own."""
    with patch.object(tiles, "takes_two_launches", lambda *shape: True):
        mlp()


def mlp_backward() -> None:
    """The gradient of x."""
    arguments = arguments_of(MLP)
    grad = apart(incoming(MLP, arguments), 48)
    middle1 = apart(normal(*MLP.sizes["lead"], MLP.sizes["r1"]), 48)
    with patch.object(tiles, "multiprocessors", lambda: 8):
        load("low_rank_mlp").backward(
            grad, *arguments, middle1, None, needs=[True] + [False] * 6, tile=TILE)


def mlp_backward_apart() -> None:
    with patch.object(tiles, "takes_two_launches", lambda *shape: True):
        mlp_backward()


def hidden_grads() -> None:
    middle1, dmiddle2, u1, v2 = (apart(normal(n, 32), 48) for n in (150, 150, 70, 70))
    sums.hidden_grads(middle1, dmiddle2, u1, normal(70), v2, "relu", True, True, True)


def unaligned_splits() -> None:
    """Partial sums have no gaps between their rows; every other row is NaN instead."""
    partial = normal(2, 50, 30).float()
    partial[:, 1::2] = torch.nan
    out = torch.empty(50, 50, dtype=torch.float16)
    with patch.object(tiles, "multiprocessors", lambda: 4):
        expand_splits(
            partial, apart(normal(50, 30)), normal(50), None, out, None, TILE)


def gated_mlp() -> None:
    with patch.object(tiles, "multiprocessors", lambda: 8):
        load("gated_mlp").forward(*arguments_of(GATED), tile=TILE)


def gated_projection() -> None:
    wg, w1 = apart(normal(140, 90)).chunk(2)
    load("gated_mlp").gated_project(
        apart(normal(150, 90)), wg, normal(70), w1, normal(70), "silu", tile=TILE)


def rotation() -> None:
    """Queries and keys of two factors, in two images whose first tokens do not turn.

    Both have one rank: the emulator wants every wgmma of the whole grid. Rows fill whole tiles,
    since angles that are read for other rows are never stored.
    """
    xq, xk = (x.view(2, 96, 90) for x in apart(normal(384, 90)).chunk(2))
    wq, wk = apart(normal(256, 90)).chunk(2)
    sin, cos = apart(normal(140, 64)).chunk(2)
    load("rotary_attention").rotary_project(
        xq, wq, normal(128), xk, wk, normal(128), 2, sin, cos, True, tile=TILE)


TILE = tiles.Tile(64, 32, 32, 4, 3)
RUNS = [
    ("low_rank_linear_kernel", linear),
    ("low_rank_linear_backward_kernel", linear_backward),
    ("attention_kernel", attention),
    ("attention_queries_backward_kernel", attention_backward),
    ("attention_keys_backward_kernel", attention_backward),
    ("project_kernel", projection),
    ("project_kernel", expansion),
    ("matmul_sum_kernel", summed_projections),
    ("weight_grad_kernel", reduction),
    ("weight_and_bias_grads_kernel", reductions),
    ("low_rank_mlp_kernel", mlp),
    ("low_rank_mlp_kernel", mlp_apart),
    ("expand_splits_kernel", mlp),
    ("expand_splits_kernel", unaligned_splits),
    ("low_rank_mlp_backward_kernel", mlp_backward),
    ("low_rank_mlp_backward_kernel", mlp_backward_apart),
    ("hidden_grads_kernel", hidden_grads),
    ("rotary_project_kernel", rotation),
] + ALL_MUTANTS * [
    ("gated_mlp_kernel", gated_mlp),
    ("gated_project_kernel", gated_projection),
]
# `make mutants` runs all on both architectures, `make test` each in turn on one.
PLACES = [(name, run, architecture) for at, (name, run) in enumerate(RUNS)
          for number, architecture in enumerate(("sm_80", "sm_90"))
          if ALL_MUTANTS or number == at % 2]
# Mutants of one kind in one kernel; of more, which are all alike, every second or third one runs.
MOST = 32


def spare(kind: str, place: int, machine: Machine) -> bool:
    """Whether a damage has no effect at all."""
    trace = machine.trace
    assert trace is not None
    if kind == "barriers":
        return trace.spare_barrier(place)
    if kind == "waits":
        return trace.spare_wait(place, math.inf)
    if kind == "weak waits":
        return trace.spare_wait(place, int(machine.kernel.code[place].operands[0], 0) + 1)
    if kind == "fences":
        return trace.spare_fence(place)
    if kind == "guards":
        copies = machine.kernel.code[place].parts[0] == "cp"
        return place not in (machine.shortened if copies else machine.held_back)
    return False


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, since NaN does not equal itself."""
    return t.contiguous().view(torch.uint8)


def caught(launch: Launch, mutant: Kernel, before: list, after: list) -> bool:
    """Whether the mutant is noticed: a fault, or another result."""
    tensors = launch.tensors.values()
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    try:
        launch.again(mutant, machine=launch.machine)
    except Fault:
        return True
    return not all(map(torch.equal, map(bits, tensors), map(bits, after)))


def noticed(name: str, run: Callable[[], None], architecture: str) -> dict[str, Counter]:
    """How many mutants of one kernel are caught, missed, and spare, for each kind of damage."""
    with emulated(architecture) as launches:
        run()
    launch = next(launch for launch in launches if launch.name == name)
    outputs = launch.outputs
    before = [torch.full_like(t, torch.nan) if name in outputs else t.clone()
              for name, t in launch.tensors.items()]
    after = [t.clone() for t in launch.tensors.values()]
    machine, found = launch.again(launch.kernel, trace=True).machine, {}
    for kind, damaged in KINDS.items():
        mutants, tally = list(damaged(launch.kernel)), Counter()
        for mutant in islice(mutants, 0, None, max(1, math.ceil(len(mutants) / MOST))):
            outcome = "caught" if caught(launch, mutant, before, after) else "missed"
            if spare(kind, place_of(mutant, launch.kernel), machine):
                outcome = "caught but spare" if outcome == "caught" else "spare"
            tally[outcome] += 1
        found[kind] = tally
    return found


# The least fraction noticed of damage with an effect. A dropped guard goes unnoticed where the
# loaded value is never stored.
LEAST = {kind: 0.9 if kind == "guards" else 1.0 for kind in KINDS}


@pytest.mark.parametrize("name, run, architecture", PLACES, ids=[
    f"{name}-{run.__name__}-{architecture}" for name, run, architecture in PLACES])
def test_damage_is_noticed(name: str, run: Callable[[], None], architecture: str) -> None:
    found = noticed(name, run, architecture)
    print(name, run.__name__, architecture, {kind: dict(tally) for kind, tally in found.items()})
    for kind, tally in found.items():
        assert tally["caught"] >= LEAST[kind] * (tally["caught"] + tally["missed"]), found
        # ptx/trace.py tells what is spare by other code than the race check; they must agree.
        assert tally["caught but spare"] == 0, found
    assert found["barriers"]["caught"] >= max(2, found["barriers"]["spare"]), found
    assert found["operands"]["caught"] >= 2 and found["guards"]["caught"] >= 4, found
