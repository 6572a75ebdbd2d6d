"""PHI-S (arXiv 2410.01680): standardise features by one rotation and one scale; every channel varies alike.

With the mean mu and the covariance U diag(lambda) U^T of features of width C: phi^2 = mean of lambda, and
y' = H U^T (y - mu) / phi, where H is a Hadamard matrix over sqrt(C). Every channel of y' has variance 1. What
it was compared with is here too: one mean and one deviation, those of every channel, and whitening.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

# Letters: N vectors, C width.

Normalisation: TypeAlias = Literal["phi-s", "global", "channel", "pca", "zca"]
_ROWS = 1 << 16  # vectors that are converted to float64 at a time
_FLOOR = 1e-6  # least variance of a direction or channel that is divided by, as a share of the largest (ours)


class FeatureStatistics:
    """Mean and covariance of feature vectors, in float64, gathered batch by batch.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of outer products about the mean

    def update(self, vectors: Tensor, valid: Tensor | None = None) -> None:
        """Add vectors [..., C]; the result does not depend on how they are split into batches.

        `valid` [...] bool leaves out the positions where it is False, such as padding; None adds all.
        """
        rows = vectors.flatten(0, -2) if valid is None else vectors[valid]
        for part in rows.split(_ROWS):
            if len(part):
                part = part.double()
                other, mean = FeatureStatistics(part.shape[1]), part.mean(dim=0)
                centred = part - mean
                other.count, other.mean = len(part), mean.cpu()
                other._scatter = (centred.T @ centred).cpu()
                self.merge(other)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the statistics of other vectors (Chan et al. 1979)."""
        total = self.count + other.count
        if not other.count:
            return
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.count * other.count / total)
        self._scatter = self._scatter + other._scatter + between
        self.mean = self.mean + gap * (other.count / total)
        self.count = total

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Merge the statistics of several ranks, each of which calls this and gets those of all."""
        count = sum_over_ranks(torch.tensor(float(self.count), dtype=torch.float64))
        mean = sum_over_ranks(self.count * self.mean) / count.clamp(min=1)
        gap = self.mean - mean
        self._scatter = sum_over_ranks(self._scatter + self.count * torch.outer(gap, gap))
        self.count, self.mean = int(count), mean

    @property
    def covariance(self) -> Tensor:
        """Covariance [C, C], of a population (divided by N)."""
        return self._scatter / max(self.count, 1)


def hadamard(size: int) -> Tensor:
    """Build an orthogonal matrix [size, size] in float64: a Hadamard matrix over sqrt(size) if one is known.

    Kronecker products of Sylvester's and Paley's matrices (both kinds, for prime powers); sizes that have
    none, such as odd ones, get a random orthogonal matrix of a fixed seed.
    """
    factors = _factors(size)
    if factors is None:
        generator = torch.Generator().manual_seed(size)
        orthogonal, triangle = torch.linalg.qr(
            torch.randn(size, size, generator=generator, dtype=torch.float64)
        )
        matrix: Tensor = orthogonal * triangle.diagonal().sign()  # the factorisation leaves them open
    else:
        matrix = reduce(torch.kron, map(_signs, factors)) / size**0.5
    return matrix


def has_hadamard(size: int) -> bool:
    """Check whether `hadamard` knows a Hadamard matrix of a size."""
    return _factors(size) is not None


