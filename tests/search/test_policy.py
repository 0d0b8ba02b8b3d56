"""When a search is due: the published log replayed, and what each policy promises."""

import json
from pathlib import Path

import pytest

from adacomcat.errors import UserError
from adacomcat.search import make_policy

LOG = json.loads(Path(__file__).with_name("adaptive_comcat_log.json").read_text())


def replay(policy: str, found: dict[int, list[int]], epochs: int) -> list[int]:
    """The epochs at which the policy searches when search number e finds found[≤ e]."""
    decider, searched = make_policy(policy), []
    for epoch in range(epochs):
        if decider.due(epoch):
            searched.append(epoch)
            decider.record(epoch, found[max(e for e in found if e <= epoch)])
    return searched


def test_doubling_replays_the_published_log() -> None:
    found = {entry["epoch"]: entry["ranks"] for entry in LOG["searches"]}
    assert replay("adaptive", found, LOG["epochs"]) == LOG["searched_epochs"]
    assert LOG["searched_epochs"] == [1, 2, 3, 4, 8, 16]
    assert replay("every", found, LOG["epochs"]) == list(range(1, 30))
    assert replay("off", found, LOG["epochs"]) == []


def test_doubling_starts_over_when_ranks_change() -> None:
    found = {1: [8, 8], 8: [8, 16]}
    # equal at 2 (F 2) and 4 (F 4)... the change at 8 sets F to 1
    assert replay("adaptive", found, 17) == [1, 2, 4, 8, 9, 10, 12, 16]


def test_graded_looks_at_how_far_ranks_moved() -> None:
    still = replay("graded", {1: [100] * 10}, 40)
    assert still == [1, 2, 4, 8, 16, 32]
    # One step of 8 in 1000 is 0.8%: F still grows, though not twofold.
    drifting = {epoch: [100] * 9 + [100 + 8 * (epoch % 2)] for epoch in range(1, 40)}
    jumping = {epoch: [100 + 60 * (epoch % 2)] * 10 for epoch in range(1, 40)}
    assert replay("graded", jumping, 10) == list(range(1, 10))
    searches = replay("graded", drifting, 40)
    gaps = [b - a for a, b in zip(searches, searches[1:], strict=False)]
    assert len(still) <= len(searches) < 12 and gaps == sorted(gaps) and gaps[-1] > 4


@pytest.mark.parametrize("name", ["adaptive", "graded", "every"])
def test_policy_state_survives_a_restart(name: str) -> None:
    through, resumed = make_policy(name), make_policy(name)
    for epoch, ranks in ((1, [8, 16]), (2, [8, 16]), (4, [8, 16])):
        through.record(epoch, ranks)
    resumed.load_state_dict(json.loads(json.dumps(through.state_dict())))
    assert [resumed.due(e) for e in range(30)] == [through.due(e) for e in range(30)]


def test_unknown_policy_is_named() -> None:
    with pytest.raises(UserError, match="sometimes"):
        make_policy("sometimes")
