"""Module paths from before the packages by task: they work for one more release and warn.

``adacomcat/__init__`` installs the finder; packages that kept an old module's name forward the
names that left them.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old module → the modules that hold its names today, the most likely one first.
MOVED = {
    "allocate": ("allocation.budget", "allocation.knapsack", "allocation.sensitivity"),
    "arguments": ("cli.arguments",),
    "attention": ("layers.attention", "layers.registry", "families.timm"),
    "augmentation": ("data.augmentation",),
    "backends": ("ops.backends",),
    "collage": ("data.collage",),
    "comcat": ("checkpoint.comcat",),
    "commands": ("cli.commands",),
    "cpu_gradients": ("ops.autograd_cpu",),
    "decompositions": ("ops.decompositions",),
    "gauge": ("checkpoint.gauge", "factorize.interpolative"),
    "gradients": ("ops.autograd",),
    "hidden": ("factorize.neurons", "layers.mlp"),
    "identities": ("factorize.gauge",),
    "inference": ("ops.inference",),
    "latency_budget": ("allocation.latency",),
    "latency_cache": ("latency.cache",),
    "parallel": ("utils.distributed",),
    "pictures": ("data.folder",),
    "progress": ("utils.progress",),
    "randomness": ("utils.random",),
    "reference": ("ops.reference",),
    "refine": ("allocation.refine",),
    "sequential": ("convert.sequential",),
    "shapes": ("ops.shapes",),
    "training_state": ("distill.state",),
    "workers": ("utils.parallel_map",),
}


def forward(old: str, homes: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds names in ``homes``, modules of this package."""

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for home in homes:
                module = importlib.import_module(f"adacomcat.{home}")
                if hasattr(module, name):
                    _warn(f"{old}.{name} is now adacomcat.{home}.{name}")
                    return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


def _warn(message: str) -> None:
    warnings.warn(f"{message}; the old path goes with the next release", FutureWarning,
                  stacklevel=3)


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of ``MOVED`` under their old names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "adacomcat" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]]
        module.__getattr__ = forward(module.__name__, homes)  # type: ignore[method-assign]


def install() -> None:
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
