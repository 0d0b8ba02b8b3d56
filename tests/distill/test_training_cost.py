"""The cost model of docs/many-machines.md against the bytes that a run hands over."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training_cost
from helpers.runs import make_model, make_sets, small_config

from adacomcat import train
from adacomcat.distill.trainer import Trainer
from adacomcat.utils.distributed import Processes

MODEL = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2,
         "num_heads": 2, "num_classes": 10}


def size(value: Any) -> int:
    """Bytes of the tensors in dicts and lists, but for counts of one number."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.ndim else 0
    inside = value.values() if isinstance(value, dict) else value
    return sum(map(size, inside)) if isinstance(value, dict | list | tuple) else 0


def trainer(processes: Processes) -> Trainer:
    model = make_model()
    config = small_config(mixup=0.0, ema_decay=None)
    train_set, _ = make_sets(model)
    return train._search_trainer(model, config, train_set, None, processes, None, None, {})


def test_sizes_are_those_of_a_run() -> None:
    found, sizes = trainer(Processes()), training_cost.sizes("vit_tiny_patch16_224", **MODEL)
    assert sizes.dense == size(list(make_model().parameters()))
    assert sizes.trained == size(list(found.student.parameters()))
    found.config = found.config.with_(steps=1)
    images, labels = next(iter(found._batches(1)))
    found._train_step(images, labels)
    state = found.state_dict()
    assert sizes.state == size(state["student"]) + size(state["optimizer"]["state"])


def test_an_all_reduce_has_the_gradients_and_a_few_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that believes to be one of eight; the all-reduce is counted, and not made."""
    sent: Counter[str] = Counter()
    found = trainer(Processes())
    found.processes = found.mixing.processes = found.sharing.processes = Processes(0, 8)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.update(bytes=size([tensor])))
    images, labels = next(iter(found._batches(1)))
    found._train_step(images, labels)
    sizes = training_cost.sizes("vit_tiny_patch16_224", **MODEL)
    assert sent["bytes"] == sizes.trained
    assert sizes.sent("average", 8) == 2 * 7 / 8 * sent["bytes"]
