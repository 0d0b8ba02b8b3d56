"""Losses of a student against its teacher: of the outputs, and of the blocks' features."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adacomcat.errors import UserError
from adacomcat.utils.limits import CHOICES

KD, ALIGN = CHOICES["kd"], CHOICES["align"]
LEAST_WEIGHT = 0.01  # of the alignment in ComCAT's code
RANDOM_TOKENS = 192  # tokens of a batch that the manifold loss compares with each other


def distillation_loss(kind: str, student: Tensor, teacher: Tensor, temperature: float,
                      reduction: str = "batchmean") -> Tensor:
    """'soft': T² KL(teacher/T ‖ student/T); 'hard': CE against the teacher's argmax.

    Soft distillation is Hinton, Vinyals and Dean's (arXiv 1503.02531), hard DeiT's (Touvron et al.,
    arXiv 2012.12877). A scalar, in nats.

    Args:
        kind: 'soft' or 'hard'.
        student: logits (B, classes).
        teacher: logits (B, classes).
        temperature: T.
        reduction: of the divergence: 'batchmean' is the mean over images, 'mean' that over all
            logits, as DeiT's and ComCAT's code take it.

    Raises:
        UserError: the kind is unknown.
    """
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(-1))
    if kind == "soft":
        divergence = F.kl_div((student / temperature).log_softmax(-1),
                              (teacher / temperature).log_softmax(-1),
                              log_target=True, reduction="sum")
        count = student.numel() if reduction == "mean" else len(student)
        return divergence * temperature ** 2 / count
    raise UserError(f"unknown distillation {kind!r}; choose one of {', '.join(KD)}")


def mse_loss(student: Tensor, teacher: Tensor, power: Tensor | None = None) -> Tensor:
    """|student - teacher|² / |teacher|², over all elements of two tensors of one shape.

    power: the mean square of the teacher over more images than these.
    """
    power = teacher.square().mean() if power is None else power
    return (student - teacher).square().mean() / power.clamp_min(1e-12)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|² / |teacher - mean teacher|², in float32.

    The mean is over all dimensions but the last. A student that always gives that mean has error 1.
    """
    student, teacher = student.float().flatten(0, -2), teacher.float().flatten(0, -2)
    spread = (teacher - teacher.mean(0)).square().sum().clamp_min(1e-30)
    return (student - teacher).square().sum() / spread


