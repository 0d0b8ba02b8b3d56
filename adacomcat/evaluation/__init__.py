"""How good a model is: accuracy with and without a head, agreement with the dense model."""

from adacomcat.evaluation.agreement import Agreement, agreement, flips
from adacomcat.evaluation.neighbours import knn_scores
from adacomcat.evaluation.probe import probe_scores
from adacomcat.evaluation.scores import bootstrap_interval, measures

__all__ = ["Agreement", "agreement", "bootstrap_interval", "flips", "knn_scores", "measures",
           "probe_scores"]
