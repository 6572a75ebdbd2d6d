"""How alike a student's features are to a teacher's, from sums over images in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from radio.errors import RadioError
from radio.ops import angle, resize_features
from radio.types import Features

# Letters: N images, T tokens, C width of the teacher's summary, D of its tokens, E of the student's tokens,
# W = 2 D + E.

_ROUNDING = 1e-12  # variance below this share of the second moment is none


class Sums(NamedTuple):
    """What is kept of N images: sums over the tokens on the teacher's grid, and the summaries."""

    errors: Tensor  # [N] squared error of the adapted tokens
    squares: Tensor  # [N] squared length of the teacher's tokens
    totals: Tensor  # [N, D] the teacher's tokens
    adapted: Tensor  # [N, C] the student's summaries in the teacher's space
    summaries: Tensor  # [N, C] the teacher's
    sums: Tensor  # [W] the teacher's, adapted and own tokens side by side, over all images
    products: Tensor  # [W, W] their outer products, over all images
    num_tokens: Tensor  # [] N * T

    def cpu(self) -> Sums:
        """Return the sums on the CPU."""
        return Sums(*(tensor.cpu() for tensor in self))


def no_images(summary_dim: int, token_dim: int, own_dim: int) -> Sums:
    """Return the sums of no images, of widths C, D and E."""
    width = 2 * token_dim + own_dim
    shapes = [(0,), (0,), (0, token_dim), (0, summary_dim), (0, summary_dim), (width,), (width, width), ()]
    return Sums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def sum_features(own: Features, adapted: Features, teacher: Features) -> Sums:
    """Sum a batch of N images; `own` tokens are the student's, `adapted` ones are on the teacher's grid."""
    y, a = teacher.tokens.double(), adapted.tokens.double()
    b = resize_features(own, teacher.grid).tokens.double()
    rows = torch.cat([y, a, b], dim=2).flatten(0, 1)  # [N * T, W]
    return Sums(
        errors=(a - y).square().sum(dim=(1, 2)),
        squares=y.square().sum(dim=(1, 2)),
        totals=y.sum(dim=1),
        adapted=adapted.summary.double(),
        summaries=teacher.summary.double(),
        sums=rows.sum(dim=0),
        products=rows.T @ rows,
        num_tokens=rows.new_tensor(len(rows)),
    )


def join(parts: Sequence[Sums]) -> Sums:
    """Join the sums of different images."""
    columns = list(zip(*parts, strict=True))
    return Sums(*map(torch.cat, columns[:5]), *(torch.stack(column).sum(dim=0) for column in columns[5:]))


def token_errors(sums: Sums) -> Tensor:
    """Return each image's squared error, and its teacher's tokens' squared distance from their mean: [N, 2].

    The ratio of the columns' sums is the fraction of variance unexplained: 1 for the mean token.

    Raises:
        RadioError: the teacher's tokens do not vary.
    """
    mean = sums.totals.sum(dim=0) / sums.num_tokens
    tokens = sums.num_tokens / len(sums.errors)
    distances = sums.squares - 2 * sums.totals @ mean + tokens * mean.square().sum()
    if not distances.sum() > _ROUNDING * sums.squares.sum():
        raise RadioError("its tokens are all the same; give different images, or look at its weights")
    return torch.stack([sums.errors, distances], dim=1)


def summary_errors(sums: Sums) -> Tensor:
    """Return each image's squared angle to the teacher's summary, and the teacher's to its mean: [N, 2].

    In squared radians. The ratio of the columns' sums is the loss of C-RADIOv4's eq. 3 to 7: 1 for the mean
    direction.

    Raises:
        RadioError: the teacher's summaries do not vary.
    """
    dispersion = angle(sums.summaries, sums.summaries.mean(dim=0)).square()
    if not dispersion.mean() > _ROUNDING:
        raise RadioError("its summaries are all the same; give different images, or look at its weights")
    return torch.stack([angle(sums.adapted, sums.summaries).square(), dispersion], dim=1)


def cka(sums: Sums) -> tuple[float, float]:
    """Compute the linear CKA of the teacher's tokens with the adapted ones, and with the student's own.

    |Y'X|^2 / (|X'X| |Y'Y|) of centred features with Frobenius norms (Kornblith et al. 2019, section 3): the
    same for rotated and scaled features, from 0 to 1; 0 for features that do not vary.
    """
    width = sums.totals.shape[1]
    moments = sums.products / sums.num_tokens
    covariance = moments - torch.outer(sums.sums, sums.sums) / sums.num_tokens**2
    teacher, adapted, own = slice(width), slice(width, 2 * width), slice(2 * width, None)

    def norm(rows: slice, columns: slice) -> float:
        part = covariance[rows, columns].norm()
        return float(part) if part > _ROUNDING * moments[rows, columns].norm() else 0.0

    def alike(columns: slice) -> float:
        norms = norm(teacher, teacher) * norm(columns, columns)
        return norm(teacher, columns) ** 2 / norms if norms else 0.0

    return alike(adapted), alike(own)
