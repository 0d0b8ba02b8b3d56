"""Any number of processes, with copies or shards: the same plans, losses within 2e-5."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import losses_and_plan, make_model, small_run, stopped_run
from helpers.together import together

from adacomcat.distill.config import TrainConfig
from adacomcat.distill.objective import BatchMixing
from adacomcat.distill.trainer import Trainer
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes

RUNS = {
    "dense": {"keep_params": None, "ema_decay": None, "epochs": 2, "mixup": 0.0, "clip_grad": None},
    "search": {"align": "mse", "search": "every", "refine": 1, "cutmix": 0.3},
}
ADAPTERS = {"keep_params": None, "adapters": 2, "epochs": 2, "align": "none"}
TOLERANCE = 2e-5


def train_on(count: int, stop: int = 0, **settings: Any) -> dict[str, Any]:
    """What comes of a run on ``count`` processes."""
    found = together(count, stopped_run, stop, settings)
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: losses_and_plan(small_run(**settings).results) for name, settings in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("count", "parallel"), [
    (2, "average"), (3, "average"), (2, "ddp"), (1, "fsdp"), (2, "fsdp"), (4, "fsdp")])
def test_any_number_of_processes_trains_alike(count: int, parallel: str, name: str,
                                              alone: dict[str, dict[str, Any]]) -> None:
    """64 images do not divide by three processes."""
    found = train_on(count, parallel=parallel, **RUNS[name])
    expected = alone[name]
    assert found["plan"] == expected["plan"]
    for key in ("losses", "judged", "searches"):
        assert found[key] == pytest.approx(expected[key], abs=TOLERANCE)


@pytest.mark.parametrize(("count", "parallel"), [(1, "average"), (2, "average"), (2, "ddp"),
                                                 (2, "fsdp")])
def test_gradients_of_several_passes_add_up(count: int, parallel: str,
                                            alone: dict[str, dict[str, Any]]) -> None:
    """64 images do not divide by five passes."""
    found = train_on(count, parallel=parallel, grad_accum_steps=5, **RUNS["dense"])
    for key in ("losses", "judged"):
        assert found[key] == pytest.approx(alone["dense"][key], abs=TOLERANCE)


def test_a_pass_takes_its_part_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], Trainer._pass

    def noted(self: Trainer, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return real(self, images, targets)
    monkeypatch.setattr(Trainer, "_pass", noted)
    small_run(grad_accum_steps=5, **RUNS["dense"] | {"epochs": 1, "steps": 2, "align": "mse"})
    assert seen == [13, 13, 13, 13, 12] * 2


def test_every_pass_has_an_image() -> None:
    with pytest.raises(UserError, match="grad_accum_steps 65 leaves a pass without an image"):
        small_run(grad_accum_steps=65, **RUNS["dense"])


@pytest.mark.parametrize("parallel", ["average", "ddp", "fsdp"])
def test_adapters_learn_alike(parallel: str) -> None:
    """The frozen model is copied or sharded beside what is trained."""
    alone, found = stopped_run(0, ADAPTERS), train_on(2, parallel=parallel, **ADAPTERS)
    for key in ("losses", "judged"):
        assert found[key] == pytest.approx(alone[key], abs=TOLERANCE)


@pytest.mark.parametrize("steps", [[(2, "average"), (1, "average"), (3, "average")],
                                   [(1, "average"), (2, "fsdp"), (3, "ddp"), (2, "fsdp")]])
def test_another_number_of_processes_goes_on(steps: list[tuple[int, str]], tmp_path: Path,
                                             alone: dict[str, dict[str, Any]]) -> None:
    """Each part of the run stops after some steps, and the last one ends it."""
    settings = RUNS["search"] | {"state_dir": str(tmp_path / "state"), "resume": True}
    for number, (count, parallel) in enumerate(steps):
        stop = 5 if number < len(steps) - 1 else 0
        found = train_on(count, stop, parallel=parallel, **settings)
        assert bool(found) == (not stop)
    assert found["plan"] == alone["search"]["plan"]
    for key in ("losses", "judged", "searches"):
        assert found[key] == pytest.approx(alone["search"][key], abs=TOLERANCE)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("setting", ["mixup", "cutmix"])
def test_shards_are_mixed_as_the_whole_batch(setting: str, count: int,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same batch on one process, with what the others would send."""
    size, model = 16, make_model()
    config = TrainConfig(batch_size=size, **{setting: 1.0})
    images, labels = torch.randn(size, 1, 16, 16), torch.arange(size) % 10
    whole = BatchMixing(config, model, Processes()).mix(images, labels, (0,))
    for rank in range(count):
        own = torch.arange(rank, size, count)
        partners = (size - 1 - own).flip(0)

        def mirrored(_: Processes, shard: torch.Tensor, total: int, rows=partners) -> torch.Tensor:
            return (images if shard.ndim == 4 else labels)[rows]
        monkeypatch.setattr(Processes, "mirrored", mirrored)
        mixed = BatchMixing(config, model, Processes(rank, count)).mix(images[own], labels[own],
                                                                       (0,))
        for part, all_of_it in zip(mixed, whole, strict=True):
            assert torch.equal(part, all_of_it[own])
