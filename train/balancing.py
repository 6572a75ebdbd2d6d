"""Balancers: how the teachers' losses are weighted against one another (paper §3.3.1, appendix D).

A balancer takes the losses of teachers that see the same images and returns a weighted sum. What it learns
or measures is separate for each teacher, like an adaptor. The configured weights (lambda, gamma) multiply the
balancer's own, so 0 removes a term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio.errors import ConfigError
from radio.types import Features

from .config import BalanceConfig, TeacherConfig, TrainConfig
from .losses import TeacherLosses
from .partition import teacher_groups

# Letters: B images, C width of the student's summary, K terms: two per teacher.

KINDS: tuple[Literal["summary", "spatial"], ...] = ("summary", "spatial")
_LEAST = 1e-8  # lower bound of a running mean that a loss is divided by


class Balanced(NamedTuple):
    """The loss of one step."""

    total: Tensor  # []
    weights: dict[str, Tensor]  # "clip/summary_weight": [] each, mean over the images, declared ones included


class Term(NamedTuple):
    """One loss of one teacher."""

    name: str  # "clip/summary"
    teacher: str
    kind: int  # index into KINDS
    declared: float  # lambda or gamma
    values: Tensor  # [B]


class Naive(nn.Module):
    """Balancer that applies the declared weights only."""

    def __init__(self, teachers: Sequence[TeacherConfig]) -> None:
        super().__init__()
        self.teachers = tuple(teachers)

    def forward(self, features: Features, losses: Mapping[str, TeacherLosses]) -> Balanced:
        """Return the weighted sum of the mean losses, without weights to log: they never change."""
        terms = terms_of(self.teachers, losses)
        return Balanced(torch.stack([term.declared * term.values.mean() for term in terms]).sum(), {})


class Uncertainty(nn.Module):
    """Eq. 6: e^-b * loss + softplus(b) of every term, b a linear function of the student's summary.

    b is zero at the start, so every weight starts at 1.

    Args:
        teachers: the run's teachers.
        summary_dim: C, width of the student's summary.
        scale: factor of softplus(b).
    """

    def __init__(self, teachers: Sequence[TeacherConfig], summary_dim: int, scale: float) -> None:
        super().__init__()
        self.teachers, self.scale = tuple(teachers), scale
        self.slopes = _zeros(teachers, (len(KINDS), summary_dim))
        self.offsets = _zeros(teachers, (len(KINDS),))

    def forward(self, features: Features, losses: Mapping[str, TeacherLosses]) -> Balanced:
        """Return the mean over the images of eq. 6, with a separate b for each image."""
        found, weights = [], {}
        for term in terms_of(self.teachers, losses):
            slope, offset = self.slopes[term.teacher][term.kind], self.offsets[term.teacher][term.kind]
            b = _score(features, slope) + offset
            found.append(term.declared * (torch.exp(-b) * term.values + self.scale * F.softplus(b)).mean())
            weights[f"{term.name}_weight"] = term.declared * torch.exp(-b.detach()).mean()
        return Balanced(torch.stack(found).sum(), weights)


class AdaLoss(nn.Module):
    """Eq. 7: every loss divided by its exponential moving average over the previous steps.

    The average is bias-corrected, as Adam's are; before the first step the weight is 1. The current step
    is excluded, so that its gradient does not depend on how its images are split over ranks and passes;
    `update` adds it afterwards.
    """

    def __init__(self, teachers: Sequence[TeacherConfig], momentum: float) -> None:
        super().__init__()
        self.teachers = tuple(teachers)
        self.means = nn.ModuleDict({teacher.name: RunningMean(len(KINDS), momentum) for teacher in teachers})
        self._seen: dict[str, list[Tensor]] = {}

    def forward(self, features: Features, losses: Mapping[str, TeacherLosses]) -> Balanced:
        """Return the sum of the mean losses divided by their averages; store the losses for `update`."""
        found, weights = [], {}
        for term in terms_of(self.teachers, losses):
            average: Tensor = self.means[term.teacher]()[term.kind]
            weight = term.declared / average.clamp(min=_LEAST)
            found.append(weight * term.values.mean())
            weights[f"{term.name}_weight"] = weight
        for name, pair in losses.items():
            means = torch.stack([values.detach().mean() for values in pair])
            self._seen.setdefault(name, []).append(means)
        return Balanced(torch.stack(found).sum(), weights)

    def update(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Add a step's losses to the averages, without a host sync.

        Args:
            mean: the elementwise mean over the ranks that shared the step's images.
        """
        if not self._seen:
            return
        losses = mean(torch.stack([torch.stack(passes).mean(0) for passes in self._seen.values()]))
        for name, pair in zip(self._seen, losses, strict=True):
            average = self.means[name]
            assert isinstance(average, RunningMean)
            average.add(pair)
        self._seen = {}


