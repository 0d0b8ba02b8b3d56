"""Refinement against losses whose least value is known, its budget, and what judges real plans."""

import copy
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat import RankPlan, UserError, compress, find_sites, train
from adacomcat.allocation.budget import Budget, Kind
from adacomcat.allocation.refine import (
    Refined,
    _halves,
    coordinate_search,
    directions,
    feature_distance,
    refine,
    refined_allocation,
)
from adacomcat.allocation.sensitivity import relative_sensitivities
from adacomcat.compression import compress_
from adacomcat.convert.factors import factorize_model
from adacomcat.convert.install import install_
from adacomcat.cost import plan_macs, plan_params
from adacomcat.data import datasets
from adacomcat.distill import TrainConfig, start
from adacomcat.distill.start import judging_images
from adacomcat.utils.progress import progress

TINY = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}

NAMES, UNITS = ("a", "b", "c"), 7000
HARM = {"a": 1.0, "b": 16.0, "c": 4.0}  # what the synthetic loss truly makes of a missing rank


def synthetic_loss(plan: RankPlan) -> float:
    """Σ c / r², least at ranks in the ratio of c^⅓."""
    return sum(HARM[name] / plan[name] ** 2 for name in NAMES)


def share_out(weights: dict[str, float]) -> RankPlan:
    """The minimum of Σ w / r² where Σ r = UNITS, in whole ranks rounded down."""
    parts = {name: weight ** (1 / 3) for name, weight in weights.items()}
    return RankPlan({name: max(1, int(UNITS * part / sum(parts.values())))
                     for name, part in parts.items()})


def singles() -> list[dict[str, float]]:
    return [{name: 1.0} for name in NAMES]


def synthetic(candidates: int, evaluate: Callable[[RankPlan], float] = synthetic_loss) -> Refined:
    weights = dict.fromkeys(NAMES, 1.0)
    return refine(share_out(weights), coordinate_search(share_out, weights, singles()), evaluate,
                  candidates)


def model_of(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY | changes).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(12, 3, 32, 32)


def test_the_least_loss_of_all_plans_is_reached() -> None:
    least = sum(harm ** (1 / 3) for harm in HARM.values()) ** 3 / UNITS ** 2
    found = synthetic(60)
    assert found.start_loss > 1.3 * least
    assert least <= found.loss == synthetic_loss(found.plan) < 1.01 * least
    assert sum(found.plan.ranks.values()) <= UNITS


def test_every_candidate_counts_and_none_is_tried_twice() -> None:
    for candidates in (1, 5, 8):
        tried: list[RankPlan] = []

        def evaluate(plan: RankPlan, tried: list[RankPlan] = tried) -> float:
            assert plan not in tried
            tried.append(plan)
            return synthetic_loss(plan)

        assert synthetic(candidates, evaluate).tried == candidates
        assert len(tried) == 1 + candidates  # and the plan that it starts from


def test_no_loss_however_wild_makes_the_result_worse() -> None:
    for seed in range(20):
        noise, losses = random.Random(seed), []

        def evaluate(plan: RankPlan, noise: random.Random = noise,
                     losses: list[float] = losses) -> float:
            losses.append(noise.random())
            return losses[-1]

        found = synthetic(8, evaluate)
        assert (found.loss, found.start_loss) == (min(losses), losses[0])


def test_proposals_that_end_or_repeat_end_the_search() -> None:
    same = RankPlan({"a": 1})

    def repeating() -> Iterator[RankPlan]:
        for _ in range(5):
            yield same

    assert refine(same, repeating(), lambda plan: 0.0, 8).tried == 0


@pytest.mark.parametrize("candidates", [0, -3])
def test_a_bad_number_of_candidates_is_named(candidates: int) -> None:
    with pytest.raises(UserError, match=f"at least 1.*got {candidates}"):
        synthetic(candidates)


def test_what_changed_is_told() -> None:
    start, plan = RankPlan({"a": 4, "b": "dense"}), RankPlan({"a": 4, "b": 8})
    found = Refined(plan, 0.5, start, 0.75, 3)
    assert found.changed == {"b": ("dense", 8)}
    assert found.summary() == {"tried": 3, "start_loss": 0.75, "loss": 0.5,
                               "changed": {"b": ["dense", 8]}}


def test_directions_are_depth_and_the_smaller_kinds() -> None:
    sites = find_sites(model_of(), {"blocks.0.mlp", "blocks.1.mlp"})
    depth, *kinds = directions(sites)
    assert depth["blocks.0.attn.qk"] == -1.0 and depth["head"] == 1.0
    assert depth["blocks.0.attn.qk"] == depth["blocks.0.attn.vo"] < depth["blocks.1.attn.qk"]
    moved = [{name for name, step in direction.items() if step} for direction in kinds]
    assert {"blocks.0.attn.qk", "blocks.1.attn.qk"} in moved
    assert all("blocks.0.mlp.hidden" not in names for names in moved)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_no_candidate_exceeds_the_budget(kind: Kind) -> None:
    model, noise, costs = model_of(), random.Random(0), []
    cost = plan_params if kind == "params" else plan_macs
    sites = find_sites(model)
    factors = factorize_model(model)

    def evaluate(plan: RankPlan) -> float:
        costs.append(cost(model, plan))
        return noise.random()

    allocator = Budget(kind, 0.6, multiple=2).allocator(model, factors, sites)
    weights = relative_sensitivities(sites, factors)
    found = refined_allocation(allocator.plan, weights, sites, evaluate, 16)
    assert found.tried == 16 and found.changed
    assert max(costs) <= 0.6 * cost(model, RankPlan())


