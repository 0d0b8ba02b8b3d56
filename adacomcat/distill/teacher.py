"""Whether one model can teach another: both are tried on an image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from adacomcat.errors import UserError, reason
from adacomcat.utils.model import evaluating, input_size

Outputs = Callable[[nn.Module, Tensor], Sequence[Tensor]]


def _outputs(model: nn.Module, images: Tensor) -> Sequence[Tensor]:
    return [model(images)]


@torch.no_grad()
def require_teacher(student: nn.Module, teacher: nn.Module, outputs: Outputs = _outputs) -> None:
    """Raise a ``UserError`` unless the teacher takes the student's images and gives outputs alike.

    Args:
        student: the model that learns.
        teacher: the model that it learns from.
        outputs: (model, images) → the tensors that are compared, which must have equal shapes.
    """
    size = input_size(student)
    given = _tried(student, size, outputs)
    try:
        wanted = _tried(teacher, size, outputs)
    except Exception as error:  # each architecture has errors of its own for images
        raise UserError(f"the teacher does not take the model's images of {size}: "
                        f"{reason(error)}") from error
    shapes = [[tuple(tensor.shape[1:]) for tensor in tensors] for tensors in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(f"the teacher's outputs are {shapes[1]} and the model's {shapes[0]}; take "
                        "a teacher of the same classes and width")


def _tried(model: nn.Module, size: tuple[int, int, int], outputs: Outputs) -> Sequence[Tensor]:
    parameter = next(model.parameters())
    images = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    with evaluating(model):
        return outputs(model, images)
