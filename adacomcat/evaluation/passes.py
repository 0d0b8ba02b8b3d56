"""One pass of a model over a dataset: rows for every image, in the dataset's order.

On several processes each one computes its share, and all get every row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adacomcat.data import Batches, LabelledImages
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes
from adacomcat.utils.inputs import Inputs
from adacomcat.utils.model import evaluating, tokens_and_outputs
from adacomcat.utils.progress import progress

# (model, images, labels) → name → one row for each image.
Look = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


@torch.inference_mode()
def rows_of(look: Look, model: nn.Module, dataset: LabelledImages, batch_size: int,
            processes: Processes, workers: int = 0) -> dict[str, Tensor]:
    """What ``look`` gives for every image, and the 'labels', on the CPU.

    Args:
        look: what is computed for a batch.
        model: on the processes' device; it runs in eval mode.
        dataset: what ``data.train_and_test`` or ``data.pictures_under`` gives.
        batch_size: images of a step, over all processes.
        processes: the processes that share the work.
        workers: processes that decode pictures; 0 decodes in this one.

    Raises:
        UserError: there are fewer images than processes, or none.
    """
    count = len(dataset)
    if count < processes.world_size:
        raise UserError("there are no images to evaluate" if not count else
                        f"{count} images are too few for {processes.world_size} processes")
    mine: dict[str, list[Tensor]] = {}
    dtype = next(model.parameters()).dtype
    batches = Batches(dataset, batch_size, shuffle=False, seed=0, epoch=0, rank=processes.rank,
                      world_size=processes.world_size, num_workers=workers)
    with evaluating(model):
        for images, labels in progress(batches, "evaluating"):
            if not len(labels):
                continue
            found = look(model, images.to(processes.device, dtype), labels.to(processes.device))
            for name, rows in (found | {"labels": labels}).items():
                mine.setdefault(name, []).append(rows.cpu())
    places = torch.cat([torch.arange(start, min(start + batch_size, count))[
        processes.rank::processes.world_size] for start in range(0, count, batch_size)])
    return {name: _everywhere(torch.cat(rows), places, count, processes)
            for name, rows in mine.items()}


def _everywhere(rows: Tensor, places: Tensor, count: int, processes: Processes) -> Tensor:
    """The rows of all processes: a sum in which every row is zero but on one."""
    if processes.world_size == 1:
        return rows
    whole = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype)
    whole[places] = rows
    return processes.sum(whole.to(processes.device)).cpu()


def embedding(model: Any, images: Inputs) -> Tensor:
    """What a classifier reads of each image, (B, d) in float32; elsewhere the model's output."""
    if hasattr(model, "forward_head") and isinstance(images, Tensor):
        found = model.forward_head(model.forward_features(images), pre_logits=True)
        found = found[0] if isinstance(found, tuple) else found
    else:
        found = tokens_and_outputs(model, images)[-1]
    return found.flatten(1).float()


def embedded(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """'features' (B, d)."""
    return {"features": embedding(model, images)}


def classified(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """'best' (B, 5) classes, the likeliest first, 'loss' (B,) in nats, 'broken' (B,)."""
    logits = model(images).float()
    return {"best": best_classes(logits),
            "loss": torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
            "broken": (~(logits < torch.inf)).any(-1)}


def best_classes(scores: Tensor) -> Tensor:
    """(N, classes) → (N, 5), the highest first; of fewer classes all."""
    return scores.topk(min(5, scores.shape[1])).indices
