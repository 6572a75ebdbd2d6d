"""What the losses know about the teachers: how to normalise their tokens, how their summaries disperse.

Both put the losses of all teachers on one scale, on which a constant prediction costs 1 (by `pca` and
`zca` less, by the directions that hardly vary). They are measured on
the images of the first steps, before the first of them: PHI-S measures while it trains, with a frozen trunk
until the targets settle; here they never move. The student then predicts normalised tokens, and `ckpt.pt` has
the inverse folded into the last layer of every spatial head, so that it speaks the teachers' own spaces.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, cast, final

import torch
from torch import Tensor, nn

from radio.errors import ConfigError, RadioError
from radio.model import Head
from radio.nn.phi_s import FeatureNormaliser, FeatureStatistics, Normalisation, has_hadamard
from radio.ops import angle

from .config import LossConfig, NormaliseConfig, TrainConfig
from .data.loader import Batch

if TYPE_CHECKING:
    from .distributed import DistributedStudent

# Letters: B images, N images of all steps, C summary width, D token width.

_SUMMARIES = 1 << 14  # images, over all ranks, whose summaries a fixed dispersion is measured on (ours)
_FEW = 10  # vectors for each direction that is whitened: with fewer the run says so (ours)
_LEAST = 1e-8  # dispersion that a loss is divided by at least


@final
class Dispersion(nn.Module):
    """E[angle(y, mu)^2] of a teacher's summaries y, with the direction mu of their mean (C-RADIOv4, eq. 3-7).

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(width, dtype=torch.float64))  # sum over the additions
        self.square = nn.Buffer(torch.zeros((), dtype=torch.float64))  # sum over the additions
        self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))  # additions
        self._seen: list[Tensor] = []

    def forward(self) -> Tensor:
        """Return the dispersion [] in squared radians; 1 before anything was added."""
        value = (self.square / self.count.clamp(min=1)).clamp(min=_LEAST)
        return torch.where(self.count > 0, value, 1.0).float()

    def see(self, summaries: Tensor) -> None:
        """Keep summaries [B, C] of this step for `update`."""
        self._seen.append(summaries.detach())

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the step's summaries on all ranks, without a host sync, unless one of them is not finite.

        Args:
            total: the elementwise sum over the ranks with the same adaptors.
        """
        summaries, self._seen = torch.cat([self.mean.new_zeros(0, len(self.mean)), *self._seen]), []
        self.add(summaries, total)

    @torch.no_grad()
    def add(self, summaries: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Add this rank's summaries [N, C]; N may be 0, but not on all ranks.

        A single first one gives a direction only: it has no angle to itself.
        """
        y = summaries.double()
        sums = total(torch.cat((y.sum(dim=0), y.new_full((1,), len(y)))))
        centre = self.mean + sums[:-1] / sums[-1]
        square = total(angle(y, centre).square().sum()) / sums[-1]
        finite = torch.isfinite(square)
        counted = finite & ((sums[-1] > 1) | self.mean.any())
        self.mean.copy_(torch.where(finite, centre, self.mean))
        self.square.add_(torch.where(counted, square, 0.0))
        self.count.add_(counted)


