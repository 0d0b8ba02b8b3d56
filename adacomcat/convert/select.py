"""Which projections of a model a compression may touch: ``include`` and ``exclude``."""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from adacomcat.errors import UserError
from adacomcat.sites import Site, find_sites

# A glob ('blocks.0.*', 'head'), a compiled regular expression, which is searched for, or a test of
# (module name, module). What a filter says of a module holds for everything inside.
Filter = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Filters = Filter | Iterable[Filter]


def select_sites(model: nn.Module, pruning: Iterable[str] = (), include: Filters | None = None,
                 exclude: Filters | None = None) -> list[Site]:
    """``find_sites(model, pruning)``, without what the filters leave out.

    An MLP one of whose projections the filters leave out is not pruned: it keeps its two ranks.

    Raises:
        UserError: a glob or regular expression fits nothing in the model.
    """
    modules = dict(model.named_modules())
    including, excluding = _listed(include), _listed(exclude)

    def wanted(name: str) -> bool:
        return ((include is None or _fits(including, name, modules))
                and not _fits(excluding, name, modules))

    names = {*modules, *(site.name for site in find_sites(model))}
    for one in (*including, *excluding):
        if not callable(one) and not any(_fits_one(one, name, modules) for name in names):
            text = one if isinstance(one, str) else one.pattern
            raise UserError(f"no projection of this model is called {text!r}; its sites are what "
                            "find_sites(model) lists, and a glob such as 'blocks.0.*' names all "
                            "that is inside")
    pruned = {name for name in pruning if wanted(f"{name}.hidden")
              and not _fits(excluding, f"{name}.fc1", modules)
              and not _fits(excluding, f"{name}.fc2", modules)}
    return [site for site in find_sites(model, pruned) if wanted(site.name)]


def _listed(filters: Filters | None) -> Sequence[Filter]:
    if filters is None:
        return ()
    if isinstance(filters, str | re.Pattern) or callable(filters):
        return (filters,)
    return tuple(filters)


def _fits(filters: Sequence[Filter], name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether one of the filters names this site, or a module that holds it."""
    parts = name.split(".")
    holders = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return any(_fits_one(one, holder, modules) for one in filters for holder in holders)


def _fits_one(one: Filter, name: str, modules: dict[str, nn.Module]) -> bool:
    if isinstance(one, str):
        return fnmatchcase(name, one)
    if isinstance(one, re.Pattern):
        return one.search(name) is not None
    return name in modules and bool(one(name, modules[name]))
