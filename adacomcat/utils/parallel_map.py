"""Independent pieces of work on several threads, each piece on one core."""

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from adacomcat.utils.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def one_by_one(work: Callable[[Item], Result], items: Sequence[Item], label: str) -> list[Result]:
    """[work(item) for item in items], with a progress bar."""
    return [work(item) for item in progress(items, label)]


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item],
                 label: str) -> list[Result]:
    """The same on as many threads as torch may use; each thread uses one for BLAS.

    LAPACK's reduction to tridiagonal form gains little from a second thread, and loses much where
    another program uses that core; decompositions of different matrices do not wait for each other.
    Inside, torch's number of threads is one in the whole process. The caller's choice of backend
    and its gradient mode hold in the threads too.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return one_by_one(work, items, label)
    context, gradients = contextvars.copy_context(), torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.set_grad_enabled(gradients):
            return context.copy().run(work, item)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads,
                                initargs=(1,)) as pool:
            return list(progress(pool.map(run, items), label, total=len(items)))
    finally:
        torch.set_num_threads(threads)
