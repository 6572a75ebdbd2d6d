"""What learns in a run on one rank: student, adaptors and balancer, one step after another."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from evals.core.dist import Group
from radio.model import RadioModel
from radio.students.vit import ViT

from .balancing import make_balancer
from .batches import Batch
from .config import TrainConfig
from .ema import Average
from .optim import learning_rate, make_optimizer, moments
from .pace import Pace
from .parallel import Engine, blocks_of, find_peers, gather_weights, is_half
from .partition import Partition, TeacherGroup
from .sampling import draw_window, generator
from .step import Distiller, Losses, Part, in_parts


class Learned(NamedTuple):
    """What the gradients of one step came from, on the device."""

    total: Tensor  # [] scaled so that the mean over ranks is the step's loss
    norm: Tensor  # [] of the whole gradient, the same on every rank
    losses: list[Losses]


class _Done(NamedTuple):
    """What one forward and its backward gave."""

    losses: Losses
    loss: Tensor  # [] as it counts in the step's


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
        self.abreast = may_go_abreast(model, config, partition, group, device)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="abreast")

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
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        detail = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        parts = [
            part
            for lesson in batch.lessons
            for part in in_parts(lesson, self._drawn(lesson.group, step), config.accumulate)
        ]
        done = self._abreast(parts, step, detail) if self.abreast else self._in_turn(parts, step, detail)
        total = torch.zeros((), device=self.device)
        for each in done:
            total += each.loss
        with self.pace.watch.time("communication"):
            norm = self.engine.settle(total)
        return Learned(total, norm, [each.losses for each in done])

    def _in_turn(self, parts: Sequence[Part], step: int, detail: bool) -> list[_Done]:
        """One part after another, each leaving its gradients in the weights."""
        done = []
        for place, part in enumerate(parts, start=1):
            with self.engine.turn(last=place == len(parts)):
                losses, loss = self._forward(part, step, detail)
                with self.pace.watch.time("backward", part.lesson.group.name):
                    loss.backward()
            done.append(_Done(losses, loss.detach()))
        return done

    def _abreast(self, parts: Sequence[Part], step: int, detail: bool) -> list[_Done]:
        """Two parts at a time, in threads; the gradients are added up in the parts' order, as in turn."""
        weights = [weight for weight in self.distiller.parameters() if weight.requires_grad]

        def work(part: Part) -> tuple[_Done, tuple[Tensor | None, ...]]:
            losses, loss = self._forward(part, step, detail)
            with self.pace.watch.time("backward", part.lesson.group.name):
                return _Done(losses, loss.detach()), torch.autograd.grad(loss, weights, allow_unused=True)

        done = []
        for each, grads in self._threads.map(work, parts):
            found = [(w, grad) for w, grad in zip(weights, grads, strict=True) if grad is not None]
            torch.autograd.backward([w for w, _ in found], [grad for _, grad in found])
            done.append(each)
        return done

    def _forward(self, part: Part, step: int, detail: bool) -> tuple[Losses, Tensor]:
        """The losses of a part, and what it adds to the step's: [], with its graph."""
        group = part.lesson.group
        window = draw_window(self.windows[group.side], self.config.seed, step)
        with self.pace.watch.time("forward", group.name), self.autocast():
            losses = self.distiller(self.engine.encode, part, window, detail)
        return losses, losses.total * (self.engine.scale / self.config.accumulate)

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
        share = drawn[rows.start : rows.stop]
        if self.device.type == "cuda":  # from pinned memory the copy waits for nothing
            share = share.pin_memory()
        return share.to(self.device, non_blocking=True)


def may_go_abreast(
    model: RadioModel, config: TrainConfig, partition: Partition, group: Group, device: torch.device
) -> bool:
    """Whether groups of teachers can share the student at one time: on a CPU that has no teachers to run.

    Only beside our ViT, whose forward draws nothing at random and leaves nothing behind, as batch norms do.
    """
    idle = config.cache.folder is not None and device.type == "cpu" and torch.get_num_threads() > 1
    alone = group.world == 1 and len(partition.groups) > 1 and not config.compile
    return idle and alone and isinstance(model.student, ViT)


def _first_weights(model: RadioModel) -> list[nn.Parameter]:
    """The student's weights outside its blocks: the first that a picture meets get their gradients last."""
    student = model.student
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    inside = {id(weight) for block in blocks_of(student) for weight in block.parameters()}
    return [weight for weight in student.parameters() if id(weight) not in inside]
