"""compress as a whole: budgets, the sites it may touch, images, the record that it leaves."""

import math
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import adacomcat
from adacomcat import RankPlan, UserError, compress, train
from adacomcat.allocation.budget import Budget
from adacomcat.allocation.knapsack import Choice, fill, knapsack
from adacomcat.convert.record import Compression, compression_of
from adacomcat.data import datasets
from adacomcat.distill import TrainConfig, start

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32)


def shrunk(model: nn.Module) -> set[str]:
    """Sites whose rank is below the dense one."""
    return {name for name, rank in compression_of(model).ranks.items() if rank != "dense"}


@pytest.mark.parametrize(("settings", "says"), [
    ({"kind": "size"}, "unknown budget 'size'; choose one of params, macs, bytes, latency_ms"),
    ({"value": 0.0}, "keep must be a fraction in (0, 1], like 0.5; got 0.0"),
    ({"kind": "macs", "value": 1.5}, "keep must be a fraction in (0, 1], like 0.5; got 1.5"),
    ({"value": math.nan}, "keep must be a fraction in (0, 1], like 0.5; got nan"),
    ({"kind": "latency_ms", "value": 0.0}, "max_latency_ms must be above 0; got 0.0"),
    ({"multiple": 0}, "multiple must be at least 1; got 0"),
    ({"kind": "latency_ms", "batch": 0}, "latency_batch must be at least 1; got 0"),
    ({"multiple": 1.5}, "multiple must be at least 1; got 1.5"),
    ({"kind": "macs", "value": "50%"}, "keep must be a fraction in (0, 1], like 0.5; got '50%'"),
    ({"kind": "latency_ms", "value": math.inf}, "max_latency_ms must be above 0; got inf"),
])
def test_a_budget_out_of_range_is_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(says)}$"):
        Budget(**{"kind": "params", "value": 0.5} | settings)


def test_a_bad_budget_is_named_before_anything_is_computed(model: nn.Module) -> None:
    nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(UserError, match="keep must be a fraction"):
        compress(model, keep_params=2.0)
    with pytest.raises(UserError, match="say exactly one of"):
        compress(model, keep_params=2.0, keep_macs=0.5)
    with pytest.raises(UserError, match="plan must be a RankPlan"):
        compress(model, plan="plan.json")


def test_of_equal_upgrades_the_knapsack_takes_the_last_and_filling_the_first() -> None:
    items = [[Choice(1, 5.0), Choice(3, 3.0)], [Choice(1, 5.0), Choice(3, 3.0)]]
    assert knapsack([[*item, Choice(2, 4.5)] for item in items], 3.5) == [0, 2]
    chosen = [0, 0]
    fill(items, chosen, 5.0)
    assert chosen == [1, 0]


def test_filling_pays_for_errors_too_while_the_budget_allows() -> None:
    items = [[Choice(1, 1.0), Choice(2, 9.0), Choice(4, 2.0)]]
    chosen = [0]
    fill(items, chosen, 2.5)
    assert chosen == [1]


@pytest.mark.parametrize("exclude", [
    "blocks.0", "blocks.0.*", re.compile(r"^blocks\.0\."),
    lambda name, module: name == "blocks.0", ["blocks.0.attn", re.compile(r"^blocks\.0\.mlp$")],
])
def test_excluded_modules_stay_as_they_are(model: nn.Module, exclude: Any) -> None:
    small = compress(model, keep_params=0.8, exclude=exclude)
    assert shrunk(small) and all(name.startswith(("blocks.1.", "head")) for name in shrunk(small))
    before, after = model.blocks[0].state_dict(), small.blocks[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_included_sites_shrink(model: nn.Module, images: Tensor) -> None:
    small = compress(model, keep_params=0.92, include="*.attn.vo")
    assert shrunk(small) and all(name.endswith(".vo") for name in shrunk(small))
    small = compress(model, keep_params=0.8, include="*.mlp", exclude="blocks.0", refine=1,
                     calibration=images)
    assert shrunk(small) == {"blocks.1.mlp.hidden"}


def test_an_mlp_with_an_excluded_projection_is_not_pruned(model: nn.Module,
                                                          images: Tensor) -> None:
    small = compress(model, keep_params=0.7, exclude="blocks.0.mlp.fc1", calibration=images)
    names = compression_of(small).ranks.keys()
    assert "blocks.0.mlp.fc2" in names and "blocks.1.mlp.hidden" in names
    assert not names & {"blocks.0.mlp.hidden", "blocks.0.mlp.fc1"}
    assert type(small.blocks[0].mlp.fc1) is nn.Linear


@pytest.mark.parametrize(("settings", "says"), [
    ({"exclude": "blocks.7.*"}, r"'blocks\.7\.\*'"),
    ({"include": re.compile("fc3")}, "'fc3'"),
    ({"exclude": lambda name, module: True}, "include and exclude leave no projection"),
    ({"keep_params": None, "plan": RankPlan(), "exclude": "head"}, "a plan names its own sites"),
])
def test_filters_that_fit_nothing_are_named(model: nn.Module, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        compress(model, **{"keep_params": 0.5} | settings)


@pytest.mark.parametrize("name", ["calibration", "refine_images"])
@pytest.mark.parametrize("given", [5, [torch.zeros(3, 32, 32)], ["cat.jpg"]])
def test_what_is_no_images_is_named(model: nn.Module, images: Tensor, name: str,
                                    given: Any) -> None:
    with pytest.raises(UserError, match=f"^{name} must be a tensor"):
        compress(model, **{"keep_params": 0.5, "calibration": images, "refine": 1} | {name: given})


def test_the_record_says_how_a_model_was_made(model: nn.Module, images: Tensor, tmp_path) -> None:
    assert compression_of(model) == Compression() and compression_of(model).ranks == {}
    small = compress(model, keep_params=0.6, calibration=images, refine=1)
    record = compression_of(small)
    assert record.plan is small.rank_plan and record.refinement is small.refinement
    assert record.plan == record.refinement.plan and record.source is None
    adacomcat.save(small, tmp_path / "small")
    loaded = compression_of(adacomcat.load(tmp_path / "small"))
    assert loaded.source["architecture"] == "vit_tiny_patch16_224"
    assert {name: rank for name, rank in record.ranks.items() if rank != "dense"} == loaded.ranks


def test_without_epochs_training_calibrates_and_factorises_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def count(name: str) -> None:
        real = getattr(start, name)

        def counted(*args: Any, **settings: Any) -> Any:
            calls.append(name)
            return real(*args, **settings)

        monkeypatch.setattr(start, name, counted)

    for name in ("collect_statistics", "factorize_model"):
        count(name)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=32, depth=1, num_heads=2, num_classes=10)
    train_set, _ = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    config = TrainConfig(epochs=0, keep_params=0.5, calibration_images=16, threads=1, device="cpu")
    train.run(model, config, train_set)
    assert calls == ["collect_statistics", "factorize_model"]
