"""Module paths of the release before resolve to today's objects, and warn."""

import importlib

import pytest

from adacomcat import moved

# Old module and name → the module that defines the name today.
NAMES = {
    ("allocate", "knapsack"): "allocation.knapsack",
    ("allocate", "error_weights"): "allocation.sensitivity",
    ("attention", "LowRankAttention"): "layers.attention",
    ("backends", "use_backend"): "ops.backends",
    ("convert", "compress"): "compression",
    ("convert", "model_statistics"): "convert.model",
    ("cost", "interleaved"): "latency.timing",
    ("cost", "latency"): "latency.timing",
    ("decompositions", "batched_svd"): "ops.decompositions",
    ("fuse", "Projections"): "layers.folding",
    ("gauge", "with_gauge"): "checkpoint.gauge",
    ("latency", "measure"): "latency.timing",
    ("layers", "activation_name"): "layers.mlp",
    ("reference", "low_rank_mlp"): "ops.reference",
}


@pytest.mark.parametrize(("old", "name"), NAMES)
def test_an_old_path_gives_the_same_object_and_warns(old, name):
    module = importlib.import_module(f"adacomcat.{old}")
    with pytest.warns(FutureWarning, match=f"{name} is now .* goes with the next release"):
        found = getattr(module, name)
    home = importlib.import_module(f"adacomcat.{NAMES[old, name]}")
    assert found is getattr(home, name)


@pytest.mark.parametrize("old", moved.MOVED)
def test_every_old_module_has_homes_and_knows_no_other_name(old):
    assert all(importlib.import_module(f"adacomcat.{home}") for home in moved.MOVED[old])
    module = importlib.import_module(f"adacomcat.{old}")
    with pytest.raises(AttributeError, match=f"'adacomcat.{old}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018
