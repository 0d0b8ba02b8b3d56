"""Architectures of every family, on random weights, through every step; ``zoo.py try`` calls it.

Each is made low-rank at full rank and at 0.6 of its parameters, without images and with them, then
saved, loaded and optimised. Biases, norms and whatever else a constructor leaves at one value get
random numbers, so that each of them matters. Images have the size that the model was built for.
"""

import gc
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import zoo
import zoo_tables
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError
from adacomcat.errors import reason
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.model import input_size
from adacomcat.utils.progress import progress

KEEP = 0.6
IMAGES, CALIBRATION = 2, 4
NOISE = 0.05
# Relative differences that are rounding: of full rank in either precision, and of `optimize`.
SAME, SAME_DOUBLE, FUSED = 1e-5, 1e-12, 1e-4
LARGEST = 40e6  # parameters of an architecture that is tried as it is
EACH = 2  # architectures of a family that has a row in the docs; others have one
# Of families whose smallest architecture is larger: two blocks of the same width.
SHORTER: Mapping[str, Mapping[str, Any]] = {name: {"depth": 2} for name in (
    "beit_base_patch16_224", "beitv2_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m",
    "naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap", "qwen3_vit_88m",
    "samvit_base_patch16_224", "samvit_base_patch16")}


class Trial(NamedTuple):
    """What came of one architecture. Differences are relative.

    Attributes:
        name: timm's.
        family: Its module in timm.
        sites: How many there are.
        full_rank: Difference of the model at full rank from the dense one.
        precision: In which numbers that was measured.
        kept: 'data-free' and 'calibrated' → parameters kept, or why the budget was refused.
        loaded: Whether what was saved came back bit for bit.
        optimized: Difference that ``optimize`` makes.
        seconds: Of all steps.
        error: What went wrong.
    """

    name: str
    family: str
    sites: int = 0
    full_rank: float = 0.0
    precision: str = "float32"
    kept: Mapping[str, float | str] = {}
    loaded: bool = False
    optimized: float = 0.0
    seconds: float = 0.0
    error: str = ""

    @property
    def good(self) -> bool:
        limit = SAME if self.precision == "float32" else SAME_DOUBLE
        small = all(isinstance(kept, str) or kept <= KEEP for kept in self.kept.values())
        return (not self.error and self.full_rank <= limit and small and self.loaded
                and self.optimized <= FUSED)


def choice(entries: Sequence[zoo.Entry]) -> list[zoo.Entry]:
    """The smallest architectures of each family: of those that attend first."""
    found: list[zoo.Entry] = []
    families = zoo_tables.by_family(one for one in entries if not one.error).values()
    for inside in sorted(families, key=lambda inside: not zoo_tables.listed(inside)):
        small = [one for one in sorted(inside, key=lambda one: (not one.attends, one.params))
                 if one.params <= LARGEST or one.name in SHORTER]
        found += small[:EACH if zoo_tables.listed(inside) else 1]
    return found


def built(name: str) -> nn.Module:
    """The dense model, in eval mode; nothing in it is one value repeated."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model(name, **SHORTER.get(name, {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or parameter.numel() < 2 or not parameter.std():
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return model


def tried(name: str, family: str) -> Trial:
    """One architecture, every step."""
    start = time.perf_counter()
    try:
        found = _tried(name, family)
    except Exception as error:  # the others follow, and the table tells
        found = Trial(name, family, error=f"{type(error).__name__}: {reason(error)}")
    return found._replace(seconds=round(time.perf_counter() - start, 1))


@torch.no_grad()
def _tried(name: str, family: str) -> Trial:
    dense = built(name)
    x = torch.randn(IMAGES, *input_size(dense))
    sites = len(adacomcat.find_sites(dense))
    full_rank, precision = _full_rank(dense, x)
    made, kept = _kept(dense)
    return Trial(name, family, sites, full_rank, precision, kept, _same_when_loaded(made, x),
                 difference(adacomcat.optimize(made)(x), made(x)))


def _full_rank(dense: nn.Module, x: Tensor) -> tuple[float, str]:
    """The difference at full rank; in float64 where float32 rounds to more than allowed."""
    found = difference(_whole(dense)(x), dense(x))
    if found <= SAME:
        return found, "float32"
    double = adacomcat.utils.model.copied(dense).double()
    return difference(_whole(double)(x.double()), double(x.double())), "float64"


def _whole(dense: nn.Module) -> nn.Module:
    return adacomcat.compress(dense, plan=RankPlan.full(dense))


def _kept(dense: nn.Module) -> tuple[nn.Module, dict[str, float | str]]:
    """The smallest model that was made, and what each way kept or why it refused."""
    images = torch.randn(CALIBRATION, *input_size(dense))
    made, kept = dense, {}
    for way, given in (("data-free", None), ("calibrated", images)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # random weights see few images
                made = adacomcat.compress(dense, keep_params=KEEP, calibration=given)
            kept[way] = _size(made) / _size(dense)
        except UserError as error:
            kept[way] = reason(error)
    return made, kept


def _same_when_loaded(model: nn.Module, x: Tensor) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        adacomcat.save(model, Path(scratch) / "model")
        return torch.equal(adacomcat.load(Path(scratch) / "model")(x), model(x))


def difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; infinity where a number is not finite."""
    relative = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return relative if relative == relative else float("inf")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def write(names: Sequence[str], again: bool) -> int:
    """Try these architectures, or the choice; each is written when it is done."""
    entries = zoo.read_census()
    wanted = [one for one in entries if one.name in names] if names else choice(entries)
    wanted.sort(key=lambda one: one.params)
    before = json.loads(zoo.TRIALS.read_text()) if zoo.TRIALS.exists() else []
    done = {found["name"]: Trial(**found) for found in before}
    for one in progress(wanted, "architectures"):
        if again or one.name not in done or not done[one.name].good:
            done[one.name] = tried(one.name, one.family)
            atomic_write_text(zoo.TRIALS, json.dumps([t._asdict() for t in done.values()],
                                                     indent=1))
            print(line(done[one.name]), flush=True)
            gc.collect()
    return summary([done[one.name] for one in wanted])


def line(trial: Trial) -> str:
    if trial.error:
        return f"{trial.name}: {trial.error}"
    kept = ", ".join(f"{way} {kept:.3f}" if isinstance(kept, float) else f"{way}: {kept}"
                     for way, kept in trial.kept.items())
    return (f"{trial.name}: {trial.sites} sites, full rank {trial.full_rank:.1e} in "
            f"{trial.precision}, {kept}, loaded {'same' if trial.loaded else 'DIFFERENT'}, "
            f"optimized {trial.optimized:.1e}, {trial.seconds} s"
            + ("" if trial.good else "  FAILED"))


def summary(trials: Sequence[Trial]) -> int:
    wrong = [one for one in trials if not one.good]
    refused = [one for one in trials if any(isinstance(kept, str) for kept in one.kept.values())]
    for one in wrong:
        print(line(one), file=sys.stderr)
    print(f"{len(trials)} architectures of {len({one.family for one in trials})} families, "
          f"{len(wrong)} failed, {len(refused)} say that they cannot shrink to {KEEP}")
    return 1 if wrong else 0
