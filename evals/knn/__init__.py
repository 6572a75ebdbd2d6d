"""k-NN, as an evaluator of models and as a function on precomputed features."""

from .index import KnnResult, knn

__all__ = ["KnnResult", "knn"]