def test_the_judges_never_make_factors() -> None:
    batches = list(torch.arange(21.0).view(-1, 1, 1, 1).split(4))
    fitting, judging = (torch.cat(part).flatten().tolist() for part in _halves(batches))
    assert fitting == list(range(10)) and judging == list(range(10, 21))
    with pytest.raises(UserError, match="at least 4 calibration images.*got 3"):
        _halves([torch.zeros(3, 1, 1, 1)])


@torch.no_grad()
def test_feature_distance_is_the_change_of_tokens_and_outputs(images: Tensor) -> None:
    model = model_of()
    factors = factorize_model(model)
    distance = feature_distance(model, factors, list(images.split(5)))
    assert distance(RankPlan()) == 0.0
    assert distance(RankPlan.full(model)) < 1e-6
    plan = RankPlan.uniform(model, 0.5)
    cut = install_(copy.deepcopy(model), plan, factors)
    expected = 0.0
    for features in (lambda m: m.forward_features(images), lambda m: m(images)):
        exact = features(model).double()
        lost = (features(cut).double() - exact).square().sum()
        expected += (lost / (exact - exact.mean(0)).square().sum()).item()
    assert distance(plan) == pytest.approx(expected, rel=1e-4)
    assert all(type(module) is nn.Linear for module in (model.head, model.blocks[0].mlp.fc1))


@pytest.mark.parametrize("reference", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_compress_keeps_what_does_better_on_held_out_images(reference: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = timm.create_model(reference, **TINY).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    settings = {"keep_params": 0.6, "calibration": images, "multiple": 2}
    one, two = (compress(model, refine=6, **settings) for _ in range(2))
    found = one.refinement
    assert found.tried == 6 and found.loss <= found.start_loss
    assert one.rank_plan == found.plan == two.rank_plan
    assert plan_params(model, found.plan) <= 0.6 * plan_params(model, RankPlan())
    assert torch.equal(one(images), two(images))
    by_hand = compress(model, plan=found.plan, calibration=images)  # the last fit takes all images
    assert torch.equal(one(images), by_hand(images))
    assert compress(model, **settings).refinement is None


def test_images_of_ones_own_judge(images: Tensor) -> None:
    model = model_of()
    settings = {"keep_params": 0.6, "calibration": images, "multiple": 2, "refine": 1}
    mine = compress(model, refine_images=torch.randn(8, 3, 32, 32), **settings).refinement
    assert mine.start_loss != compress(model, **settings).refinement.start_loss


def test_compress_says_what_refinement_lacks(images: Tensor) -> None:
    model = model_of()
    for settings in ({"plan": RankPlan.uniform(model, 0.5), "calibration": images},
                     {"keep_params": 0.5}):
        with pytest.raises(UserError, match="refine tries plans at a budget"):
            compress_(model, refine=2, **settings)
    with pytest.raises(UserError, match="at least 1"):
        compress_(model, keep_params=0.6, calibration=images, refine=-1)


def trained(**changes: object) -> dict:
    """Results of one step from the refined plan, on digits."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=48, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    train_set, _ = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    settings = {"keep_params": 0.4, "epochs": 1, "steps": 1, "batch_size": 32, "search": "off",
                "calibration_images": 64, "threads": 1, "device": "cpu", "refine": 4}
    return train.run(model, TrainConfig(**settings | changes), train_set).results


def test_training_starts_from_the_refined_plan() -> None:
    plain, results = trained(refine=0), trained()
    found = results["refinement"]
    assert found["tried"] == 4 and found["loss"] < found["start_loss"]
    moved = {name: [rank, results["plan"][name]] for name, rank in plain["plan"].items()
             if rank != results["plan"][name]}
    assert moved and moved == found["changed"]
    assert results["keep"] <= 0.4 and "refinement" not in plain


def test_resuming_refines_no_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained(state_dir=str(tmp_path))
    monkeypatch.setattr(start, "refined_allocation", None)
    again = trained(state_dir=str(tmp_path), resume=True)
    assert (again["plan"], again["refinement"]) == (first["plan"], first["refinement"])


@pytest.mark.parametrize("settings", [{"keep_params": None}, {"start": "uniform"},
                                      {"refine": -1}])
def test_training_says_what_refinement_lacks(settings: dict) -> None:
    with pytest.raises(UserError, match="refine m"):
        TrainConfig(**{"keep_params": 0.5, "refine": 2} | settings).checked()


def test_judges_of_training_are_images_that_did_not_calibrate() -> None:
    model = model_of(in_chans=1, num_classes=10)
    train_set, _ = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    config = TrainConfig(keep_params=0.5, refine=2, calibration_images=1000)
    known = {image.numpy().tobytes() for image in train.calibration_images(
        train_set, 1000, config.seed, train.Processes())}
    judges = judging_images(train_set, config)
    assert len(judges) == len(train_set) - 1000
    assert not known & {judges[i][0].numpy().tobytes() for i in range(len(judges))}
    with pytest.raises(UserError, match="lower calibration_images"):
        judging_images(train_set, config.with_(calibration_images=5000))


def test_a_bar_inside_a_bar_stays_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    outer = progress(range(2), "outer")
    assert next(outer) == 0
    assert type(progress([1, 2], "inner")) is type(iter([]))
    outer.close()
    assert list(progress([1, 2], "alone")) == [1, 2]
