"""The distillation losses of eq. 2 and 3, in float32, and how they are balanced (paper §3.3.1, appendix D).

With normalised targets the spatial loss is a squared error in the standardised space, which the adaptor's
spatial head then predicts; see `normalise.py`.

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
from radio.model import RadioModel
from radio.nn.phi_s import FeatureNormaliser
from radio.ops import angle, resize_features
from radio.types import Features

from .config import BalanceConfig, LossConfig, TeacherConfig, TrainConfig
from .data.loader import GroupBatch
from .groups import teacher_groups
from .mesa import AveragedStudent, mesa_losses
from .normalise import Dispersion, TargetStatistics
from .shift import overlap

# Letters: B images, C width of the student's summary, T tokens, D width of a token, h w pixels.

Encode = Callable[[Tensor, Tensor | None, int | None], Features]
Balanced: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""The loss [], and the mean weight [] of each term over the images, such as `clip/summary_weight`."""

KINDS: tuple[Literal["summary", "spatial"], ...] = ("summary", "spatial")
_LEAST = 1e-8  # lower bound of a running mean that a loss is divided by


class TeacherLosses(NamedTuple):
    """One teacher's losses for every image, unweighted."""

    summary: Tensor  # [B] eq. 2; the cosine distance is in [0, 2]
    spatial: Tensor  # [B] eq. 3, mean over the tokens


class Losses(NamedTuple):
    """The losses of one forward; they stay on the device until the log step."""

    total: Tensor  # []
    parts: dict[str, Tensor]  # [] each: "clip/summary", "clip/spatial", "mesa" unweighted; balancer's weights
    details: dict[str, Tensor]  # "clip/centred_cosine", "clip/unexplained": [] each, if requested


