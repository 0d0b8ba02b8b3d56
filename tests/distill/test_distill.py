"""Losses against formulas written out in float64 numpy."""

import math
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from adacomcat.distill import (
    FeatureAlignment,
    TrainConfig,
    alignment_decay,
    distillation_loss,
    manifold_loss,
    mse_loss,
)
from adacomcat.distill.losses import aligned_blocks, running_weight
from adacomcat.errors import UserError
from adacomcat.utils.random import derived_generator


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def logits(*shape: int) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_distillation_is_the_scaled_divergence(temperature: float) -> None:
    student, teacher = logits(7, 5), logits(7, 5)
    p, q = (softmax(x.numpy() / temperature) for x in (teacher, student))
    expected = temperature ** 2 * (p * np.log(p / q)).sum() / 7
    assert distillation_loss("soft", student, teacher, temperature).item() == \
        pytest.approx(expected, rel=1e-10)
    assert distillation_loss("soft", teacher, teacher, temperature).item() == pytest.approx(0)


def test_soft_distillation_of_comcat_is_a_mean_over_all_outputs() -> None:
    student, teacher = logits(7, 5), logits(7, 5)
    ours = distillation_loss("soft", student, teacher, 1.0, "mean")
    assert ours.item() == pytest.approx(distillation_loss("soft", student, teacher, 1.0).item() / 5)


def test_hard_distillation_is_cross_entropy_with_the_teachers_choice() -> None:
    student, teacher = logits(6, 4), logits(6, 4)
    q = softmax(student.numpy())
    expected = -np.log(q[np.arange(6), teacher.numpy().argmax(1)]).mean()
    assert distillation_loss("hard", student, teacher, 9.0).item() == pytest.approx(expected)


def test_unknown_distillation_is_named() -> None:
    with pytest.raises(UserError, match="sof"):
        distillation_loss("sof", logits(1, 2), logits(1, 2), 1.0)


def test_mse_is_relative_to_the_teacher() -> None:
    student, teacher = logits(3, 4, 5), logits(3, 4, 5)
    expected = ((student - teacher) ** 2).sum() / (teacher ** 2).sum()
    assert mse_loss(student, teacher).item() == pytest.approx(expected.item())
    assert mse_loss(10 * student, 10 * teacher).item() == pytest.approx(expected.item())


def manifold_by_loops(student: np.ndarray, teacher: np.ndarray, chosen: list[int]) -> float:
    def unit(f: np.ndarray) -> np.ndarray:
        return f / np.linalg.norm(f, axis=-1, keepdims=True)
    student, teacher = unit(student), unit(teacher)
    batch, tokens, width = student.shape
    intra = [(student[b, i] @ student[b, j] - teacher[b, i] @ teacher[b, j]) ** 2
             for b in range(batch) for i in range(tokens) for j in range(tokens)]
    inter = [(student[a, i] @ student[b, i] - teacher[a, i] @ teacher[b, i]) ** 2
             for i in range(tokens) for a in range(batch) for b in range(batch)]
    flat = [f.reshape(-1, width)[chosen] for f in (student, teacher)]
    random = [(flat[0][i] @ flat[0][j] - flat[1][i] @ flat[1][j]) ** 2
              for i in range(len(chosen)) for j in range(len(chosen))]
    return sum(map(np.mean, (intra, inter, random)))


def test_manifold_loss_compares_three_gram_matrices() -> None:
    student, teacher = logits(3, 4, 6), logits(3, 4, 6)
    chosen = [0, 5, 11, 7]
    expected = manifold_by_loops(student.numpy(), teacher.numpy(), chosen)
    assert manifold_loss(student, teacher, torch.tensor(chosen)).item() == pytest.approx(expected)


def test_manifold_loss_allows_a_rotation_and_another_width() -> None:
    teacher = logits(3, 4, 6)
    basis = torch.linalg.qr(logits(8, 6)).Q
    assert manifold_loss(teacher @ basis.T, teacher, torch.arange(12)).item() < 1e-20
    assert manifold_loss(teacher @ logits(6, 8), teacher, torch.arange(12)).item() > 1e-3


def test_alignment_fades_as_a_cosine() -> None:
    values = [alignment_decay(epoch, 4) for epoch in (1, 2, 3, 4)]
    assert values == pytest.approx([math.cos(math.pi / 2 * k / 4) for k in range(4)])


def vit(seed: int, depth: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24,
                             num_heads=2, depth=depth, num_classes=3)


