"""The training loop end to end on the bundled digits: results, resuming, several processes."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import (
    STEPS,
    killed_run,
    losses_and_plan,
    make_model,
    make_sets,
    small_config,
    small_run,
    stopped_run,
)
from helpers.together import one, together
from torch import nn

from adacomcat import train
from adacomcat.convert.install import build_skeleton
from adacomcat.cost import model_params
from adacomcat.distill import TrainConfig, Trainer, evaluate, start, state
from adacomcat.errors import UserError
from adacomcat.plan import RankPlan
from adacomcat.search import RankSearch
from adacomcat.search.published import drop_attention_biases_
from adacomcat.sites import find_sites
from adacomcat.utils import stopping
from adacomcat.utils.distributed import Processes


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
    with pytest.warns(UserWarning, match="searched on the images that judge"):
        result = train.run(model, config, *make_sets(model))
    assert [s["epoch"] for s in result.results["searches"]] == [2]
    for block in result.model.blocks:
        assert block.attn.bq.abs().max() == 0 and block.attn.bo.abs().max() == 0
    assert (result.model.blocks[0].mlp.fc1.bias - model.blocks[0].mlp.fc1.bias).abs().max() < 0.1


def test_dropped_biases_leave_everything_else() -> None:
    model = make_model()
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drop_attention_biases_(model, find_sites(model))
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
    assert one(killed_run, when, tmp_path) == -signal.SIGKILL
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


@pytest.mark.parametrize("number", stopping.SIGNALS)
@pytest.mark.parametrize("when", ["step", "search"])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    when: str, number: signal.Signals, tmp_path: Path, uninterrupted: train.TrainResult,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch, stopping.heeding_signals():
        signal_at(when, number, patch)
        with pytest.raises(stopping.Stopped, match=f"{number.name} at epoch 2, step") as stopped:
            small_run(state_dir=str(tmp_path))
    assert stopped.value.exit_code == 128 + number
    before = state.load_state(tmp_path)
    begun = before["search"]["begun"]
    assert before["step"] == 3 if when == "step" else len(begun["losses"]) == 2
    resumed = small_run(state_dir=str(tmp_path), resume=True)
    assert curve(resumed.results) == curve(uninterrupted.results)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, uninterrupted.model.state_dict()[name]), name


def signal_at(when: str, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """The signal arrives in the second epoch: in its third step, or its search's second."""
    owner, name, calls = {"step": (Trainer, "_train_step", STEPS + 3),
                          "search": (RankSearch, "step", 5)}[when]
    real, seen = getattr(owner, name), []

    def counted(self: Any, *args: Any) -> Any:
        seen.append(name)
        if len(seen) == calls:
            signal.raise_signal(number)
        return real(self, *args)

    patch.setattr(owner, name, counted)


def test_time_saves_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, save = [], Trainer.save

    def counted(self: Trainer) -> None:
        saved.append((self.epoch, self.step))
        save(self)

    monkeypatch.setattr(Trainer, "save", counted)
    settings = {"epochs": 1, "search": "off", "state_dir": str(tmp_path)}
    small_run(**settings)
    assert saved == [(1, 0), (2, 0)]  # the calibrated and factorised model, and the end
    small_run(**settings, checkpoint_seconds=1e-9)
    assert saved[2:] == [*((1, step) for step in range(STEPS)), (2, 0)]


def test_a_run_that_is_resumed_calibrates_and_factorises_no_more(
    tmp_path: Path, uninterrupted: train.TrainResult, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed before its first step; what a state has is not computed anew."""
    def dies(self: Trainer, *args: Any) -> None:
        assert self.writer is not None
        self.writer.finish()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", dies)
        with pytest.raises(KeyboardInterrupt):
            small_run(state_dir=str(tmp_path))
    for name in ("collect_statistics", "factorize_model", "error_weights"):
        monkeypatch.setattr(start, name, None)
    resumed = small_run(state_dir=str(tmp_path), resume=True)
    assert curve(resumed.results) == curve(uninterrupted.results)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, uninterrupted.model.state_dict()[name]), name


def other_inputs(name: str) -> dict[str, Any]:
    """Arguments of ``train.run`` in which one differs from those that a run began with."""
    model, plan = make_model(), RankPlan({"blocks.0.mlp.fc1": 16})
    given = {"model": model, "train_set": make_sets(model)[0], "teacher": make_model(1),
             "plan": plan}
    changed = {"model": make_model(2), "train_set": make_sets(model, 431)[0].subset(
        torch.arange(1, 431)), "teacher": make_model(3), "plan": RankPlan({"blocks.0.mlp.fc1": 8})}
    return given | {key: value for key, value in changed.items() if key == name}


@pytest.mark.parametrize("name", ["model", "train_set", "teacher", "plan"])
def test_resuming_with_other_inputs_is_refused(name: str, tmp_path: Path) -> None:
    config = small_config(epochs=1, keep_params=None, steps=1, state_dir=str(tmp_path))
    train.run(config=config, **other_inputs(""))
    train.run(config=config.with_(resume=True), **other_inputs(""))
    with pytest.raises(UserError, match=f"another {name.replace('train_', 'training ')}"):
        train.run(config=config.with_(resume=True), **other_inputs(name))


def test_weights_that_no_loss_shows_to_be_nan_stop_the_run() -> None:
    """Gradients of zero meet an epsilon that float32 does not have."""
    model = make_model()
    nn.init.zeros_(model.blocks[0].attn.proj.weight)
    config = small_config(epochs=1, steps=1, opt_eps=1e-70, keep_params=None, ema_decay=None)
    with pytest.raises(UserError, match="NaN or infinite after epoch 1"):
        train.run(model, config, make_sets(model)[0])


def test_a_diverged_loss_stops_the_run() -> None:
    with pytest.raises(UserError, match="loss is"):
        small_run(lr=1e9, clip_grad=None, epochs=1)


def test_too_large_a_batch_is_named() -> None:
    with pytest.raises(UserError, match="batch-size"):
        small_run(batch_size=4096)


def test_two_processes_train_as_one(uninterrupted: train.TrainResult) -> None:
    parts = together(2, stopped_run, 0, {})
    assert parts[0] == parts[1]
    alone, two = losses_and_plan(uninterrupted.results), parts[0]
    assert two["plan"] == alone["plan"]
    for key in ("losses", "searches"):
        assert two[key] == pytest.approx(alone[key], rel=1e-4)
