"""The training loop end to end on the bundled digits: results, resuming, several processes.

Run as a script, this file is the child process of its own tests.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from adacomcat import train
from adacomcat.convert.install import build_skeleton
from adacomcat.cost import model_params
from adacomcat.data import datasets
from adacomcat.distill import TrainConfig, Trainer, evaluate, state
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search import RankSearch
from adacomcat.sites import find_sites
from adacomcat.utils.distributed import Processes

STEPS = 6  # per epoch of the small run


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1,
                              embed_dim=48, depth=2, num_heads=2, num_classes=10)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_sets(model: nn.Module, count: int = 430) -> tuple[Any, Any]:
    train_set, test_set = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    return train_set.subset(torch.arange(count)), test_set.subset(torch.arange(100))


def small_config(**changes: Any) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 64, "lr": 2e-3, "keep_params": 0.4, "search_steps": 3,
                "alpha_lr": 0.2, "calibration_images": 64, "mixup": 0.2, "ema_decay": 0.9,
                "align": "manifold", "threads": 1, "device": "cpu"}
    return TrainConfig.preset("adacomcat", **settings | changes)


def small_run(**changes: Any) -> train.TrainResult:
    model = make_model()
    return train.run(model, small_config(**changes), *make_sets(model))


def curve(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interruptions: losses, accuracies, plans of all searches."""
    return {"losses": [record["loss"] for record in results["history"]],
            "top1": [record["top1"] for record in results["history"]],
            "plan": results["plan"],
            "searches": [(s["epoch"], s["loss"], s["ranks"]) for s in results["searches"]]}


@pytest.fixture(scope="module")
def uninterrupted() -> train.TrainResult:
    return small_run()


def test_a_run_meets_its_budget_and_rebuilds_from_its_plan(uninterrupted: train.TrainResult
                                                           ) -> None:
    model, results = uninterrupted
    assert results["keep"] <= 0.4
    assert results["params"] == model_params(model)
    assert [s["epoch"] for s in results["searches"]][:2] == [1, 2]
    assert any(s["changed"] for s in results["searches"])
    assert results["search_count"] == len(results["searches"])
    skeleton = build_skeleton(make_model(seed=5), RankPlan(results["plan"])).eval()
    skeleton.load_state_dict(model.state_dict(), strict=True)
    _, test_set = make_sets(skeleton)
    assert evaluate(skeleton, test_set, 64, Processes())["top1"] == \
        pytest.approx(results["top1"])
    json.dumps(results)


def test_learning_happens() -> None:
    model = make_model()
    train_set, test_set = make_sets(model, 1400)
    dense = train.run(model, small_config(keep_params=None, epochs=8, mixup=0.0, ema_decay=None),
                      train_set, test_set)
    history = dense.results["history"]
    assert history[-1]["loss"] < 0.75 * history[0]["loss"] and dense.results["top1"] > 45
    assert dense.results["keep"] == 1 and "plan" not in dense.results
    assert type(dense.model) is type(model) and not hasattr(dense.model, "rank_plan")
    free = train.run(dense.model, small_config(epochs=0, keep_params=0.4), train_set, test_set)
    tuned = train.run(dense.model, small_config(epochs=2, keep_params=0.4, mixup=0.0),
                      train_set, test_set)
    assert free.results["history"] == [] and free.results["keep"] <= 0.4
    assert tuned.results["dense_top1"] == pytest.approx(dense.results["top1"])
    assert tuned.results["loss"] < free.results["loss"]
    assert tuned.results["top1"] > dense.results["top1"] - 5


def test_steps_end_every_epoch_and_the_schedule_spans_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], Trainer._train_step

    def counted(self: Trainer, *batch: Any) -> float:
        seen.append((self.epoch, self.step))
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    results = small_run(epochs=1, finetune_epochs=1, steps=2).results
    assert seen == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert results["history"][-1]["lr"] < 0.2 * 2e-3
    with pytest.raises(UserError, match="steps must be a whole number of at least 1"):
        small_config(steps=0)


def test_stage_two_keeps_the_ranks() -> None:
    results = small_run(epochs=1, finetune_epochs=2, search="every").results
    assert len(results["history"]) == 3
    assert [s["epoch"] for s in results["searches"]] == [1]


def test_a_given_plan_is_kept() -> None:
    model = make_model()
    plan = RankPlan({"blocks.0.attn.qk": 4, "blocks.1.mlp.fc1": 16})
    result = train.run(model, small_config(keep_params=None, epochs=1), *make_sets(model),
                       plan=plan)
    found = result.results["plan"]
    assert {name: found[name] for name in plan.ranks} == plan.ranks
    assert found["blocks.0.mlp.fc1"] == "dense" and result.results["searches"] == []
    assert type(result.model.blocks[0].mlp.fc1) is nn.Linear


