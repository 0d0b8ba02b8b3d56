"""Per-image results → accuracy in percent, with intervals by bootstrap."""

from typing import Any

import numpy as np
from torch import Tensor

LEVEL, RESAMPLES = 0.95, 2000


def bootstrap_interval(values: Tensor, seed: int = 0) -> list[float]:
    """[low, high] of the mean of ``values`` (N,): the middle 95% of the means of resamples.

    Of one value both are that value.
    """
    from scipy.stats import bootstrap

    sample = values.double().numpy()
    if len(sample) < 2:
        return [float(sample[0])] * 2
    found = bootstrap((sample,), np.mean, n_resamples=RESAMPLES, batch=100, confidence_level=LEVEL,
                      method="percentile", rng=np.random.default_rng(seed)).confidence_interval
    return [float(found.low), float(found.high)]


def measures(best: Tensor, labels: Tensor) -> dict[str, Any]:
    """Percentages: 'top1' with 'top1_interval', 'top5', and 'per_class' top-1.

    Args:
        best: (N, 5) classes, the likeliest first.
        labels: (N,).
    """
    hits = best == labels[:, None]
    right, classes = hits[:, 0].double(), labels.unique().tolist()
    return {"top1": 100 * right.mean().item(),
            "top1_interval": bootstrap_interval(100 * right),
            "top5": 100 * hits.any(1).double().mean().item(),
            "per_class": {str(name): 100 * right[labels == name].mean().item()
                          for name in classes}}
