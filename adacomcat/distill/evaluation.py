"""Accuracy and loss of a classifier on labelled images."""

import math

import torch
import torch.nn.functional as F
from timm.utils import AverageMeter, accuracy
from torch import nn

from adacomcat.data import Batches, LabelledImages
from adacomcat.errors import UserError
from adacomcat.utils.distributed import Processes
from adacomcat.utils.progress import progress


@torch.no_grad()
def evaluate(model: nn.Module, dataset: LabelledImages, batch_size: int, processes: Processes,
             workers: int = 0) -> dict[str, float]:
    """{'top1', 'top5': percent, 'loss': mean cross-entropy in nats, 'images': how many}.

    Of a model with fewer than five classes top-5 counts them all.

    Args:
        model: a classifier, on the processes' device; it keeps its mode.
        dataset: labelled images, from ``data.train_and_test``.
        batch_size: images of a step, over all processes.
        processes: the processes that share the work; ``Processes()`` is this one alone.
        workers: processes that decode pictures; 0 decodes in this one.

    Raises:
        UserError: there is no image, an output or the loss is not finite, or a weight is NaN.
    """
    training = model.training
    model.eval()
    top1, top5, loss, broken = AverageMeter(), AverageMeter(), AverageMeter(), 0
    batches = Batches(dataset, batch_size, shuffle=False, seed=0, epoch=0, rank=processes.rank,
                      world_size=processes.world_size, num_workers=workers)
    for images, labels in progress(batches, "evaluating"):
        if not len(labels):
            continue
        images, labels = images.to(processes.device), labels.to(processes.device)
        logits = model(images).float()
        broken += int((~(logits < math.inf)).any(-1).sum())  # -inf is a class that cannot be
        for meter, percent in zip((top1, top5), accuracy(logits, labels, (1, 5)), strict=True):
            meter.update(percent.item(), len(labels))
        loss.update(F.cross_entropy(logits, labels).item(), len(labels))
    sums = torch.tensor([top1.sum, top5.sum, loss.sum, top1.count, broken], dtype=torch.float64,
                        device=processes.device)
    right, among_five, total, count, broken = processes.sum(sums).tolist()
    model.train(training)
    if not count:
        raise UserError("there are no images to evaluate")
    require_finite_outputs(int(broken), int(count), total / count)
    require_no_nan(model)
    return {"top1": right / count, "top5": among_five / count, "loss": total / count,
            "images": int(count)}


def require_finite_outputs(broken: int, count: int, loss: float) -> None:
    """A ``UserError`` where outputs are not finite for ``broken`` images, or ``loss`` is not."""
    if broken or not math.isfinite(loss):
        raise UserError(f"the model's outputs are NaN or infinite for {broken} of {count} images, "
                        f"the loss is {loss}: its weights diverged or are damaged")


def require_no_nan(model: nn.Module) -> None:
    """A ``UserError`` where a weight is NaN: PyTorch's attention gives zeros for NaN keys."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.isnan().any():
            raise UserError(f"the model's {name} holds NaN: it diverged or is damaged")