def test_comcat_preset_trains_no_attention_bias() -> None:
    model = make_model()
    config = TrainConfig.preset("comcat", epochs=2, batch_size=64, keep_params=0.5,
                                search_steps=2, threads=1, device="cpu")
    result = train.run(model, config, *make_sets(model))
    assert [s["epoch"] for s in result.results["searches"]] == [1, 2]
    for block in result.model.blocks:
        assert block.attn.bq.abs().max() == 0 and block.attn.bo.abs().max() == 0
    assert (result.model.blocks[0].mlp.fc1.bias - model.blocks[0].mlp.fc1.bias).abs().max() < 0.1


def test_dropped_biases_leave_everything_else() -> None:
    model = make_model()
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train.drop_attention_biases_(model, find_sites(model))
    changed = {name for name, tensor in model.state_dict().items()
               if not torch.equal(tensor, reference[name])}
    assert changed == {f"blocks.{i}.attn.{part}.bias" for i in (0, 1) for part in ("qkv", "proj")}


def test_evaluation_is_the_fraction_of_right_answers() -> None:
    model = make_model().eval()
    _, test_set = make_sets(model)
    images, labels = test_set.batch(torch.arange(len(test_set)))
    with torch.no_grad():
        logits = model(images).double()
    expected = 100 * (logits.argmax(1) == labels).double().mean().item()
    loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean().item()
    found = evaluate(model, test_set, 33, Processes())
    assert found["top1"] == pytest.approx(expected, abs=1e-4)
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["images"] == 100


@pytest.mark.parametrize("when", ["step", "search", "save", "unsaved step"])
def test_killed_and_resumed_equals_uninterrupted(when: str, tmp_path: Path,
                                                 uninterrupted: train.TrainResult) -> None:
    child = subprocess.run([sys.executable, __file__, "killed", str(tmp_path), when],
                           env=child_environment(), capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    resumed = small_run(state_dir=str(tmp_path), checkpoint_steps=2, resume=True)
    assert curve(resumed.results) == curve(uninterrupted.results)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, uninterrupted.model.state_dict()[name]), name


def test_a_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    settings = {"epochs": 1, "state_dir": str(tmp_path)}
    first, again = small_run(**settings), small_run(**settings, resume=True)
    assert curve(first.results) == curve(again.results)


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    small_run(epochs=1, state_dir=str(tmp_path))
    with pytest.raises(UserError, match="lr .*0.002.*0.5"):
        small_run(epochs=1, state_dir=str(tmp_path), resume=True, lr=0.5)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"\x80\x04N."])
def test_a_foreign_training_state_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / state.FILE).write_bytes(content)
    with pytest.raises(UserError, match=state.FILE):
        state.load_state(tmp_path)


def test_a_training_state_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 1, "model": nn.Linear(1, 1)}, tmp_path / state.FILE)
    with pytest.raises(UserError, match="cannot read"):
        state.load_state(tmp_path)


def test_a_failed_save_leaves_the_old_state(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    state.save_state(tmp_path, {"epoch": 1})
    real = torch.save

    def dies(state: object, file: Any) -> None:
        real(state, file)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        state.save_state(tmp_path, {"epoch": 2})
    monkeypatch.undo()
    assert state.load_state(tmp_path)["epoch"] == 1


def test_a_diverged_loss_stops_the_run() -> None:
    with pytest.raises(UserError, match="loss is"):
        small_run(lr=1e30, clip_grad=None, epochs=1)


def test_too_large_a_batch_is_named() -> None:
    with pytest.raises(UserError, match="batch-size"):
        small_run(batch_size=4096)


def test_two_processes_train_as_one(tmp_path: Path, uninterrupted: train.TrainResult) -> None:
    out = tmp_path / "results.json"
    child = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         __file__, "shared", str(out)],
        env=child_environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    parts = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    assert parts[0] == parts[1]
    one, two = curve(uninterrupted.results), parts[0]
    assert two["plan"] == one["plan"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert [s[1] for s in two["searches"]] == pytest.approx([s[1] for s in one["searches"]],
                                                            rel=1e-4)


def child_environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def kill_at(when: str) -> None:
    """SIGKILL in the second epoch: at a step, in the search, or with a state half written."""
    owner, name = {"step": (Trainer, "_train_step"), "unsaved step": (Trainer, "_train_step"),
                   "search": (RankSearch, "step"), "save": (os, "replace")}[when]
    calls_left = {"step": STEPS + 4, "unsaved step": STEPS + 3, "search": 5, "save": 5}[when]
    real = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls_left
        calls_left -= 1
        if not calls_left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def child_main(role: str, path: Path, when: str = "") -> None:
    if role == "killed":
        kill_at(when)
        small_run(state_dir=str(path), checkpoint_steps=2)
    else:
        results = small_run().results
        rank = os.environ["RANK"]
        path.with_suffix(f".{rank}").write_text(json.dumps(curve(results)))


if __name__ == "__main__":
    child_main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
