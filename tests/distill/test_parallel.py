"""Any number of processes, with copies or shards: the same plans, losses within 2e-5."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import make_model, small_run

from adacomcat.distill.config import TrainConfig
from adacomcat.distill.objective import BatchMixing
from adacomcat.utils.distributed import Processes

RUNS = {
    "dense": {"keep_params": None, "ema_decay": None, "epochs": 2, "mixup": 0.0, "clip_grad": None},
    "search": {"align": "mse", "search": "every", "refine": 1, "cutmix": 0.3},
}
TOLERANCE = 2e-5


def curve(results: dict[str, Any]) -> dict[str, Any]:
    return {"plan": results.get("plan"), "losses": [row["loss"] for row in results["history"]],
            "judged": [row["test_loss"] for row in results["history"]],
            "searches": [search["loss"] for search in results["searches"]]}


def train_on(count: int, path: Path, **settings: Any) -> dict[str, Any]:
    """What comes of a run on ``count`` processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={count}", __file__, json.dumps(settings), str(path)],
        capture_output=True, text=True, env=os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]),
                                           os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(path.with_suffix(f".{rank}").read_text()) for rank in range(count)]
    assert all(each == found[0] for each in found)
    return found[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: curve(small_run(**settings).results) for name, settings in RUNS.items()}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("count", "parallel"), [
    (2, "average"), (3, "average"), (2, "ddp"), (1, "fsdp"), (2, "fsdp"), (4, "fsdp")])
def test_any_number_of_processes_trains_alike(count: int, parallel: str, name: str, tmp_path: Path,
                                              alone: dict[str, dict[str, Any]]) -> None:
    """64 images do not divide by three processes."""
    found = train_on(count, tmp_path / "out", parallel=parallel, **RUNS[name])
    expected = alone[name]
    assert found["plan"] == expected["plan"]
    for key in ("losses", "judged", "searches"):
        assert found[key] == pytest.approx(expected[key], abs=TOLERANCE)


@pytest.mark.parametrize("steps", [[(2, "average"), (1, "average"), (3, "average")],
                                   [(1, "average"), (2, "fsdp"), (3, "ddp"), (2, "fsdp")]])
def test_another_number_of_processes_goes_on(steps: list[tuple[int, str]], tmp_path: Path,
                                             alone: dict[str, dict[str, Any]]) -> None:
    """Each part of the run stops after some steps, and the last one ends it."""
    settings = RUNS["search"] | {"state_dir": str(tmp_path / "state"), "resume": True}
    for number, (count, parallel) in enumerate(steps):
        stop = 5 if number < len(steps) - 1 else 0
        found = train_on(count, tmp_path / "out", parallel=parallel, stop=stop, **settings)
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


def main(settings: dict[str, Any], path: Path) -> None:
    from adacomcat.distill.trainer import Trainer
    from adacomcat.utils import stopping

    stop, steps = settings.pop("stop", 0), []
    if stop:
        real = Trainer._after_step

        def counted(self: Trainer) -> None:
            steps.append(0)
            if len(steps) == stop:
                stopping._asked.append(stopping.SIGNALS[0])
            real(self)
        Trainer._after_step = counted
    try:
        found = curve(small_run(**settings).results)
    except stopping.Stopped:
        found = {}
    path.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
