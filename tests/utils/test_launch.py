"""What the environment of a cluster says of the processes of a run."""

import pytest

from adacomcat.errors import UserError
from adacomcat.utils.distributed import start_processes
from adacomcat.utils.launch import Launch, is_first, launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
    return put


@pytest.mark.parametrize("values", [{}, {"RANK": "3"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"},
                                    {"LOCAL_RANK": "", "RANK": ""}])
def test_alone(values, environment):
    environment(**values)
    assert launch() == Launch() and is_first()
    assert start_processes("cpu").world_size == 1


def test_one_of_several(environment):
    environment(WORLD_SIZE="4", RANK="2", LOCAL_RANK="1", **ADDRESS)
    assert launch() == Launch(2, 4, 1) and not is_first()
    environment(WORLD_SIZE="4", RANK="0", **ADDRESS)
    assert launch() == Launch(0, 4, 0) and is_first()


@pytest.mark.parametrize(("values", "says"), [
    ({"WORLD_SIZE": "4", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
    ({"WORLD_SIZE": "4", **ADDRESS}, "RANK not set"),
    ({"WORLD_SIZE": "4", "RANK": "4", **ADDRESS}, "RANK 4"),
    ({"WORLD_SIZE": "4", "RANK": "-1", **ADDRESS}, "RANK must be"),
    ({"WORLD_SIZE": "four"}, "WORLD_SIZE must be"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be")])
def test_what_does_not_fit_together_is_one_line(values, says, environment):
    environment(**values)
    with pytest.raises(UserError, match=says):
        start_processes("cpu")
    assert is_first()  # whoever cannot join a run speaks for itself