def manifold_loss(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Mean square difference between student and teacher, summed over three Gram matrices.

    The matrices are of normalised tokens: those of one image (B, N, N), those at one place in all
    images (N, B, B), and the ``chosen`` ones. The loss is that of Hao et al. (arXiv 2107.01378).

    Args:
        student: features (B, N, d).
        teacher: features (B, N, d).
        chosen: indices into the B · N tokens of the batch.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    total = student.new_zeros(())
    for view in (lambda f: f, lambda f: f.transpose(0, 1), lambda f: f.flatten(0, 1)[chosen]):
        gram_student, gram_teacher = (_gram(view(features)) for features in (student, teacher))
        total = total + F.mse_loss(gram_student, gram_teacher)
    return total


def _gram(features: Tensor) -> Tensor:
    return features @ features.mT


def alignment_decay(epoch: int, epochs: int) -> float:
    """cos(π/2 · (epoch - 1) / epochs): 1 in the first epoch, towards 0 in the last."""
    return math.cos(math.pi / 2 * (epoch - 1) / max(1, epochs))


def running_weight(first: float, epoch: int, epochs: int) -> float:
    """``first`` times the decays of all epochs up to this one, as ComCAT's code has it.

    It never falls below ``LEAST_WEIGHT``. In the epochs after ``epochs``, whose ranks are no longer
    searched, it stands there.
    """
    if epoch > epochs:
        return LEAST_WEIGHT
    product = math.prod(alignment_decay(number, epochs) for number in range(1, epoch + 1))
    return max(first * product, LEAST_WEIGHT)


class BlockFeatures:
    """The outputs of some of ``model.blocks`` in the latest forward pass, kept by hooks."""

    def __init__(self, model: nn.Module, indices: Sequence[int]) -> None:
        self.outputs: dict[int, Tensor] = {}
        blocks: Any = model.blocks if indices else ()
        self._handles = [blocks[index].register_forward_hook(self._keep(index))
                         for index in indices]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim > 2:
                self.outputs[index] = output
        return hook

    def take(self) -> list[Tensor]:
        """The outputs, (B, N, d) each; they are forgotten afterwards. What is no tensor of tokens,
        such as the branches that some blocks give, is left out.
        """
        kept = [output.flatten(1, -2) for _, output in sorted(self.outputs.items())]
        self.outputs = {}
        return kept

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()


def aligned_blocks(model: nn.Module, chosen: Sequence[int] | None) -> list[int]:
    """Ascending indices of the blocks to align: the chosen ones, else the first and last two.

    Empty where the model has no ``.blocks``, as convolutional networks have none.

    Raises:
        UserError: there is no such block.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        return []
    count = len(blocks)
    if chosen is None:
        return sorted({0, 1, count - 2, count - 1} & set(range(count)))
    for index in chosen:
        if not -count <= index < count:
            raise UserError(f"there is no block {index} to align: the model has {count} blocks")
    return sorted({index % count for index in chosen})


def _some_manifold_loss(student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
    rows = student.shape[0] * student.shape[1]
    chosen = torch.randperm(rows, generator=generator)[:RANDOM_TOKENS].to(student.device)
    return manifold_loss(student, teacher, chosen)


class FeatureAlignment:
    """The mean loss over blocks, on the outputs that hooks on student and teacher keep.

    Of 'comcat' it is the sum of the blocks' mean squared errors.

    ``bool`` is False where no block is aligned.
    """

    def __init__(self, kind: str, student: nn.Module, teacher: nn.Module,
                 chosen: Sequence[int] | None) -> None:
        if kind not in ALIGN:
            raise UserError(f"unknown alignment {kind!r}; choose one of {', '.join(ALIGN)}")
        self.kind = kind
        self.features: list[BlockFeatures] = []
        if kind == "none":
            return
        # Of a teacher with another number of blocks, the last two are its own.
        models = (student, teacher)
        indices = [aligned_blocks(model, chosen) for model in models]
        lacking = [type(model).__name__ for model, found in zip(models, indices, strict=True)
                   if not found]
        if lacking:
            warnings.warn(f"{' and '.join(lacking)} has no .blocks: no features are aligned",
                          stacklevel=2)
        else:
            self.features = [BlockFeatures(model, found)
                             for model, found in zip(models, indices, strict=True)]

    def __bool__(self) -> bool:
        return bool(self.features)

    def require_alike(self) -> None:
        """Judge the latest features of both, and warn where they are not alike.

        Features of another width are aligned by Gram matrices, which do not depend on it. Features
        of other tokens are not aligned.
        """
        if not self:
            return
        shapes = [[tuple(tensor.shape[1:]) for tensor in features.take()]
                  for features in self.features]
        differ = f"the teacher's features are {shapes[1]} and the model's {shapes[0]}"
        tokens = [[shape[:1] for shape in of_model] for of_model in shapes]
        if tokens[0] != tokens[1]:
            warnings.warn(f"{differ}: no features are aligned", stacklevel=2)
            self.remove()
        elif shapes[0] != shapes[1] and self.kind != "manifold":
            warnings.warn(f"{differ}: their Gram matrices are aligned, as by manifold",
                          stacklevel=2)
            self.kind = "manifold"

    def loss(self, generator: torch.Generator,
             mean: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
        """A scalar, of the latest forward pass of both.

        Args:
            generator: chooses tokens for the manifold loss.
            mean: means over these images → means over the images of all processes. The manifold
                loss compares images of this process alone.
        """
        students, teachers = ([tensor.float() for tensor in features.take()]
                              for features in self.features)
        pairs = zip(students, teachers, strict=True)
        if self.kind == "mse":
            powers = mean(torch.stack([teacher.square().mean() for teacher in teachers]))
            losses = [mse_loss(*pair, power) for pair, power in zip(pairs, powers, strict=True)]
        elif self.kind == "comcat":
            return torch.stack([F.mse_loss(*pair) for pair in pairs]).sum()
        else:
            losses = [_some_manifold_loss(*pair, generator) for pair in pairs]
        return torch.stack(losses).mean()

    def remove(self) -> None:
        """Take the hooks away; nothing is aligned any more."""
        for features in self.features:
            features.remove()
        self.features = []