class DistillationLoss(nn.Module):
    """The student with this rank's adaptors, and the losses against their teachers.

    Args:
        model: student and adaptors.
        teachers: the teachers with their loss weights.
        loss: the distance of eq. 2; alpha, beta and smooth L1's threshold of eq. 3.
        balancer: weighs the losses against one another; None = the declared weights only.
        statistics: what the losses know about the teachers' features; None = nothing, as by default.
        mesa: weight of the distance from the averaged student's tokens.
    """

    def __init__(
        self,
        model: RadioModel,
        teachers: Sequence[TeacherConfig],
        loss: LossConfig,
        balancer: Balancer | None = None,
        statistics: TargetStatistics | None = None,
        mesa: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss, self.mesa = loss, mesa
        self.balancer: Balancer = Naive(teachers) if balancer is None else balancer
        self.statistics = TargetStatistics() if statistics is None else statistics

    def forward(
        self,
        encode: Encode,
        batch: GroupBatch,
        window: int | None,
        detail: bool,
        average: AveragedStudent | None = None,
    ) -> Losses:
        """Compute the weighted losses of a batch, the mean over its images.

        Args:
            encode: the student's forward, distributed with several ranks.
            batch: images of one group with its teachers' features.
            window: the attention window of this step; None keeps the student's own.
            detail: also compute centred cosines and unexplained variances, which are only logged.
            average: the averaged student, for MESA; None = without it.

        Raises:
            ConfigError: the tokens of a model with a shifted frame are no patches of its declared size.
        """
        # Before the student's forward, whose activations wait for the backward.
        seen = batch.images if batch.second is None else batch.second
        followed = None if average is None else average.encode(seen, window)
        features = encode(batch.images, batch.crops, window)
        parts: dict[str, Tensor] = {}
        details: dict[str, Tensor] = {}
        losses: dict[str, TeacherLosses] = {}
        for name, adaptor in zip(batch.group.teachers, batch.group.adaptors, strict=True):
            adapted, target = self._adapt(name, adaptor, features, batch)
            normaliser, dispersion = self.statistics.of(name, adaptor)
            losses[name] = teacher_losses(adapted, target, self.loss, normaliser, dispersion)
            parts[f"{name}/summary"] = losses[name].summary.detach().mean()
            parts[f"{name}/spatial"] = losses[name].spatial.detach().mean()
            if detail:
                tokens = adapted.tokens if normaliser is None else restore(adapted.tokens, normaliser)
                details[f"{name}/centred_cosine"] = centred_cosine(tokens, target.tokens)
                details[f"{name}/unexplained"] = unexplained(tokens, target.tokens)
        total, weights = self.balancer(features, losses)
        if followed is not None:
            distance = mesa_losses(features, followed, batch.frames).mean()
            parts["mesa"] = distance.detach()
            total = total + self.mesa * distance
        return Losses(total, {**parts, **weights}, details)

    def _adapt(
        self, name: str, adaptor: str, features: Features, batch: GroupBatch
    ) -> tuple[Features, Features]:
        """Map the student's features into a teacher's space; return both where both have tokens."""
        target = batch.targets[name]
        if batch.frames is None:
            return self.model.adapt(adaptor, features, target.grid), target
        student, teacher = batch.frames.student, batch.frames.teachers[name]
        for model, frame, found in (("the student", student, features), (f"teacher {name}", teacher, target)):
            if found.grid != frame.input.grid:
                raise ConfigError(
                    f"{model} has a grid of {found.grid[0]} x {found.grid[1]}, and {frame.input.size[0]} x "
                    f"{frame.input.size[1]} px are {frame.input.grid[0]} x {frame.input.grid[1]} of its "
                    f"patches; leave --loss.shift out"
                )
        own, other = overlap(student, teacher)
        return self.model.adapt(adaptor, features, own), resize_features(target, other)

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Update the balancer and running dispersions after a step.

        Args:
            total: the elementwise sum over the ranks with the same adaptors.
        """
        if isinstance(self.balancer, AdaLoss):
            self.balancer.update(total)
        if self.loss.summary == "angle" and self.loss.dispersion == "running":
            self.statistics.update(total)


def teacher_losses(
    student: Features,
    teacher: Features,
    config: LossConfig,
    normaliser: FeatureNormaliser | None = None,
    dispersion: Dispersion | None = None,
) -> TeacherLosses:
    """Compute both losses of adapted student features against one teacher's, on the teacher's grid.

    Args:
        student: with a normaliser its tokens are in the standardised space.
        teacher: in the teacher's own space.
        config: which distances.
        normaliser: standardises the teacher's tokens; None = eq. 3 of the tokens as they are.
        dispersion: of the teacher's summaries, for the angular distance.
    """
    summary = summary_losses(student.summary, teacher.summary, config)
    if dispersion is not None:
        summary = summary / dispersion()
        if config.dispersion == "running":
            dispersion.see(teacher.summary)
    if normaliser is None:
        return TeacherLosses(summary, spatial_losses(student.tokens, teacher.tokens, config))
    return TeacherLosses(summary, normalised_losses(student.tokens, teacher.tokens, normaliser))


def summary_losses(student: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """Compute eq. 2 for every image: [B, C] -> [B]; those by channel are means over C.

    The angular distance is the squared angle in radians.
    """
    a, b = student.float(), teacher.float()
    match config.summary:
        case "cosine":
            return cosine_distance(a, b)
        case "l1":
            return F.l1_loss(a, b, reduction="none").mean(1)
        case "mse":
            return F.mse_loss(a, b, reduction="none").mean(1)
        case "smooth-l1":
            return F.smooth_l1_loss(a, b, beta=config.smooth_l1_beta, reduction="none").mean(1)
        case "angle":
            return angle(a, b).square()


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute 1 - cos(a, b) along the last axis (eq. 2): [..., D] -> [...] in [0, 2]; 1 for zero vectors."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1)


def spatial_losses(student: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """Compute alpha * L_cos + beta * smooth L1 (eq. 3), mean over an image's tokens: [B, T, D] -> [B]."""
    cosine = cosine_distance(student, teacher).mean(1)
    smooth = F.smooth_l1_loss(student.float(), teacher.float(), beta=config.smooth_l1_beta, reduction="none")
    return config.cosine * cosine + config.smooth_l1 * smooth.mean((1, 2))


def normalised_losses(student: Tensor, teacher: Tensor, normaliser: FeatureNormaliser) -> Tensor:
    """Compute the squared error of an image's standardised tokens: [B, T, D] -> [B], mean over T and D.

    A prediction of zeros costs 1 on average, for every teacher, but for directions that hardly vary (`pca`,
    `zca`). With `phi-s` and `global` the loss is the share of the variance that is left unexplained.

    Args:
        student: in the standardised space.
        teacher: in the teacher's own space.
        normaliser: maps from this to that.
    """
    with torch.autocast(teacher.device.type, enabled=False), torch.no_grad():
        target = normaliser(teacher.float())
    return F.mse_loss(student.float(), target, reduction="none").mean((1, 2))


@torch.no_grad()
def restore(tokens: Tensor, normaliser: FeatureNormaliser) -> Tensor:
    """Map standardised tokens [..., D] back to the teacher's own space, in float32."""
    with torch.autocast(tokens.device.type, enabled=False):
        return normaliser.invert(tokens.float())


@torch.no_grad()
def unexplained(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the share of these tokens' variance that a prediction leaves unexplained: [B, T, D] -> [].

    Both are in the teacher's own space, whatever the loss. A perfect prediction leaves 0, the teacher's mean
    token 1; there is no upper bound.
    """
    student, teacher = student.float(), teacher.float()
    variance = (teacher - teacher.mean(dim=(0, 1))).square().mean()
    return (student - teacher).square().mean() / variance.clamp(min=1e-24)


@torch.no_grad()
def centred_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean cosine of the tokens after subtracting the teacher's mean token: [], in [-1, 1].

    Patch tokens share a large constant part; this measures what is learned beyond it.
    """
    centre = teacher.float().mean(dim=(0, 1))
    return F.cosine_similarity(student.float() - centre, teacher.float() - centre, dim=-1).mean()


class _Term(NamedTuple):
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
        terms = _terms(self.teachers, losses)
        return torch.stack([term.declared * term.values.mean() for term in terms]).sum(), {}


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
        values, weights = [], {}
        for term in _terms(self.teachers, losses):
            slope, offset = self.slopes[term.teacher][term.kind], self.offsets[term.teacher][term.kind]
            b = _score(features, slope) + offset
            values.append(term.declared * (torch.exp(-b) * term.values + self.scale * F.softplus(b)).mean())
            weights[f"{term.name}_weight"] = term.declared * torch.exp(-b.detach()).mean()
        return torch.stack(values).sum(), weights


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
        values, weights = [], {}
        for term in _terms(self.teachers, losses):
            average: Tensor = self.means[term.teacher]()[term.kind]
            weight = term.declared / average.clamp(min=_LEAST)
            values.append(weight * term.values.mean())
            weights[f"{term.name}_weight"] = weight
        for name, pair in losses.items():
            means = torch.stack([loss.detach().mean() for loss in pair])
            self._seen.setdefault(name, []).append(means)
        return torch.stack(values).sum(), weights

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add a step's losses to the averages, without a host sync.

        Args:
            total: the elementwise sum over the ranks with the same adaptors.
        """
        if not self._seen:
            return
        absent = torch.zeros_like(next(iter(self._seen.values()))[0])
        seen = [torch.stack(self._seen.get(name, [absent])).mean(0) for name in self.means]
        counts = torch.stack([absent.new_full((1,), float(name in self._seen)) for name in self.means])
        sums = total(torch.cat((torch.stack(seen), counts), dim=1))
        for average, pair, count in zip(self.means.values(), sums[:, :-1], sums[:, -1], strict=True):
            assert isinstance(average, RunningMean)
            average.add(pair / count)
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
        terms = _terms(self.teachers, losses)
        values, weights = [], {}
        for kind in range(len(KINDS)):
            weighted = [term for term in terms if term.kind == kind and term.declared]
            if not weighted:
                continue
            scores = [_score(features, self.factors[term.teacher][kind]) for term in weighted]
            shares = torch.softmax(torch.stack(scores), dim=0)  # [teachers, B]
            for term, share in zip(weighted, shares, strict=True):
                values.append(term.declared * (share * term.values).mean())
                weights[f"{term.name}_weight"] = term.declared * share.detach().mean()
        # Terms without a weight stay in the graph, times zero, so that their heads get zero gradients.
        values += [0.0 * term.values.mean() for term in terms if not term.declared]
        return torch.stack(values).sum(), weights


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


def _terms(teachers: Sequence[TeacherConfig], losses: Mapping[str, TeacherLosses]) -> list[_Term]:
    """Collect the summary and the spatial term of every teacher with losses, in the teachers' order."""
    return [
        _Term(f"{teacher.name}/{kind}", teacher.name, index, declared, values)
        for teacher in teachers
        if teacher.name in losses
        for index, (kind, declared, values) in enumerate(
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