@pytest.mark.parametrize("kind", ["mse", "manifold"])
def test_alignment_reads_the_chosen_blocks(kind: str) -> None:
    student, teacher = vit(0), vit(1)
    alignment = FeatureAlignment(kind, student, teacher, None)
    images = torch.randn(2, 3, 16, 16)

    def run() -> Tensor:
        student(images)
        with torch.no_grad():
            teacher(images)
        return alignment.loss(derived_generator(1))

    before = run()
    assert before.item() > 0
    before.backward()
    assert student.blocks[3].mlp.fc1.weight.grad.abs().max() > 0
    expected = before.item()
    if kind == "mse":
        tokens = [m.forward_intermediates(images, indices=[0, 1, 3, 4], intermediates_only=True,
                                          output_fmt="NLC", return_prefix_tokens=True)
                  for m in (student, teacher)]
        parts = [mse_loss(torch.cat([s[1], s[0]], 1), torch.cat([t[1], t[0]], 1)).item()
                 for s, t in zip(*tokens, strict=True)]
        assert expected == pytest.approx(sum(parts) / 4, rel=1e-5)
        run()  # the extra passes above left features behind
    teacher.load_state_dict(student.state_dict())
    assert run().item() < 1e-8 < expected
    alignment.remove()
    assert not student.blocks[0]._forward_hooks


def test_models_without_blocks_are_not_aligned_and_say_so_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    for pair in ((model, model), (vit(0), model), (model, vit(0))):
        with pytest.warns(UserWarning, match="no .blocks") as warned:
            assert not FeatureAlignment("mse", *pair, None)
        assert len(warned) == 1
        assert not any(block._forward_hooks for of in pair for block in getattr(of, "blocks", ()))


def test_the_weight_of_comcats_alignment_is_a_running_product() -> None:
    """engine.py multiplies the weight of the epoch before, and main.py counts epochs from 0."""
    weight, weights = 0.5, []
    for epoch in range(30):
        weight = max(weight * math.cos(math.pi * 0.5 * epoch / 30), 0.01)
        weights.append(weight)
    ours = [running_weight(0.5, epoch, 30) for epoch in range(1, 31)]
    assert ours == pytest.approx(weights)
    assert weights[0] == 0.5 and weights[-1] == 0.01 and 0.2 < weights[10] < 0.4
    assert running_weight(0.5, 31, 30) == running_weight(0.5, 1, 0) == 0.01


def test_comcats_alignment_is_the_sum_of_mean_squares() -> None:
    student, teacher = vit(0), vit(1)
    alignment = FeatureAlignment("comcat", student, teacher, None)
    images = torch.randn(2, 3, 16, 16)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        for index in (0, 1, 3, 4):
            model.blocks[index].register_forward_hook(
                lambda module, args, out, name=name: seen[name].append(out))
        model(images)
    expected = sum(((s - t) ** 2).mean() for s, t in zip(*seen.values(), strict=True))
    assert alignment.loss(derived_generator(1)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("depth, chosen, expected", [
    (5, None, [0, 1, 3, 4]), (3, None, [0, 1, 2]), (1, None, [0]), (5, (-1, 2), [2, 4])])
def test_default_blocks(depth: int, chosen: tuple | None, expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aligned_blocks(vit(0, depth), chosen) == expected


def test_a_block_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no block 7"):
        aligned_blocks(vit(0), (7,))


@pytest.mark.parametrize("changes, said", [
    ({"keep_params": 1.5}, "1.5"), ({"kd": "warm"}, "warm"), ({"align": "x"}, "x"),
    ({"search": "later"}, "later"), ({"epochs": -1}, "epochs"), ({"batch_size": 0}, "batch_size"),
    ({"lrr": 1.0}, "lrr")])
def test_wrong_settings_are_named(changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig.preset("adacomcat", **changes)


def test_the_comcat_preset_does_as_its_published_code() -> None:
    """What ComCAT's main.py, engine.py and its commands for DeiT have, by our names."""
    published = {
        "search": "every", "search_images": "validation", "search_batch_size": 128, "beta": 1.5,
        "alpha_lr": 1e-2, "alpha_weight_decay": 5e-4, "tau_start": 5.0, "tau_end": 0.1,
        "kd": "hard", "kd_alpha": 0.5, "kd_temperature": 1.0, "kd_reduction": "mean",
        "align": "comcat", "align_weight": 0.5, "opt": "adamw", "lr": 5e-4,
        "weight_decay": 0.05, "min_lr": 1e-5, "warmup_lr": 1e-6, "sched": "cosine",
        "clip_grad": None, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "ema_decay": None,
        "calibration_images": 0, "drop_attention_biases": True}
    config = TrainConfig.preset("comcat", epochs=3, keep_params=0.5)
    assert {name: getattr(config, name) for name in published} == published
    adaptive = TrainConfig.preset("adaptive-comcat", epochs=3, keep_params=0.5)
    assert adaptive == config.with_(search="adaptive")
    assert config.with_(batch_size=320, lr_base=512).highest_lr == pytest.approx(5e-4 * 320 / 512)
    with pytest.raises(UserError, match="comkat"):
        TrainConfig.preset("comkat")
