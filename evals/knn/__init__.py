"""k-NN, as an evaluator of models and as a function on precomputed features."""

from .arrays import KnnResult, knn

__all__ = ["KnnResult", "knn"]