class RunningMean(nn.Module):
    """Bias-corrected exponential moving averages of `size` numbers."""

    total: Tensor
    share: Tensor  # sum of the weights in the total, in [0, 1]

    def __init__(self, size: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("total", torch.zeros(size))
        self.register_buffer("share", torch.zeros(()))

    def forward(self) -> Tensor:
        """Return the averages [size]; ones before anything was added."""
        return torch.where(self.share > 0, self.total / self.share, torch.ones_like(self.total))

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Add values [size], unless one of them is not finite."""
        finite = torch.isfinite(values).all()
        for held, new in ((self.total, values), (self.share, torch.ones_like(self.share))):
            held.copy_(torch.where(finite, self.momentum * held + (1 - self.momentum) * new, held))


class Amtml(nn.Module):
    """AMTML-KD: for each image, a softmax over the teachers gives the weight of each one's loss.

    A teacher's score is the inner product of the student's summary with a learned factor of the teacher, one
    for summaries and one for tokens (the vector that Liu et al. 2020 multiply both with is part of it).
    Factors are zero at the start, so the weights start equal. In the paper they collapsed onto CLIP.
    """

    def __init__(self, teachers: Sequence[TeacherConfig], summary_dim: int) -> None:
        super().__init__()
        self.teachers = tuple(teachers)
        self.factors = _zeros(teachers, (len(KINDS), summary_dim))

    def forward(self, features: Features, losses: Mapping[str, TeacherLosses]) -> Balanced:
        """Return the mean over the images of both losses, each weighted over the teachers."""
        terms = terms_of(self.teachers, losses)
        found, weights = [], {}
        for kind in range(len(KINDS)):
            worth = [term for term in terms if term.kind == kind and term.declared]
            if not worth:
                continue
            scores = [_score(features, self.factors[term.teacher][kind]) for term in worth]
            shares = torch.softmax(torch.stack(scores), dim=0)  # [teachers, B]
            for term, share in zip(worth, shares, strict=True):
                found.append(term.declared * (share * term.values).mean())
                weights[f"{term.name}_weight"] = term.declared * share.detach().mean()
        # Terms without a weight stay in the graph, times zero, so that their heads get zero gradients.
        found += [0.0 * term.values.mean() for term in terms if not term.declared]
        return Balanced(torch.stack(found).sum(), weights)


Balancer: TypeAlias = Naive | Uncertainty | AdaLoss | Amtml


def make_balancer(balance: BalanceConfig, teachers: Sequence[TeacherConfig], summary_dim: int) -> Balancer:
    """Build the configured balancer for these teachers and a student with summaries of this width."""
    match balance.kind:
        case "naive":
            return Naive(teachers)
        case "uncertainty":
            return Uncertainty(teachers, summary_dim, balance.regularizer_scale)
        case "adaloss":
            return AdaLoss(teachers, balance.momentum)
        case "amtml":
            return Amtml(teachers, summary_dim)


def check_balance(config: TrainConfig) -> None:
    """Check that the settings of the run's balancer are valid.

    Raises:
        ConfigError: a value is out of range, a setting belongs to another balancer, or AMTML-KD cannot weigh
            the teachers against one another.
    """
    balance = config.balance
    if not 0 <= balance.momentum < 1:
        raise ConfigError(f"--balance.momentum {balance.momentum} cannot be; give 0 or more, and less than 1")
    if balance.regularizer_scale <= 0:
        raise ConfigError(
            f"--balance.regularizer-scale {balance.regularizer_scale} cannot be; give more than 0, "
            f"or the weights sink to nothing"
        )
    owners = {"regularizer_scale": "uncertainty", "momentum": "adaloss"}
    for name, owner in owners.items():
        if balance.kind != owner and getattr(balance, name) != getattr(BalanceConfig(), name):
            option = f"--balance.{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} is for --balance.kind {owner}, and this run has {balance.kind}; leave it out"
            )
    if balance.kind == "amtml":
        _check_amtml(config)


def _check_amtml(config: TrainConfig) -> None:
    if len(config.teachers) < 2:
        raise ConfigError("--balance.kind amtml weighs teachers against one another; give two or more")
    groups = teacher_groups(config)
    if len(groups) > 1:
        names = " and ".join(group.name for group in groups)
        raise ConfigError(
            f"--balance.kind amtml weighs the teachers of one image against one another, and {names} "
            f"see other images or sizes; give all teachers one batch size and student resolution, "
            f"or choose another kind"
        )


def terms_of(teachers: Sequence[TeacherConfig], losses: Mapping[str, TeacherLosses]) -> list[Term]:
    """Collect the summary and the spatial term of every teacher with losses, in the teachers' order."""
    return [
        Term(f"{teacher.name}/{kind}", teacher.name, place, declared, values)
        for teacher in teachers
        if teacher.name in losses
        for place, (kind, declared, values) in enumerate(
            zip(KINDS, (teacher.summary_weight, teacher.spatial_weight), losses[teacher.name], strict=True)
        )
    ]


def _zeros(teachers: Sequence[TeacherConfig], shape: tuple[int, ...]) -> nn.ParameterDict:
    return nn.ParameterDict({teacher.name: nn.Parameter(torch.zeros(shape)) for teacher in teachers})


def _score(features: Features, factor: Tensor) -> Tensor:
    """Compute inner products [B] with a factor [C], over sqrt(C), in the factor's dtype despite autocast.

    Without the root, the change of a score by one AdamW step would grow with the width.
    """
    summaries = features.summary.to(factor.dtype)
    score: Tensor = (summaries * factor).sum(-1) / summaries.shape[-1] ** 0.5
    return score