def _factors(size: int) -> tuple[int, ...] | None:
    """Find sizes of Sylvester's and Paley's matrices whose product is the size, in the product's order.

    The largest power of two that leaves a size of Paley's; by primes alone if possible, then by prime powers,
    then by products of several of Paley's, the smallest first.
    """
    powers = [1 << bit for bit in range((size & -size).bit_length())][::-1]
    for primes in (True, False):
        for power in powers:
            if size == power:
                return (power,)
            if _paley_order(size // power, primes=primes):
                return (power, size // power)
    for part in range(4, size, 4):
        if size % part == 0 and _paley_order(part) and (rest := _factors(size // part)):
            return (part, *rest)
    return None


def _paley_order(size: int, *, primes: bool = False) -> int | None:
    """Return q of Paley's matrix of size q + 1, q = 3 mod 4, or 2 (q + 1), q = 1 mod 4; None = there is none.

    A prime if possible, a prime power otherwise, unless only primes are wanted.
    """
    orders = [q for q, rest in ((size - 1, 3), (size // 2 - 1, 1)) if size % 4 == 0 and q % 4 == rest]
    divisors = {q: _least_divisor(q) for q in orders if q > 1}
    found = [q for q, p in divisors.items() if p == q]
    if not primes:
        found += [q for q, p in divisors.items() if p ** round(math.log(q, p)) == q]
    return next(iter(found), None)


def _signs(size: int) -> Tensor:
    """Build a Hadamard matrix of 1 and -1: Sylvester's if the size is a power of two, otherwise Paley's."""
    ones = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.kron(matrix, ones)
        return matrix
    q = _paley_order(size)
    assert q is not None, "_factors gives no other sizes"
    if q == size - 1:
        return torch.eye(size, dtype=torch.float64) + _bordered(_jacobsthal(q), -1.0)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    conference = _bordered(_jacobsthal(q), 1.0)
    return torch.kron(conference, ones) + torch.kron(torch.eye(q + 1, dtype=torch.float64), other)


def _bordered(core: Tensor, corner: float) -> Tensor:
    """Put a row of ones above a matrix, and a column of `corner` before it; zero where they meet."""
    matrix = torch.zeros(len(core) + 1, len(core) + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1.0, corner, core
    return matrix


def _jacobsthal(q: int) -> Tensor:
    """Build the matrix of the quadratic characters of the differences in the field of q = p^n elements.

    An element is the number whose digits to base p are the coefficients of its polynomial.
    """
    p = _least_divisor(q)
    places = [p**place for place in range(round(math.log(q, p)))]
    generated = (_powers_of_x(tail, p, places) for tail in range(1, q) if tail % p)
    powers = next(powers for powers in generated if len(powers) == q - 1)
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[powers[::2]] = 1.0
    character[0] = 0.0
    numbers = torch.arange(q)
    differences = torch.zeros(q, q, dtype=torch.int64)
    for place in places:
        digits = numbers // place
        differences += (digits[:, None] - digits[None, :]) % p * place
    return character[differences]


def _powers_of_x(tail: int, p: int, places: Sequence[int]) -> list[int]:
    """Return the different powers of x modulo x^n - tail, from 1 on; all but 0 if it is primitive."""
    powers = [1]
    while True:
        lead, rest = divmod(powers[-1], places[-1])
        power = sum((rest * p // place + lead * (tail // place)) % p * place for place in places)
        if power == 1:
            return powers
        powers.append(power)


def _least_divisor(number: int) -> int:
    """Return the least divisor above 1."""
    return next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)


class FeatureNormaliser(nn.Module):
    """(x - mean) @ tx.T: standardises tokens by the mean and the rotation of their own distribution.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(width))
        self.tx = nn.Buffer(torch.eye(width))

    @classmethod
    def fit(cls, statistics: FeatureStatistics, kind: Normalisation = "phi-s") -> FeatureNormaliser:
        """Compute the normalisation of the statistics; vectors that they were measured on get mean 0.

        Under `phi-s` and `channel` every channel gets variance 1, under `global` their mean is 1 (with one
        mean for all channels), and `pca` and `zca` make the covariance the identity, except in directions
        that hardly vary.
        """
        normaliser = cls(len(statistics.mean))
        mean, covariance = statistics.mean, statistics.covariance
        if kind == "global":
            centre = mean.mean()
            square = covariance.diagonal().mean() + (mean - centre).square().mean()
            mean, matrix = centre.expand_as(mean), torch.eye(len(mean), dtype=torch.float64) / _root(square)
        elif kind == "channel":
            matrix = torch.diag(1 / _root(covariance.diagonal()))
        else:
            values, vectors = _eigen(covariance)
            if kind == "phi-s":
                matrix = hadamard(len(values)) @ vectors.T / _root(values.mean())
            else:
                matrix = vectors.T / _root(values)[:, None]
                matrix = vectors @ matrix if kind == "zca" else matrix
        normaliser.mean.copy_(mean)
        normaliser.tx.copy_(matrix)
        return normaliser

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise [..., C]."""
        normalised: Tensor = (tokens - self.mean) @ self.tx.T
        return normalised

    def invert(self, tokens: Tensor) -> Tensor:
        """Compute the tokens [..., C] that `forward` maps to the given ones, in float32."""
        plain: Tensor = tokens.float() @ self._inverse().float().T + self.mean.float()
        return plain.to(tokens.dtype)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Append the inverse to a linear layer [C, width], [C] that predicts normalised tokens."""
        back = self._inverse()
        folded = back @ weight.double(), back @ bias.double() + self.mean.double()
        return folded[0].to(weight.dtype), folded[1].to(bias.dtype)

    def _inverse(self) -> Tensor:
        """Compute the inverse [C, C] of `tx` in float64, with which a prediction is mapped back."""
        inverse: Tensor = torch.linalg.inv(self.tx.double())
        return inverse


def _root(variances: Tensor) -> Tensor:
    """Compute deviations [...] that can be divided by: none is less than a small part of the largest."""
    least = max(_FLOOR * float(variances.max()), 1e-24)
    return variances.clamp(min=least).sqrt()


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues [C] of at least 0 and eigenvectors [C, C], in columns, each with its largest entry
    positive: eigenvectors have no sign of their own.
    """
    values, vectors = torch.linalg.eigh(covariance)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return values.clamp(min=0), vectors * torch.where(largest < 0, -1.0, 1.0)