@final
class TargetStatistics(nn.Module):
    """The normalisers and dispersions of a rank's teachers, part of the run's state.

    Args:
        widths: C and D of each teacher, by name.
        adaptors: the names of those that have their own adaptor; only their tokens are measured.
        kind: how tokens are normalised; "none" = not.
        dispersion: of the summaries: measured before the first step or while training; None = not needed.
    """

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]] | None = None,
        adaptors: Collection[str] = (),
        kind: Normalisation | Literal["none"] = "none",
        dispersion: Literal["fixed", "running"] | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.dispersion = kind, dispersion
        self.normalisers, self.dispersions = nn.ModuleDict(), nn.ModuleDict()
        self._tokens: dict[str, FeatureStatistics] = {}
        self._summaries: dict[str, list[Tensor]] = {}
        self._num_images = dict.fromkeys(widths or {}, 0)  # over all ranks
        for name, (summary_dim, token_dim) in (widths or {}).items():
            if kind != "none" and name in adaptors:
                self.normalisers[name] = FeatureNormaliser(token_dim)
                self._tokens[name] = FeatureStatistics(token_dim)
            if dispersion is not None:
                self.dispersions[name] = Dispersion(summary_dim)
                self._summaries[name] = []

    def of(self, name: str, adaptor: str) -> tuple[FeatureNormaliser | None, Dispersion | None]:
        """Return the normaliser of a teacher's adaptor, and its dispersion; None where not needed."""
        normaliser = dict(self.normalisers.items()).get(adaptor)
        dispersion = dict(self.dispersions.items()).get(name)
        return cast("FeatureNormaliser | None", normaliser), cast("Dispersion | None", dispersion)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Measure a step's features on this rank."""
        for group_batch in batch.groups:
            for name, target in group_batch.targets.items():
                if name in self._tokens:
                    self._tokens[name].update(target.tokens)
                if self.dispersion == "fixed" and self._num_images[name] < _SUMMARIES:
                    self._summaries[name].append(target.summary.float().cpu())
                self._num_images[name] += group_batch.group.batch_size

    def fit(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> list[str]:
        """Compute normalisers and dispersions from what was measured; return a line about each teacher here.

        Args:
            sum_over_ranks: the elementwise sum over the ranks with the same adaptors, on the CPU.

        Raises:
            RadioError: a teacher's tokens or summaries are not finite, or all the same.
        """
        lines = []
        for name, images in self._num_images.items():
            normaliser, dispersion = self.of(name, name)
            line = f"{name}: {images} images"
            if normaliser is not None:
                tokens = self._tokens.pop(name)
                tokens.reduce(sum_over_ranks)
                deviation = float(tokens.covariance.diagonal().mean().sqrt())
                if not 0 < deviation < float("inf"):
                    raise RadioError(
                        f"teacher {name}: the deviation of its tokens is {deviation}, and they cannot be "
                        f"normalised; check its weights, or leave --normalise.kind out"
                    )
                normaliser.load_state_dict(
                    FeatureNormaliser.fit(tokens, cast("Normalisation", self.kind)).state_dict()
                )
                line += f", standard deviation of tokens {deviation:.4g}"
                width = len(tokens.mean)
                if self.kind in ("pca", "zca") and tokens.count < _FEW * width:
                    line += (
                        f", of only {tokens.count:.0f} tokens of {width} channels, which {self.kind} fits "
                        f"too closely: give a larger --normalise.steps"
                    )
                if self.kind == "phi-s" and not has_hadamard(width):
                    line += f", no Hadamard matrix of {width} is known: a random orthogonal one"
            if dispersion is not None and self.dispersion == "fixed":
                empty = torch.zeros(0, len(dispersion.mean))
                summaries = torch.cat([empty, *self._summaries.pop(name)]).to(dispersion.mean.device)
                dispersion.add(summaries, lambda t: sum_over_ranks(t.cpu()).to(t.device))
                square = float(dispersion())
                if images == 1:
                    raise RadioError(
                        f"teacher {name}: one image was measured, and the angles between summaries need "
                        f"several; give a larger --normalise.steps"
                    )
                if not dispersion.count or square <= _LEAST:
                    state = "all the same" if dispersion.count else "not finite"
                    raise RadioError(
                        f"teacher {name}: its summaries are {state}, and the angles between them give the "
                        f"loss no scale; check its weights, or leave --loss.summary angle out"
                    )
                line += f", summaries by {square**0.5:.3g} rad"
            if images:  # else it is another rank's
                lines.append(line)
        return lines

    def update(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add a step's summaries to the running dispersions; see `Dispersion.update`."""
        for dispersion in self.dispersions.values():
            assert isinstance(dispersion, Dispersion)
            dispersion.update(total)

    def fold(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a model's weights with heads that predict tokens in the teachers' own spaces."""
        folded = dict(weights)
        for name in self.normalisers:
            normaliser, _ = self.of(name, name)
            assert normaliser is not None
            weight, bias = (f"{last_layer(name)}.{part}" for part in ("weight", "bias"))
            folded[weight], folded[bias] = normaliser.fold(weights[weight], weights[bias])
        return folded

    @torch.no_grad()
    def unfold(self, weights: Mapping[str, Tensor], names: Collection[str]) -> list[str]:
        """Let heads that predict tokens in these teachers' own spaces predict normalised ones, in place.

        Returns the names of the matrices that were changed.
        """
        changed = []
        for name in names:
            normaliser, _ = self.of(name, name)
            if normaliser is not None:
                last = last_layer(name)
                weight, bias = weights[f"{last}.weight"], weights[f"{last}.bias"]
                tx, mean = normaliser.tx.double(), normaliser.mean.double()
                weight.copy_(tx @ weight.double())
                bias.copy_(tx @ (bias.double() - mean))
                changed.append(f"{last}.weight")
        return changed


def last_layer(adaptor: str) -> str:
    """Return the name in the model of the layer that the inverse is folded into."""
    return f"adaptors.{adaptor}.spatial.{Head.LAST}"


def make_statistics(config: TrainConfig, widths: Mapping[str, tuple[int, int]]) -> TargetStatistics:
    """Build what the configured losses need for teachers of these widths (C, D), by name."""
    dispersion = config.loss.dispersion if config.loss.summary == "angle" else None
    own = [t.name for t in config.teachers if t.adaptor is None]
    return TargetStatistics(widths, own, config.normalise.kind, dispersion)


def measure(
    statistics: TargetStatistics,
    batches: Iterable[Batch],
    student: DistributedStudent,
    device: torch.device,
    progress: Callable[[int], None],
) -> list[str]:
    """Measure the teachers of all ranks, each of which calls this; return a line about each teacher.

    Args:
        statistics: of this rank's teachers.
        batches: the images of the first steps with the teachers' features.
        student: tells which ranks have the same adaptors.
        device: where these ranks exchange tensors.
        progress: called with the number of steps done.

    Raises:
        RadioError: as `TargetStatistics.fit`, on every rank.
    """
    for step, batch in enumerate(batches, start=1):
        statistics.add(batch)
        progress(step)
    lines: list[str] = []
    problem: RadioError | None = None
    try:
        lines = statistics.fit(lambda tensor: student.peer_sum(tensor.to(device)).cpu())
    except RadioError as error:
        problem = error
    student.ranks.agree(problem)
    student.share_buffers(statistics)
    return list(dict.fromkeys(line for local in student.ranks.gather_objects(lines) for line in local))


def measures(config: TrainConfig) -> bool:
    """Check whether the teachers are measured before the first step."""
    angular = config.loss.summary == "angle" and config.loss.dispersion == "fixed"
    return config.normalise.kind != "none" or angular


def check_loss_weights(run: TrainConfig) -> None:
    """Check that the losses which the settings of a run choose have a weight in one of its stages.

    Raises:
        ConfigError: one has none; the message names its setting.
    """
    teachers = [*run.teachers, *(t for stage in run.stages for t in stage.teachers)]
    kind, summary = run.normalise.kind, run.loss.summary
    if teachers and kind != "none" and not any(t.spatial_weight for t in teachers):
        raise ConfigError(
            f"--normalise.kind {kind} is for the spatial losses, and every teacher's spatial-weight is 0; "
            f"leave it out, or give a teacher a weight"
        )
    if teachers and summary != LossConfig().summary and not any(t.summary_weight for t in teachers):
        raise ConfigError(
            f"--loss.summary {summary} is for the summaries' losses, and every teacher's summary-weight is "
            f"0; leave it out, or give a teacher a weight"
        )


def check_normalise(config: TrainConfig) -> None:
    """Check that no setting of the losses is without effect.

    Raises:
        ConfigError: one is; the message names it.
    """
    loss, plain = config.loss, LossConfig()
    kind = config.normalise.kind
    if kind != "none":
        names = ["cosine", "smooth_l1", *(["smooth_l1_beta"] if loss.summary != "smooth-l1" else [])]
        for name in names:
            if getattr(loss, name) != getattr(plain, name):
                raise ConfigError(
                    f"--loss.{name.replace('_', '-')} is for eq. 3, and with --normalise.kind {kind} the "
                    f"spatial loss is a squared error; leave one of both out"
                )
    unused = kind == "none" and not loss.smooth_l1 and loss.summary != "smooth-l1"
    if unused and loss.smooth_l1_beta != plain.smooth_l1_beta:
        raise ConfigError(
            "--loss.smooth-l1-beta is for smooth L1, and --loss.smooth-l1, its weight, is 0; leave one out"
        )
    if loss.summary != "angle" and loss.dispersion != plain.dispersion:
        raise ConfigError(
            f"--loss.dispersion is for --loss.summary angle, and this run has {loss.summary}; leave it out"
        )
    if not measures(config) and config.normalise.steps != NormaliseConfig().steps:
        raise ConfigError(
            "--normalise.steps measures teachers, and no loss of this run needs it; leave it out, or give "
            "--normalise.kind phi-s"
        )
