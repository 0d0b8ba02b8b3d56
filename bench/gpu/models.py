"""Whole models on a GPU: ours, the same ranks and the dense model, eager, compiled, on TensorRT.

All of them run in CUDA graphs. The first call of each, with its compilation, is a number apart.
"""

import copy
import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import peers
import timm
import torch
from clock import first_call, interleaved, on_gpu
from test_models import MODELS, low_rank
from torch import Tensor, nn

import adacomcat
from adacomcat.cost import model_macs, model_params

Row = dict[str, Any]  # one measurement, as it stands in the JSON file
Model = Callable[[Tensor], Tensor]

# timm's benchmark.py has these columns; the others say what was run.
COLUMNS = ("model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size",
           "infer_img_size", "infer_gmacs", "param_count", "way", "dtype", "cold_time")


def compiled(model: nn.Module) -> Model:
    """By inductor with its longest search for tiles; a dry run has no time for one."""
    if not on_gpu():
        return torch.compile(model, backend="eager")
    return torch.compile(model, mode="max-autotune-no-cudagraphs")


def on_tensorrt(model: nn.Module) -> Model:
    dtype = next(model.parameters()).dtype
    return torch.compile(model, backend="torch_tensorrt", options={"enabled_precisions": {dtype}})


def rivals(same_ranks: nn.Module, dense: nn.Module) -> dict[str, Model]:
    """Both models on every runtime that is installed."""
    runtimes: dict[str, Callable[[nn.Module], Model]] = {
        "PyTorch": lambda model: model, "inductor": compiled}
    if find_spec("torch_tensorrt") and next(dense.parameters()).element_size() == 2:
        runtimes["TensorRT"] = on_tensorrt
    return {f"{name}, {runtime}": make(model) for runtime, make in runtimes.items()
            for name, model in (("same ranks", same_ranks), ("dense", dense))}


def measure_models(dtype: torch.dtype, batches: tuple[int, ...]) -> Iterator[Row]:
    """Each model at each batch size, and at batch 8 the relative errors against float64."""
    for architecture, rank, rank_mlp in MODELS.values():
        torch.manual_seed(0)
        dense = timm.create_model(architecture).eval().requires_grad_(False)
        ours = low_rank(dense, rank, rank_mlp)
        sizes = {"dense": size_of(dense), "low rank": size_of(ours)}
        exact = copy.deepcopy(ours).double()
        ways = {"ours": adacomcat.optimize(ours.to(dtype)),
                **rivals(peers.plain(copy.deepcopy(ours)).to(dtype), dense.to(dtype))}
        for batch in batches:
            x = torch.randn(batch, *dense.default_cfg["input_size"], dtype=dtype)
            yield {"what": f"{architecture} {dtype} b{batch}", "sizes": sizes,
                   "image": x.shape[-1], "batch": batch, **timed(ways, x),
                   **(errors(ways, exact, x) if batch == 8 else {})}


def size_of(model: nn.Module) -> dict[str, float]:
    """Millions of parameters, and thousands of millions of multiply-accumulates of an image."""
    return {"param_count": model_params(model) / 1e6, "infer_gmacs": model_macs(model) / 1e9}


def timed(ways: dict[str, Model], x: Tensor) -> Row:
    """Seconds of each way that runs, of its first call too, and why the others do not run."""
    cold, absent = {}, {}
    for name, model in ways.items():
        try:
            cold[name] = first_call(partial(model, x))
        except Exception as error:  # a runtime that refuses is a finding, not a crash
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds = interleaved({name: partial(ways[name], x) for name in cold}, 1)
    return {"seconds": seconds, "cold seconds": cold, **({"absent": absent} if absent else {})}


def errors(ways: dict[str, Model], exact: nn.Module, x: Tensor) -> Row:
    """|output - exact| / |exact| of everything that has the low ranks."""
    wanted = exact(x.double())
    return {"errors": {name: ((model(x).double() - wanted).norm() / wanted.norm()).item()
                       for name, model in ways.items() if name in ("ours", "same ranks, PyTorch")}}


def as_timm_writes(rows: list[Row]) -> str:
    """The rows of whole models as CSV, by the names of timm's results; times in milliseconds."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    for row in rows:
        for way, seconds in row["seconds"].items():
            model, dtype, _ = row["what"].split()
            size = row["sizes"]["dense" if way.startswith("dense") else "low rank"]
            table.writerow({
                "model": model, "way": way, "dtype": dtype.removeprefix("torch."),
                "infer_samples_per_sec": f"{row['batch'] / seconds:.2f}",
                "infer_step_time": f"{1e3 * seconds:.3f}", "infer_batch_size": row["batch"],
                "infer_img_size": row["image"], "cold_time": f"{row['cold seconds'][way]:.3f}",
                **{name: f"{value:.2f}" for name, value in size.items()}})
    return text.getvalue()
