"""What a run tells while it goes: events, pace, files."""

import json
import sys

import pytest
from helpers.runs import make_model, make_sets, small_config

from adacomcat import UserError, train
from adacomcat.distill import metrics


def test_pace_by_a_clock_of_its_own():
    """Each step waits a second for data and computes three."""
    now = [0.0]

    def slow():
        for item in range(5):
            now[0] += 1.0
            yield item
    pace = metrics.Pace(batch=8, total=20, clock=lambda: now[0])
    assert pace.report(0) == {}
    for _ in pace.watched(slow()):
        now[0] += 3.0
    assert pace.report(5) == pytest.approx({"images_per_second": 2.0, "data_wait": 0.25,
                                            "eta_seconds": 60.0})


def test_steps_are_thinned_out_and_other_events_are_not(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])
    write = metrics.JsonLines(tmp_path / "m.jsonl", every=2.0)
    for step in range(6):
        write({"event": "step", "step": step})
        write({"event": "epoch", "epoch": step})
        now[0] += 1.0
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('{"event": "st')
    found = metrics.read_events(tmp_path / "m.jsonl")
    assert [event["step"] for event in found if event["event"] == "step"] == [0, 2, 4]
    assert [event["epoch"] for event in found if event["event"] == "epoch"] == list(range(6))
    assert found[0]["time"] == 100.0


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path):
    metrics.JsonLines(tmp_path)({"event": "end"})


def test_events_of_a_run_are_its_results():
    model = make_model()
    seen = []
    _, results = train.run(model, small_config(epochs=2), *make_sets(model), observer=seen.append)
    kinds = [event["event"] for event in seen]
    assert kinds[0] == "start" and kinds[-1] == "end"
    steps = [event for event in seen if event["event"] == "step"]
    assert len(steps) == seen[0]["epochs"] * seen[0]["steps"] == steps[-1]["at"]
    for epoch, record in enumerate(results["history"], 1):
        losses = [event["loss"] for event in steps if event["epoch"] == epoch]
        assert record["loss"] == pytest.approx(sum(losses) / len(losses))
    for name, records in (("epoch", results["history"]), ("search", results["searches"])):
        told = [{key: value for key, value in event.items() if key != "event"}
                for event in seen if event["event"] == name]
        assert told == records
    for search in results["searches"]:
        assert 0 < search["entropy"] <= 1 and search["frequency"] >= 1
    json.dumps(seen, allow_nan=False)
    assert steps[-1]["eta_seconds"] == 0 and 0 <= steps[-1]["data_wait"] < 1


def test_tensorboard_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        metrics.TensorBoard(tmp_path)
