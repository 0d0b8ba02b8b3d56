"""Models of several sizes: what each one costs and how good it is, and where the curve bends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from adacomcat.cost import model_macs, model_params
from adacomcat.latency.timing import model_latencies
from adacomcat.utils.model import copied

# A model → its measures of quality; ``Front.quality`` is one of them.
Judge = Callable[[nn.Module], Mapping[str, Any]]
Kind = str  # 'dense', 'compressed' or 'landmark'


@dataclass(frozen=True)
class Sized:
    """A model of the curve with its name."""

    name: str
    kind: Kind
    model: nn.Module


def points(models: Iterable[Sized], judge: Judge, dtypes: Sequence[str], dense_params: int,
           batch: int = 1) -> list[dict[str, Any]]:
    """One row for each model in each dtype: costs that are counted and measured, and quality.

    Args:
        models: the models, on the device where they are timed; they stay as they are.
        judge: gives the quality of a model.
        dtypes: names of torch's dtypes; the first one is in nobody's name.
        dense_params: what 'kept' is relative to.
        batch: images of a timed forward pass.
    """
    made = {}
    rows = []
    for one in models:
        for dtype in dtypes:
            name = one.name if dtype == dtypes[0] else f"{one.name} {dtype}"
            model = copied(one.model).to(getattr(torch, dtype))
            rows.append({"name": name, "kind": one.kind, "dtype": dtype}
                        | counted(model, dense_params) | dict(judge(model)))
            made[name] = model
    for name, milliseconds in model_latencies(made, batch).items():
        next(row for row in rows if row["name"] == name)["latency_ms"] = milliseconds
    return rows


def counted(model: nn.Module, dense_params: int) -> dict[str, Any]:
    """Parameters, multiply-accumulates, bytes of the weights, and the share of parameters."""
    params = model_params(model)
    return {"params": params, "macs": model_macs(model), "kept": params / dense_params,
            "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values())}


def knee(costs: Sequence[float], quality: Sequence[float]) -> int:
    """The index of the point that lies furthest above the line between the cheapest and the
    dearest point, both axes scaled to [0, 1].

    Of a curve that bends the other way it is the dearest point.
    """
    x, y = (np.asarray(values, float) for values in (costs, quality))
    first, last = int(x.argmin()), int(x.argmax())
    if x[first] == x[last] or y[first] == y[last]:
        return first
    across = (x - x[first]) / (x[last] - x[first])
    up = (y - y[first]) / (y[last] - y[first])
    above = (up - across) if y[last] > y[first] else (across - up)
    above[first] = above[last] = 0.0
    best = int(above.argmax())
    return best if above[best] > 0 else last
