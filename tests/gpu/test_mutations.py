"""The emulator is only worth what it notices: kernels are damaged in one place, and it must."""

from collections import Counter
from itertools import islice

import pytest
import torch
from cases import draw
from mutations import KINDS
from ptx.emulate import emulated
from ptx.memory import Fault
from ptx.parser import Kernel
from shapes import Case

from adacomcat.kernels import load, tiles
from adacomcat.kernels.reductions import weight_grad

LINEAR = Case("low_rank_linear", "mutated", {"lead": (150,), "d": 150, "r": 30, "out": 70},
              {"ACTIVATION": "relu"})
ATTENTION = Case("low_rank_attention", "mutated",
                 dict(batch=1, tokens=150, d=32, rank_qk=32, rank_vo=32),
                 {"NUM_HEADS": 1, "SCALE": 0.2})


def linear() -> torch.Tensor:
    tile = tiles.Tile(64, 32, 32, 4, 3)
    return load("low_rank_linear").forward(*draw(LINEAR, torch.float16), tile=tile)[0]


def attention() -> torch.Tensor:
    tile = tiles.Tile(64, 32, 32, 4, 3)
    return load("low_rank_attention").forward(*draw(ATTENTION, torch.float16), tile=tile)[0]


def reduction() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(230, n, generator=generator).half() for n in (128, 64))
    return weight_grad(a, b)


RUNS = {
    "low_rank_linear_kernel": linear,
    "attention_kernel": attention,
    "weight_grad_kernel": reduction,
}


def noticed(name: str, architecture: str, kind: str) -> Counter:
    """How many mutants of one kernel are caught: a fault, or another result."""
    with emulated(architecture) as launches:
        right = RUNS[name]()
    original = next(launch.kernel for launch in launches if launch.name == name)
    tally: Counter = Counter()
    # There are hundreds of guards, all alike.
    for mutant in islice(KINDS[kind](original), 0, None, 8 if kind == "guards" else 1):

        def swap(kernel: Kernel, mutant: Kernel = mutant) -> Kernel:
            return mutant if kernel is original else kernel

        tally["all"] += 1
        try:
            with emulated(architecture, mutate=swap):
                tally["caught"] += not torch.equal(RUNS[name](), right)
        except Fault:
            tally["caught"] += 1
    return tally


@pytest.fixture(scope="module")
def tallies() -> dict[tuple[str, str, str], Counter]:
    return {
        (name, architecture, kind): noticed(name, architecture, kind)
        for name in RUNS
        for architecture in ("sm_80", "sm_90")
        for kind in KINDS
    }


def total(tallies: dict, kind: str) -> Counter:
    found: Counter = Counter()
    for (_, _, k), tally in tallies.items():
        found += tally if k == kind else Counter()
    return found


# Compilers emit barriers that can go: of 41 here 10 are missed, and those inspected have another
# barrier between them and the shared memory that they could guard. Guards may be dropped where
# nobody looks at the value that is then loaded, or at the place that is then stored to.
LEAST = {"barriers": 0.75, "waits": 1.0, "weak waits": 1.0, "transposes": 1.0, "operands": 1.0,
         "guards": 0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed(kind: str, tallies: dict) -> None:
    tally = total(tallies, kind)
    assert tally["all"] >= 5
    found = {key: dict(value) for key, value in tallies.items() if key[2] == kind}
    assert tally["caught"] >= LEAST[kind] * tally["all"], found


def test_nine_in_ten_barriers_waits_and_operands(tallies: dict) -> None:
    kinds = ("barriers", "waits", "weak waits", "operands")
    tally = sum((total(tallies, kind) for kind in kinds), Counter())
    assert tally["caught"] >= 0.9 * tally["all"]
