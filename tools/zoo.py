"""Every architecture of timm: what of it can shrink, what fuses, and what stays dense.

    python tools/zoo.py census                 # all of them, on the meta device
    python tools/zoo.py try                    # some of each family, on numbers
    python tools/generate_docs.py families     # the tables of docs/families.md, from the census

A census needs no memory for weights: tensors on the meta device have shapes alone. Both write to
build/zoo; ``try`` is in ``zoo_trials.py``, the tables are in ``zoo_tables.py``.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import adacomcat
from adacomcat import RankPlan, find_sites
from adacomcat.convert import build_skeleton
from adacomcat.errors import reason
from adacomcat.layers.fused import (
    FusedAttention,
    FusedDenseMlp,
    FusedGatedMlp,
    FusedMlp,
    FusedRotaryAttention,
)
from adacomcat.layers.registry import attention_family, attention_tier, is_position_network
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.progress import progress

BUILD = Path(__file__).resolve().parents[1] / "build" / "zoo"
CENSUS, TRIALS = BUILD / "census.json", BUILD / "trials.json"
FUSED = {"attention": (FusedAttention, FusedRotaryAttention),
         "MLP": (FusedMlp, FusedDenseMlp, FusedGatedMlp)}
# What timm calls the projections of an attention; a class that has one of them attends.
PROJECTIONS = {"qkv", "q", "kv", "qk", "wq", "q_proj", "qkv_proj", "query",
               "in_proj", "qkvs", "to_query", "pwise"}
FRACTION = 0.5  # of the break-even rank: that of the skeletons that `optimize` gets


class Entry(NamedTuple):
    """One architecture.

    Attributes:
        name: timm's.
        family: The module of timm that it is in.
        params: Parameters of the model.
        sites: Tier → parameters in sites of this tier.
        fused: Parts of its compressed blocks that ``optimize`` makes ops of.
        dense: What the other parameters belong to → how many they are.
        unknown: Class of each attention that does not fold → the parameters in it.
        error: What went wrong; nothing else counts then.
    """

    name: str
    family: str
    params: int = 0
    sites: Mapping[str, int] = {}
    fused: tuple[str, ...] = ()
    dense: Mapping[str, int] = {}
    unknown: Mapping[str, int] = {}
    error: str = ""

    @property
    def share(self) -> float:
        """Of the parameters, in sites."""
        return sum(self.sites.values()) / self.params

    @property
    def attends(self) -> bool:
        return bool(self.unknown or self.sites.get("A") or self.sites.get("B"))


def families() -> list[str]:
    """timm's modules that register architectures; the entry point of this package is none."""
    return sorted(set(timm.list_modules()) - {"entrypoint"})


def outline(name: str, **arguments: Any) -> nn.Module:
    """A model on the meta device, where weights take no memory."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return timm.create_model(name, **arguments).eval()


def entry(name: str, family: str) -> Entry:
    """One architecture, built, counted, made low-rank and optimised on the meta device."""
    try:
        model = outline(name)
        sites = find_sites(model)
        inside: Counter[str] = Counter()
        for site in sites:
            inside[site.tier] += site.dense_params
        total = sum(parameter.numel() for parameter in model.parameters())
        dense, unknown = stays_dense(model, {site.module for site in sites}), unfolded(model)
        skeleton = build_skeleton(model, RankPlan.uniform(model, FRACTION))
        optimized = adacomcat.optimize(skeleton)
    except Exception as error:  # the census goes on and tells
        return Entry(name, family, error=f"{type(error).__name__}: {reason(error)}")
    fused = tuple(part for part, kinds in FUSED.items()
                  if any(isinstance(module, kinds) for module in optimized.modules()))
    return Entry(name, family, total, dict(inside), fused, dense, unknown)


def stays_dense(model: nn.Module, replaced: set[str]) -> dict[str, int]:
    """What holds the parameters outside of the modules that factors replace → their number."""
    found: Counter[str] = Counter()
    prefixes = tuple(f"{name}." for name in replaced)
    for name, module in model.named_modules():
        if name not in replaced and not name.startswith(prefixes):
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            found[_kind(name, module)] += own
    return {kind: count for kind, count in found.most_common() if count}


def _kind(name: str, module: nn.Module) -> str:
    if is_position_network(name.rpartition(".")[0]):
        return "position networks"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolutions"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers"
    if "Norm" in type(module).__name__:
        return "norms"
    return "linear layers" if isinstance(module, nn.Linear) else "parameters of their own"


def unfolded(model: nn.Module) -> dict[str, int]:
    """Class of each attention that does not fold → the parameters in it."""
    found: Counter[str] = Counter()
    for module in model.modules():
        if PROJECTIONS & set(module._modules) and attention_tier(module, model) is None:
            found[_class(module)] += sum(p.numel() for p in module.parameters())
    return dict(found)


def _class(module: nn.Module) -> str:
    """timm's module and the class; a known class that does not fold as it is built says so."""
    kind = type(module)
    known = " as built" if attention_family(module) is not None else ""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}{known}"


def members(family: str) -> list[str]:
    return sorted(timm.list_models(module=family))


def census(wanted: Iterable[str]) -> Iterator[Entry]:
    """Every architecture of these families."""
    for family in wanted:
        for name in members(family):
            yield entry(name, family)


def read_census() -> list[Entry]:
    """What ``python tools/zoo.py census`` wrote."""
    if not CENSUS.exists():
        raise SystemExit("run python tools/zoo.py census first")
    return [Entry(**found) for found in json.loads(CENSUS.read_text())["architectures"]]


def write_census(some: Sequence[str]) -> int:
    """Count all families, or some of them anew."""
    wanted = [family for family in families() if not some or family in some]
    kept = [one for one in read_census() if one.family not in wanted] if some else []
    total = sum(len(members(family)) for family in wanted)
    counted = progress(census(wanted), "architectures", total)
    found = sorted([*kept, *counted], key=lambda one: (one.family, one.name))
    BUILD.mkdir(parents=True, exist_ok=True)
    atomic_write_text(CENSUS, json.dumps({
        "timm": timm.__version__, "torch": torch.__version__,
        "architectures": [one._asdict() for one in found]}, indent=1))
    wrong = [one for one in found if one.error]
    for one in wrong:
        print(f"{one.name}: {one.error}", file=sys.stderr)
    print(f"{len(found)} architectures of {len({one.family for one in found})} modules, "
          f"{sum(one.attends for one in found if not one.error)} with attention, {len(wrong)} "
          f"failed: {CENSUS.relative_to(BUILD.parents[1])}")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    counted = commands.add_parser("census", help="all architectures, on the meta device")
    counted.add_argument("families", nargs="*", help="only these anew; by default all")
    trials = commands.add_parser("try", help="some architectures of each family, on numbers")
    trials.add_argument("names", nargs="*", help="architectures; by default some of each family")
    trials.add_argument("--again", action="store_true", help="also those that were tried before")
    arguments = parser.parse_args()
    if arguments.command == "census":
        return write_census(arguments.families)
    import zoo_trials

    return zoo_trials.write(arguments.names, arguments.again)


if __name__ == "__main__":
    sys.exit(main())
