"""MESA: the student's tokens follow those of its averaged weights on another frame (C-RADIOv4, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from radio.errors import ConfigError
from radio.ops import resize_features
from radio.types import Features

from .config import MESA_START, TrainConfig
from .shift import Frames, overlap

# Letters: B images, T tokens, D width of a token, h w pixels.


@final
class AveragedStudent:
    """The student's forward with the moving averages of its weights, and without gradients.

    Args:
        student: the module that is called with images, position crops and window, such as `StudentPass`.
        averages: by the weights' names in that module, updated in place; names of no weight are passed over.
        buffers: called before each forward; returns those that the averaged student has instead, by name.
    """

    def __init__(
        self,
        student: nn.Module,
        averages: Mapping[str, Tensor],
        buffers: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self._student, self._buffers = student, buffers
        self._averages = {name: averages[name] for name, _ in student.named_parameters()}

    @torch.no_grad()
    def encode(self, images: Tensor, window: int | None) -> Features:
        """Compute features of [B, 3, h, w] RGB in [0, 1] by the whole position table, as in evaluation."""
        # Batch norms count what they see in their buffers, and this forward is not to be counted.
        own = self._buffers()
        buffers = {n: own[n] if n in own else buffer.clone() for n, buffer in self._student.named_buffers()}
        features: Features = functional_call(
            self._student, {**self._averages, **buffers}, (images, None, window)
        )
        return features


def mesa_losses(student: Features, average: Features, frames: Frames | None) -> Tensor:
    """Compute eq. 2 for every image: [B], the squared error of tokens after a LayerNorm without weights.

    Args:
        student: with gradients.
        average: of the averaged student.
        frames: of both; None = the same one.
    """
    if frames is not None:
        own, other = overlap(frames.student, frames.average)
        student, average = resize_features(student, own), resize_features(average, other)
    a, b = (F.layer_norm(each.tokens.float(), each.tokens.shape[-1:]) for each in (student, average))
    return F.mse_loss(a, b, reduction="none").mean((1, 2))


def first_mesa_step(config: TrainConfig) -> int:
    """Return the step (from 0) that the term starts with; a frozen trunk has no use for it."""
    return max(int(config.mesa_start * config.steps), config.freeze_trunk_steps)


def check_mesa(config: TrainConfig) -> None:
    """Check that the averaged student exists and can be called.

    Raises:
        ConfigError: there are no averages, or only shards of them; or a start is set for a term that is off.
    """
    if not config.mesa:
        if config.mesa_start != MESA_START:
            raise ConfigError("--mesa-start is for --mesa, and this run has none; leave it out")
        return
    if not config.ema:
        raise ConfigError(
            f"--mesa {config.mesa} compares the student with the average of its weights, and this run keeps "
            f"none; give --ema 0.9996, or leave --mesa out"
        )
    if config.parallel == "fsdp":
        raise ConfigError(
            "--mesa calls the averaged student on every rank, and with --parallel fsdp each has only a shard "
            "of it; take --parallel ddp, or leave --mesa out"
        )
