"""A rank for every site of a model: the one thing that search and allocation decide."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from adacomcat.errors import UserError
from adacomcat.sites import DENSE, MULTIPLE, Rank, Site, find_sites, prunable_mlps
from adacomcat.utils.files import atomic_write_text
from adacomcat.utils.limits import WEIGHT_BITS
from adacomcat.utils.text import parse_json, read_text, to_json

HIDDEN = ".hidden"


@dataclass
class RankPlan:
    """Site name → rank or 'dense'; sites not named stay dense.

    A name may be a glob, such as 'blocks.11.*', which ``compress`` replaces by the names that it
    fits. Of several that fit the last one counts, and full names count more than all globs.

    Args:
        ranks: Ranks per head for '.qk' and '.vo', numbers of neurons for '.hidden', ranks of the
            weight elsewhere. An MLP has either '.hidden' or '.fc1' and '.fc2'.
        bits: Name of an attention, an MLP or a layer → 8 or 4, where ``quantize`` follows inside
            of it; ``keep_bytes`` decides so.
    """

    ranks: dict[str, Rank] = field(default_factory=dict)
    bits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, dict)
                and all(number in WEIGHT_BITS for number in self.bits.values())):
            raise UserError("the bits of a plan map names of modules to "
                            f"{' or '.join(map(str, WEIGHT_BITS))}; got {self.bits!r:.80}")
        if not isinstance(self.ranks, dict) or not all(isinstance(n, str) for n in self.ranks):
            raise UserError(f"a plan maps names of sites to ranks; got {self.ranks!r:.80}")

    @classmethod
    def full(cls, model: nn.Module) -> "RankPlan":
        """Every site at its full rank: the same function, in factors.

        Args:
            model: The dense model that the plan is for.
        """
        return cls({site.name: site.full_rank for site in find_sites(model)})

    @classmethod
    def dense(cls, model: nn.Module) -> "RankPlan":
        """Every site named, and dense.

        Args:
            model: The dense model that the plan is for.
        """
        return cls({site.name: DENSE for site in find_sites(model)})

    @classmethod
    def uniform(cls, model: nn.Module, fraction: float, multiple: int = MULTIPLE) -> "RankPlan":
        """The largest candidate up to ``fraction`` of the break-even rank, everywhere.

        Args:
            model: The dense model that the plan is for.
            fraction: Share of the break-even rank, below which factors save parameters, in (0, 1].
                Where no candidate is that small, the site takes the smallest one.
            multiple: Step of ranks per head; elsewhere it is twice as large.
        """
        def largest(site: Site) -> Rank:
            ranks = [rank for rank in site.candidates(multiple) if rank != DENSE]
            fitting = [rank for rank in ranks if rank <= fraction * site.break_even]
            return fitting[-1] if fitting else (ranks[0] if ranks else DENSE)
        return cls({site.name: largest(site) for site in find_sites(model)})

    def __getitem__(self, name: str) -> Rank:
        return self.ranks.get(name, DENSE)

    def resolved(self, model: nn.Module) -> "RankPlan":
        """This plan without globs.

        Args:
            model: The dense model that the plan is to be applied to.

        Raises:
            UserError: A glob fits no site of the model.
        """
        globs = [name for name in self.ranks if set(name) & set("*?[")]
        if not globs:
            return self
        pruned = [mlp for mlp in prunable_mlps(model)
                  if any(name.endswith(HIDDEN) and fnmatchcase(mlp + HIDDEN, name)
                         for name in self.ranks)]
        sites = [site.name for site in find_sites(model, pruned)]
        ranks: dict[str, Rank] = {}
        for glob in globs:
            fitting = [name for name in sites if fnmatchcase(name, glob)]
            if not fitting:
                raise UserError(f"the plan names {glob!r:.100}, which fits no site of this model; "
                                f"its sites are like {', '.join(sites[:4]) or 'none'}")
            ranks |= dict.fromkeys(fitting, self.ranks[glob])
        ranks.update((name, rank) for name, rank in self.ranks.items() if name not in globs)
        return RankPlan(ranks, self.bits)

    def sites(self, model: nn.Module) -> list[Site]:
        """The decisions that this plan takes: an MLP has two ranks or one number of neurons."""
        return find_sites(model, {name.removesuffix(HIDDEN) for name in self.ranks
                                  if name.endswith(HIDDEN)})

    def validate(self, model: nn.Module, widened: bool = False) -> list[Site]:
        """The sites of this plan.

        Args:
            model: The dense model that the plan is to be applied to.
            widened: Heads may be wider than in the dense model, up to the width of the tokens: of a
                model into which adapters were merged.

        Raises:
            UserError: An entry names no site of the model, or a rank that it cannot have.
        """
        sites = {site.name: site for site in self.sites(model)}
        for name, rank in self.ranks.items():
            if name not in sites:
                raise UserError(f"the plan names {name!r:.100}, which this model does not have; "
                                f"its sites are like {', '.join(list(sites)[:4]) or 'none'}")
            wide = widened and sites[name].folded
            full = sites[name].in_features if wide else sites[name].full_rank
            if rank != DENSE and not (type(rank) is int and 1 <= rank <= full):
                raise UserError(f"the plan gives {name} the rank {rank!r:.60}; "
                                f"it must be 'dense' or a whole number from 1 to {full}")
        return list(sites.values())

    def params(self, sites: Iterable[Site]) -> int:
        """Parameters of these sites under this plan, biases included.

        Where one half of an attention folds, the other one does too, at its full rank.
        """
        sites = list(sites)
        shrunk = {site.module for site in sites if self[site.name] != DENSE}

        def rank(site: Site) -> Rank:
            folds = site.folded and site.module in shrunk
            return site.full_rank if folds and self[site.name] == DENSE else self[site.name]

        return sum(site.params(rank(site)) for site in sites)

    def to_json(self) -> str:
        return to_json({"ranks": self.ranks} | ({"bits": self.bits} if self.bits else {}), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """The plan that ``to_json`` wrote.

        Raises:
            UserError: ``text`` is no such JSON.
        """
        try:
            found = parse_json(text)
            ranks, bits = found["ranks"], found.get("bits", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            ranks, bits = None, {}
        if not isinstance(ranks, dict):
            raise UserError('not a rank plan: JSON like {"ranks": {"blocks.0.attn.qk": 32}} '
                            "is expected")
        return cls(ranks, bits)

    def save(self, path: str | Path) -> None:
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """The plan in a JSON file.

        Raises:
            UserError: The file cannot be read, or holds no plan.
        """
        text = read_text(path)
        try:
            return cls.from_json(text)
        except UserError as error:
            raise UserError(f"the rank plan {path}: {error}") from error
