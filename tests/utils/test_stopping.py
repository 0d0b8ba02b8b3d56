"""A signal is noted, a second one ends at once, and what was set up is undone."""

import signal
import threading

import pytest

from adacomcat.utils import stopping


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_the_first_signal_is_noted_and_the_second_ends(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in stopping.SIGNALS]
    with stopping.heeding_signals():
        assert stopping.asked_to_stop() is None
        signal.raise_signal(number)
        assert stopping.asked_to_stop() == number
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stopping.asked_to_stop() is None
    assert [signal.getsignal(each) for each in stopping.SIGNALS] == before


def test_other_threads_leave_signals_alone() -> None:
    found = []

    def inside() -> None:
        with stopping.heeding_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_exit_codes_are_those_of_shells() -> None:
    assert stopping.Stopped(signal.SIGTERM, "epoch 1").exit_code == 143
