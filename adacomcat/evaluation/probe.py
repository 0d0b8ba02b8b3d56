"""A linear probe: logistic regression on frozen features."""

import torch
from torch import Tensor

PENALTY = 0.1  # scikit-learn's C, for features of variance 1
ITERATIONS = 1000


def probe_scores(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """(N, classes) log probabilities of ``test`` by a regression fitted to ``train``.

    Args:
        train: features of the training images, (M, d).
        labels: their classes, (M,), at least two different ones.
        test: features of the images to classify, (N, d).
        classes: how many there are; one without training images has -inf.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=ITERATIONS))
    probe.fit(train.double().numpy(), labels.numpy())
    scores = torch.full((len(test), classes), -torch.inf, dtype=torch.float64)
    known = torch.from_numpy(probe[-1].classes_)
    scores[:, known] = torch.from_numpy(probe.predict_log_proba(test.double().numpy()))
    return scores
