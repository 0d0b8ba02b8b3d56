"""Packed weights: the C++ kernels see every change of a weight, on any thread."""

import gc
import threading

import pytest
import torch
from helpers.cpu_cases import ALL
from helpers.op_cases import convert

from adacomcat import ops


def products(v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.eye(v.shape[0])
    return ops.low_rank_linear(x, v, u), v @ u.t()


@pytest.mark.parametrize("change", [
    lambda p: p.add_(1), lambda p: p.data.mul_(2), lambda p: p.copy_(torch.randn_like(p)),
    lambda p: setattr(p, "data", torch.randn_like(p)), lambda p: p.t_().t_().neg_(),
], ids=["add_", "data.mul_", "copy_", "data=", "strides"])
@torch.no_grad()
def test_packed_weights_follow_changes(change: object) -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    torch.testing.assert_close(*products(v, u))
    for parameter in (v, u):
        change(parameter)
        torch.testing.assert_close(*products(v, u))


def test_packed_weights_follow_an_optimizer() -> None:
    v, u = torch.nn.Parameter(torch.randn(40, 9)), torch.nn.Parameter(torch.randn(30, 9))
    optimizer = torch.optim.AdamW([v, u], lr=0.1)
    for _ in range(3):
        ops.low_rank_linear(torch.eye(40), v, u).square().sum().backward()
        optimizer.step()
        with torch.inference_mode():
            torch.testing.assert_close(*products(v, u))


def test_memory_of_a_dead_weight_is_not_mistaken_for_it() -> None:
    u = torch.randn(30, 9)
    for _ in range(20):  # the allocator hands the same memory out again
        v = torch.randn(40, 9)
        torch.testing.assert_close(*products(v, u))
        del v
        gc.collect()


def test_weights_are_shared_between_threads() -> None:
    case = ALL["mlp-197"]
    tensors = convert(case.draw(), torch.float32)
    expected, results = case.call(tensors), [None] * 4

    def run(i: int) -> None:
        results[i] = [case.call(tensors) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected) for result in results for y in result)


@pytest.mark.parametrize("name", ["mlp-197", "dense-197", "attention-197"])
def test_what_followed_may_be_gone(name: str) -> None:
    """Kernels fetch the weights that came next the last time: here of a layer since deleted."""
    case = ALL[name]
    tensors = convert(case.draw(), torch.float32)
    expected = case.call(tensors)
    other = convert(case.draw(), torch.float32)
    case.call(other)
    del other
    gc.collect()
    for _ in range(3):
        torch.testing.assert_close(case.call(tensors), expected)
