"""Accuracy without a head, agreement and intervals, each against another computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import dense_model, images
from sklearn.neighbors import KNeighborsClassifier

import adacomcat
from adacomcat import UserError, evaluation
from adacomcat.convert.calibrate import calibration_batches
from adacomcat.data import datasets
from adacomcat.distill import evaluate
from adacomcat.evaluation.passes import classified, embedded, embedding, rows_of
from adacomcat.evaluation.probe import PENALTY
from adacomcat.utils.distributed import Processes


def clusters(count, seed, width=12, classes=4):
    """Features around one centre for each class; most are near their own."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 0.8 * torch.randn(count, width, generator=generator), labels


def test_neighbours_are_those_of_scikit_learn():
    (train, labels), (test, _) = clusters(150, 1), clusters(40, 2)
    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute",
                               weights=lambda distance: np.exp((1 - distance) / 0.07))
    knn.fit(train.double().numpy(), labels.numpy())
    scores = evaluation.knn_scores(train, labels, test, 4)
    expected = torch.from_numpy(knn.predict_proba(test.double().numpy()))
    torch.testing.assert_close(F.normalize(scores, p=1, dim=1).double(), expected,
                               rtol=1e-4, atol=1e-5)


def test_fewer_training_images_than_neighbours_and_a_class_without_any():
    scores = evaluation.knn_scores(torch.eye(3), torch.tensor([0, 2, 2]), torch.eye(3), 4)
    assert scores.argmax(1).tolist() == [0, 2, 2] and (scores[:, [1, 3]] == 0).all()


def test_probe_is_at_the_minimum_of_its_loss():
    """At the optimum the gradient of mean loss and penalty is zero, by autograd in float64."""
    (train, labels), (test, _) = clusters(200, 3), clusters(30, 4)
    scores = evaluation.probe_scores(train, labels, test, 5)
    assert (scores[:, 4] == -math.inf).all()
    whitened = (train.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    asked = (test.double() - train.double().mean(0)) / train.double().std(0, correction=0)
    weight = torch.zeros(4, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9,
                                  line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        found = PENALTY * F.cross_entropy(whitened @ weight.T + bias, labels, reduction="sum")
        found = found + weight.square().sum() / 2
        found.backward()
        return found
    optimizer.step(loss)
    expected = (asked @ weight.T + bias).log_softmax(1).detach()
    torch.testing.assert_close(scores[:, :4], expected, rtol=1e-2, atol=1e-2)


def test_interval_is_that_of_the_normal_approximation():
    right = (torch.rand(4000, generator=torch.Generator().manual_seed(5)) < 0.9).double()
    mean, error = right.mean().item(), (right.var() / 4000).sqrt().item()
    low, high = evaluation.bootstrap_interval(right)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert evaluation.bootstrap_interval(right) == [low, high]
    assert evaluation.bootstrap_interval(torch.tensor([3.0])) == [3.0, 3.0]


def test_measures_and_flips_by_hand():
    labels = torch.tensor([0, 0, 1, 2])
    ours = torch.tensor([[0, 1], [2, 0], [1, 0], [1, 0]])
    dense = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 1]])
    found = evaluation.measures(ours, labels)
    assert (found["top1"], found["top5"]) == (50, 75)
    assert found["per_class"] == {"0": 50, "1": 100, "2": 0}
    changed = evaluation.flips(ours, dense, labels)
    assert (changed["flips"], changed["lost"], changed["won"]) == (75, 25, 25)
    assert changed["top1_difference"] == 0
    low, high = changed["top1_difference_interval"]
    assert -100 <= low < 0 < high <= 100


def test_agreement_against_its_formulas():
    model = dense_model("vit_small_patch14_dinov2")
    small = adacomcat.compress(model, keep_params=0.6)
    pictures = images(model, 19)
    found = evaluation.agreement(small, model, calibration_batches(pictures, model))
    with torch.inference_mode():
        ours, dense = (m.forward_features(pictures).double() for m in (small, model))
    error = (ours - dense).square().sum()
    spread = (dense - dense.flatten(0, 1).mean(0)).square().sum()
    assert found.token_error == pytest.approx((error / spread).item(), rel=1e-4)
    heads = [tokens[:, 0] for tokens in (ours, dense)]
    cosine = F.cosine_similarity(*heads).mean().item()
    assert found.cosine == pytest.approx(cosine, rel=1e-5)
    assert found.cosine_interval[0] < found.cosine < found.cosine_interval[1]
    near = [{(i, j) for i, row in enumerate(F.normalize(h) @ F.normalize(h).T - 9 * torch.eye(19))
             for j in row.topk(5).indices.tolist()} for h in heads]
    assert found.neighbours == pytest.approx(100 * len(near[0] & near[1]) / 95)
    same = evaluation.agreement(model, model, calibration_batches(pictures, model))
    assert (same.token_error, same.neighbours) == (0, 100) and found.neighbours < 100


def test_agreement_needs_two_images_and_equal_tokens():
    model, other = dense_model(), dense_model("deit3_small_patch16_224", img_size=32,
                                              embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(UserError, match="at least two"):
        evaluation.agreement(model, model, calibration_batches(images(model, 1), model))
    with pytest.raises(UserError, match="name the model that was compressed"):
        evaluation.agreement(model, other, calibration_batches(images(model, 2), model))


def test_rows_come_in_the_order_of_the_dataset():
    model = dense_model("vit_tiny_patch16_224", img_size=16, patch_size=8, in_chans=1,
                        embed_dim=32, depth=1, num_heads=2, num_classes=10)
    _, test = datasets.train_and_test("digits", None, datasets.model_data_config(model))
    test = test.subset(torch.arange(70))
    model.train()
    rows = rows_of(embedded, model, test, 32, Processes())
    pictures, labels = test.batch(torch.arange(70))
    assert model.training and torch.equal(rows["labels"], labels)
    with torch.inference_mode():
        expected = model.eval().forward_features(pictures)[:, 0]
    torch.testing.assert_close(rows["features"], expected, rtol=1e-5, atol=1e-5)
    judged = rows_of(classified, model, test, 32, Processes())
    whole = evaluate(model, test, 32, Processes())
    assert judged["loss"].mean().item() == pytest.approx(whole["loss"], rel=1e-5)
    found = evaluation.measures(judged["best"], labels)
    assert found["top1"] == pytest.approx(whole["top1"])


@pytest.mark.parametrize("architecture", ["deit3_small_patch16_224",
                                          "swin_tiny_patch4_window7_224"])
def test_embedding_is_what_the_head_reads(architecture):
    model = dense_model(architecture)
    pictures = images(model, 3)
    with torch.inference_mode():
        head = model.get_classifier()
        torch.testing.assert_close(head(embedding(model, pictures)), model(pictures),
                                   rtol=1e-4, atol=1e-5)
