"""Linear heads on frozen features: logistic regression over penalties, and SGD over learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import SizeError
from radio.resources import local_ranks, memory_of

# Letters: N images, D features, K classes, B batch, L learning rates.

PENALTIES = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))  # DINOv2's C
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # DINOv2's
TOLERANCE = 1e-12  # DINOv2's; at 1e-9 five of 2,000 predictions for separable classes differ at large C
_CELLS = 1 << 25  # logits in memory at once
_HISTORY = 10  # of L-BFGS, as scipy's and scikit-learn's
_MOMENTUM = 0.9
_FIRST_STD = 0.01  # of sgd's weights


class Head(NamedTuple):
    """A linear map from the first D features to logits."""

    weight: Tensor  # [D, K]
    bias: Tensor  # [K]

    def logits(self, features: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n, K] of features [N, >= D], block by block, as the head's type on its device."""
        for block in features.split(_rows(self.weight.shape[1])):
            yield block[:, : len(self.weight)].to(self.weight) @ self.weight + self.bias


class Fit(NamedTuple):
    """A head, and what it was trained with."""

    head: Head
    value: float  # C, or the learning rate for a batch of 256
    features: str = "summary"
    converged: bool = True


@final
class LogisticRegression:
    """Multinomial logistic regression of features [N, D], as scikit-learn defines it.

    It minimises mean cross-entropy + |W|^2 / (2 C N); the bias has no penalty. L-BFGS runs in other
    coordinates of the same problem: centred features along their principal axes, each scaled by the root of
    its curvature, which takes fewer iterations than features as they are.

    Args:
        features: [N, D] float32, on the CPU.
        labels: [N].
        rows: those of the images to fit, [n].
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        rows: Tensor,
        num_classes: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._count, self._num_classes, width = len(rows), num_classes, features.shape[1]
        self._labels = labels[rows].to(device)
        self._x = torch.empty(len(rows), width, dtype=dtype, device=device)
        blocks = list(rows.split(_rows(width)))
        for target, block in zip(self._x.split(_rows(width)), blocks, strict=True):
            target.copy_(features[block])
        self._mean = self._x.mean(dim=0)
        self._x -= self._mean
        values, self._axes = torch.linalg.eigh(self._x.T @ self._x / len(rows))
        self._variances = values.clamp_min(0)
        for block in self._x.split(_rows(width)):
            block.copy_(block @ self._axes)
        self._weight = self._x.new_zeros(width + 1, num_classes)  # along the axes; the last row is the bias
        self._spread = (num_classes - 1) / num_classes**2  # mean p (1 - p) over images and classes

    def fit(self, c: float, *, max_iterations: int, tolerance: float) -> Fit:
        """Fit the head for a C, starting from the one before.

        Args:
            max_iterations: most iterations of L-BFGS.
            tolerance: it ends where the objective falls by less, or no gradient is larger.
        """
        penalty = 1 / (c * self._count)
        curvature = torch.cat([self._spread * self._variances + penalty, self._x.new_tensor([self._spread])])
        scale = curvature.rsqrt().unsqueeze(1)
        scaled = torch.nn.Parameter(self._weight / scale)
        max_evaluations = 2 * max_iterations
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=max_iterations,
            max_eval=max_evaluations,
            tolerance_grad=tolerance,
            tolerance_change=tolerance,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )

        def closure() -> float:
            loss, gradient = self._objective(scaled.detach() * scale, penalty)
            scaled.grad = gradient * scale
            return loss

        optimizer.step(closure)
        self._weight = scaled.detach() * scale
        state = optimizer.state[scaled]
        weight = self._axes @ self._weight[:-1]
        return Fit(
            Head(weight, self._weight[-1] - self._mean @ weight),
            c,
            converged=state["n_iter"] < max_iterations and state["func_evals"] < max_evaluations,
        )

    def _objective(self, weight: Tensor, penalty: float) -> tuple[float, Tensor]:
        """Compute the objective and its gradient [D + 1, K]; keep the mean of p (1 - p)."""
        gradient = torch.zeros_like(weight)
        loss, spread = weight.new_zeros(()), weight.new_zeros(())
        rows = _rows(self._num_classes)
        for x, labels in zip(self._x.split(rows), self._labels.split(rows), strict=True):
            logits = torch.addmm(weight[-1], x, weight[:-1])
            places = labels.unsqueeze(1)
            logits -= logits.amax(dim=1, keepdim=True)
            own = logits.gather(1, places)
            shares = logits.exp_()
            totals = shares.sum(dim=1, keepdim=True)
            loss += (totals.log() - own).sum()
            shares /= totals
            spread += (shares * (1 - shares)).sum()
            shares.scatter_add_(1, places, torch.full_like(own, -1.0))
            gradient[:-1].addmm_(x.T, shares)
            gradient[-1] += shares.sum(dim=0)
        gradient /= self._count
        gradient[:-1] += penalty * weight[:-1]
        smallest = torch.finfo(weight.dtype).eps  # of separable features it would come to nothing
        self._spread = max(float(spread) / (self._count * self._num_classes), smallest)
        return float(loss / self._count + penalty / 2 * weight[:-1].square().sum()), gradient


def fit_by_sgd(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    kinds: Mapping[str, int],
    rates: Sequence[float],
    *,
    iterations: int,
    batch: int,
    seed: int,
    advance: Callable[[int], None],
) -> Iterator[Fit]:
    """Train a head for each kind of features and each learning rate, all at once, and yield them.

    SGD with momentum 0.9 and without weight decay; the rates, scaled by batch / 256, fall to 0 by a cosine.
    Batches and first weights are functions of the seed, the step and the rate's place.

    Args:
        features: [N, D] float32, on the device that computes.
        labels: [N], there too.
        kinds: how many of the first features each kind has.
        rates: [L], for a batch of 256.
        advance: is told every step.
    """
    num_rates, device = len(rates), features.device
    generator = torch.Generator().manual_seed(seed)
    scaled = torch.tensor(rates, dtype=torch.float32) * (batch / 256)
    steps = scaled.repeat_interleave(num_classes).to(device)  # [L * K]
    weights = []
    for width in kinds.values():
        first = _FIRST_STD * torch.randn(width, num_classes, generator=generator)
        first = torch.cat([first, torch.zeros(1, num_classes)])  # the last row is the bias
        weights.append(first.repeat(1, num_rates).to(device))
    momenta = [torch.zeros_like(weight) for weight in weights]
    for step, rows in enumerate(sample_batches(len(features), batch, iterations, seed)):
        chosen = rows.to(device)
        x = F.pad(features[chosen], (0, 1), value=1.0)  # [B, D + 1]
        places = labels[chosen].view(-1, 1, 1).expand(-1, num_rates, 1)
        decay = 0.5 * (1 + math.cos(math.pi * step / iterations))
        for width, weight, momentum in zip(kinds.values(), weights, momenta, strict=True):
            inputs = torch.cat([x[:, :width], x[:, -1:]], dim=1)
            shares = (inputs @ weight).view(len(x), num_rates, num_classes).softmax(dim=2)
            shares.scatter_add_(2, places, shares.new_full((1, 1, 1), -1.0).expand_as(places))
            gradient = inputs.T @ shares.flatten(1) / len(x)
            momentum.mul_(_MOMENTUM).add_(gradient)
            weight.addcmul_(momentum, steps, value=-decay)
        advance(1)
    for kind, weight in zip(kinds, weights, strict=True):
        for rate, part in zip(rates, weight.chunk(num_rates, dim=1), strict=True):
            yield Fit(Head(part[:-1], part[-1]), rate, kind)


def sample_batches(count: int, batch: int, iterations: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows [B] of each step: the images in an order of their own in every epoch, none left out."""
    epoch, left = 0, torch.empty(0, dtype=torch.int64)
    for _ in range(iterations):
        while len(left) < batch:
            order = np.random.default_rng([seed, epoch]).permutation(count)
            left, epoch = torch.cat([left, torch.from_numpy(order)]), epoch + 1
        yield left[:batch]
        left = left[batch:]


def hold_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to train on and every tenth row, held out, both ascending.

    The rows are drawn as a systematic sample of a random order that is sorted by class, so that each class is
    held out in its proportion, as far as whole images allow; a function of labels and seed.
    """
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(len(labels)))
    order = order[labels[order].argsort(stable=True)]
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[int(generator.integers(min(10, len(labels)))) :: 10]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _rows(width: int) -> int:
    return max(1, _CELLS // width)


def check_memory(count: int, width: int, num_classes: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the features and the optimizer's state fit into memory, on the one rank that fits.

    Raises:
        SizeError: they do not; the message has the sizes.
    """
    cells = count * width + (2 * _HISTORY + 8) * (width + 1) * num_classes + 4 * _CELLS
    need, there = cells * dtype.itemsize, memory_of(device)
    if device.type == "cpu":  # every rank holds the float32 features, and one fits
        need, there = need + 4 * count * width * local_ranks(), there * local_ranks()
    if need > there:
        smaller = ", or --fit-precision fp32" if dtype == torch.float64 else ""
        raise SizeError(
            f"a linear head for {num_classes} classes on {count:,} x {width} features takes "
            f"{need / 1e9:,.1f} GB, and {device} has {there / 1e9:,.1f}; give --limit{smaller}"
        )
