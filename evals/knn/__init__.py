"""k-NN: as an evaluator of models, and as a function over features of one's own."""

from .arrays import KnnResult, knn

__all__ = ["KnnResult", "knn"]
