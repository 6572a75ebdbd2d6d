"""What learns in a run on one rank: student, adaptors and balancer, one step after another."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from evals.core.dist import Group
from radio.model import RadioModel

from .balancing import make_balancer
from .batches import Batch
from .config import TrainConfig
from .ema import Average
from .optim import learning_rate, make_optimizer, moments
from .pace import Pace
from .parallel import Engine, blocks_of, find_peers, gather_weights, is_half
from .partition import Partition, TeacherGroup
from .sampling import draw_window, generator
from .step import Distiller, Losses, in_parts


class Learned(NamedTuple):
    """What the gradients of one step came from, on the device."""

    total: Tensor  # [] scaled so that the mean over ranks is the step's loss
    norm: Tensor  # [] of the whole gradient, the same on every rank
    losses: list[Losses]


@final
class Learner:
    """Student, adaptors, optimiser, and their moving average. Every rank calls every method.

    Args:
        model: the student and the adaptors that live on this rank, on the device.
        windows: the attention windows to draw from at each resolution.
        config: the run's settings.
        partition: which rank does what.
        group: all ranks.
        device: where this one computes.
    """

    def __init__(
        self,
        model: RadioModel,
        windows: dict[int, tuple[int, ...]],
        config: TrainConfig,
        partition: Partition,
        group: Group,
        device: torch.device,
    ) -> None:
        self.model, self.windows, self.config = model, windows, config
        self.partition, self.group, self.device = partition, group, device
        here = [t for t in config.teachers if t.name in model.adaptors]
        balancer = make_balancer(config.balance, here, model.summary_dim)
        self.distiller = Distiller(model, here, config.loss, balancer.to(device))
        self.peers = find_peers(partition, group.rank)
        self.engine = Engine(self.distiller, group, self.peers, device, config)
        self.optimizer = make_optimizer(self.distiller, config.optim)
        self.average = Average(model, config.ema) if config.ema else None
        self.pace = Pace(config, partition, group, device, _first_weights(model))

    def advance(self, batch: Batch, step: int) -> tuple[Learned, Tensor]:
        """One step: what it learned, and whether it was done ([] bool). Nothing is read from the device."""
        config = self.config
        learned = self.learn(batch, step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(step, config.steps, config.optim)
        with self.pace.watch.time("optimiser"):
            fine = self.optimizer.guard(learned.norm, config.optim.clip)
            self.optimizer.step()
        with self.pace.watch.time("communication"):
            self.distiller.settle(self.engine.peer_mean)
        if self.average is not None:
            self.average.update(fine)
        return learned, fine

    def learn(self, batch: Batch, step: int) -> Learned:
        """Leave the gradients of the whole step in the weights of this rank."""
        config, time = self.config, self.pace.watch.time
        self.optimizer.zero_grad(set_to_none=True)
        detail = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        parts = [
            part
            for lesson in batch.lessons
            for part in in_parts(lesson, self._drawn(lesson.group, step), config.accumulate)
        ]
        found, total = [], torch.zeros((), device=self.device)
        for place, (lesson, drawn) in enumerate(parts, start=1):
            window = draw_window(self.windows[lesson.group.side], config.seed, step)
            with self.engine.turn(last=place == len(parts)):
                with time("forward", lesson.group.name), self.autocast():
                    losses = self.distiller(self.engine.encode, lesson, drawn, window, detail)
                loss = losses.total * (self.engine.scale / config.accumulate)
                with time("backward", lesson.group.name):
                    loss.backward()
            total += loss.detach()
            found.append(losses)
        with time("communication"):
            norm = self.engine.settle(total)
        return Learned(total, norm, found)

    def autocast(self) -> AbstractContextManager[Any]:
        """Forwards in bfloat16, where the settings or the device want them so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_half(self.config, self.device))

    def tensors(self) -> dict[str, Tensor]:
        """All that a state needs of what this rank has, or has a part of."""
        averages = {} if self.average is None else self.average.tensors
        return {
            **{f"weights.{name}": tensor for name, tensor in self.distiller.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in moments(self.optimizer, self.distiller).items()},
            **{f"average.{name}": tensor for name, tensor in averages.items()},
        }

    def checkpoints(self) -> dict[str, dict[str, Tensor]]:
        """The model's weights by file name, copied to the CPU of the first rank; elsewhere they are empty."""
        weights = self.model.state_dict()
        files = {"ckpt.pt": gather_weights(weights, self.group, self.peers)}
        if self.average is not None:
            averaged = {**weights, **self.average.tensors}
            files["ckpt-ema.pt"] = gather_weights(averaged, self.group, self.peers)
        return files

    def _drawn(self, group: TeacherGroup, step: int) -> Tensor | None:
        """This rank's share of what the student draws for all pictures of the step."""
        drawn = self.model.draw(self.partition.batch_size, generator(self.config.seed, "positions", step))
        if drawn is None:
            return None
        rows = self.partition.rows(group, self.group.rank)
        return drawn[rows.start : rows.stop].to(self.device)


def _first_weights(model: RadioModel) -> list[nn.Parameter]:
    """The student's weights outside its blocks: the first that a picture meets get their gradients last."""
    student = model.student
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    inside = {id(weight) for block in blocks_of(student) for weight in block.parameters()}
    return [weight for weight in student.parameters() if id(weight) not in inside]
