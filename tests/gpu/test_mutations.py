"""The emulator is only worth what it notices: kernels are damaged in one place, and it must."""

from collections import Counter
from itertools import islice
from unittest.mock import patch

import torch
from cases import draw, incoming
from mutations import KINDS, place_of
from ptx.emulate import emulated
from ptx.memory import Fault
from ptx.parser import Kernel
from shapes import Case

from adacomcat.kernels import load, tiles
from adacomcat.kernels.reductions import weight_grad

LINEAR = Case("low_rank_linear", "mutated", {"lead": (150,), "d": 150, "r": 30, "out": 70},
              {"ACTIVATION": "relu"})
MLP = Case("low_rank_mlp", "mutated",
           {"lead": (100,), "d": 128, "r1": 32, "hidden": 180, "r2": 32, "out": 64},
           {"ACTIVATION": "relu"})
ATTENTION = Case("low_rank_attention", "mutated",
                 dict(batch=1, tokens=150, d=32, rank_qk=32, rank_vo=32),
                 {"NUM_HEADS": 1, "SCALE": 0.2})


def apart(x: torch.Tensor, padding: int = 50) -> torch.Tensor:
    """The same matrix with NaN between its rows, so that who reads there does not go unnoticed."""
    wide = x.new_full((x.shape[0], x.shape[1] + padding), torch.nan)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def linear() -> torch.Tensor:
    x, v, u, bias, activation, residual = draw(LINEAR, torch.float16)
    x, v, u, residual = map(apart, (x, v, u, residual))
    tile = tiles.Tile(64, 32, 32, 4, 3)
    arguments = (x, v, u, bias, activation, residual)
    return load("low_rank_linear").forward(*arguments, tile=tile)[0]


def attention() -> torch.Tensor:
    tile = tiles.Tile(64, 32, 32, 4, 3)
    return load("low_rank_attention").forward(*draw(ATTENTION, torch.float16), tile=tile)[0]


def reduction() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(230, n, generator=generator).half() for n in (128, 64))
    return weight_grad(a, b)


def mlp_arguments() -> list:
    return [apart(a, 48) if isinstance(a, torch.Tensor) and a.dim() == 2 else a
            for a in draw(MLP, torch.float16)]


def mlp() -> torch.Tensor:
    """Two programs share the same rows, with several steps along the hidden layer each."""
    tile = tiles.Tile(64, 32, 32, 4, 3)
    with patch.object(tiles, "multiprocessors", lambda: 4):
        return load("low_rank_mlp").forward(*mlp_arguments(), keep=False, tile=tile)[0]


def mlp_backward() -> torch.Tensor:
    """The gradient of x."""
    arguments, sizes = mlp_arguments(), MLP.sizes
    grad = apart(incoming(MLP, arguments), 48)
    generator = torch.Generator().manual_seed(4)
    middle1 = torch.randn(*sizes["lead"], sizes["r1"], generator=generator).half()
    tile = tiles.Tile(64, 32, 32, 4, 3)
    with patch.object(tiles, "multiprocessors", lambda: 4):
        return load("low_rank_mlp").backward(
            grad, *arguments, apart(middle1, 48), None, needs=[True] + [False] * 6, tile=tile)[0]


# Which mutants of the MLP's kernels are caught is told for those kinds of damage alone for which it
# is known which of them change nothing.
EVERY = tuple(KINDS)
RUNS = {
    "low_rank_linear_kernel": (linear, EVERY),
    "attention_kernel": (attention, EVERY),
    "weight_grad_kernel": (reduction, EVERY),
    "low_rank_mlp_kernel": (mlp, ("barriers", "operands")),
    "expand_parts_kernel": (mlp, ("barriers", "operands")),
    "low_rank_mlp_backward_kernel": (mlp_backward, ("barriers", "operands")),
}


def noticed(name: str, architecture: str, kind: str) -> Counter:
    """How many mutants of one kernel are caught (a fault, or another result), missed, and spare:
    those that change nothing that could be noticed.
    """
    run, _ = RUNS[name]
    with emulated(architecture, trace=kind == "barriers") as launches:
        right = run()
    launch = next(launch for launch in launches if launch.name == name)
    original, machine, tally = launch.kernel, launch.machine, Counter()
    # There are hundreds of guards, all alike.
    for mutant in islice(KINDS[kind](original), 0, None, 4 if kind == "guards" else 1):

        def swap(kernel: Kernel, mutant: Kernel = mutant) -> Kernel:
            return mutant if kernel is original else kernel

        try:
            with emulated(architecture, mutate=swap):
                caught = not torch.equal(run(), right)
        except Fault:
            caught = True
        place = place_of(mutant, original)
        spare = (kind == "barriers" and machine.trace.spare_barrier(place)
                 or kind == "guards" and place not in machine.held_back)
        tally["caught but spare"] += caught and spare
        tally["caught" if caught else "spare" if spare else "missed"] += 1
    return tally


# Of what is not spare. One fence in five stands before a loop that has its own. A guard is missed
# where the value is loaded for a place that is not stored.
LEAST = {"barriers": 1.0, "fences": 0.8, "waits": 1.0, "weak waits": 1.0, "transposes": 1.0,
         "operands": 1.0, "guards": 0.9}


def test_damage_is_noticed() -> None:
    """One test, so that workers do not count the same mutants twice."""
    found = {kind: {(name, architecture): noticed(name, architecture, kind)
                    for name, (_, kinds) in RUNS.items() if kind in kinds
                    for architecture in ("sm_80", "sm_90")} for kind in KINDS}
    totals = {kind: sum(tallies.values(), Counter()) for kind, tallies in found.items()}
    for kind, tally in totals.items():
        assert tally["caught"] >= 4
        assert tally["caught"] >= LEAST[kind] * (tally["caught"] + tally["missed"]), found[kind]
        # What is spare is told by other code than what is caught, and they never contradict.
        assert tally["caught but spare"] == 0, found[kind]
    # The record may not call too many spare. Of the MLP's barriers it does a third.
    assert totals["barriers"]["spare"] <= 0.4 * totals["barriers"]["caught"]
    others = sum((tally for (name, _), tally in found["barriers"].items()
                  if RUNS[name][1] == EVERY), Counter())
    assert others["spare"] <= 0.25 * others["caught"]
    print({kind: dict(tally) for kind, tally in totals.items()})
