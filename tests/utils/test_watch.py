"""Who is blamed where processes wait for each other; the connections are threads' here."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from adacomcat.utils import watch
from adacomcat.utils.watch import Lost, Watch

TIMEOUT = 6.0  # seconds


@pytest.fixture
def ended(monkeypatch):
    """Exit codes that watches ended this process with; they do not end it here."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    yield codes
    watch._watches.clear()


@pytest.fixture
def three(ended):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
    made = [Watch(store.clone(), rank, 3, TIMEOUT) for rank in range(3)]
    yield made
    for each in made:
        each.end()


def wait_for(found: list) -> None:
    for _ in range(600):
        if found:
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened")


def waiting(watched: Watch) -> threading.Event:
    """``watched`` waits for the others, until the event is set."""
    over = threading.Event()

    def wait() -> None:
        with watched.waiting():
            over.wait()
    threading.Thread(target=wait, daemon=True).start()
    return over


def test_whoever_keeps_the_others_waiting_is_named(three, ended, capsys):
    for rank, each in enumerate(three):
        each.reached(f"epoch 1, step {rank}")
    waiting(three[0]), waiting(three[2])
    wait_for(ended)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("adacomcat: rank 1 of 3 on "), lines
    assert "kept the others waiting for 6 s (--timeout), last seen at epoch 1, step 1" in lines[0]
    assert set(ended) == {1}


def test_a_silent_process_is_named_before_a_late_one(three, ended, capsys):
    three[2].end()
    waiting(three[0])
    wait_for(ended)
    assert "rank 2 of 3" in capsys.readouterr().err


def test_nobody_is_blamed_where_all_wait_or_the_wait_ends(three, ended):
    everyone = [waiting(each) for each in three]
    time.sleep(1.5 * TIMEOUT)
    assert not ended  # all wait: for the network, which is not to be judged here
    for each in everyone:
        each.set()


def test_a_broken_connection_is_explained(three):
    three[1].reached("epoch 3, step 5")
    time.sleep(2 * three[1].pause)
    three[1].end()
    with pytest.raises(Lost, match="rank 1 of 3 on .* ended or fell silent, last seen at epoch 3"):
        with three[0].waiting():
            raise RuntimeError("connection closed by peer")
    with pytest.raises(Lost, match="rank 1 of 3"), three[2].waiting():
        raise RuntimeError("connection closed by peer")


def test_an_error_that_is_nobodys_death_stays_itself(three):
    with pytest.raises(RuntimeError, match="shapes differ"), three[0].waiting():
        raise RuntimeError("shapes differ")


def test_all_end_with_what_the_first_one_said(three, capsys):
    assert three[0].conclude("adacomcat: error: a") == three[1].conclude("adacomcat: error: b")
    with pytest.raises(Lost, match="error: a"), three[2].waiting():
        raise RuntimeError("connection closed by peer")
    assert capsys.readouterr().err == "adacomcat: error: a\n"
