"""The trainable part of a run on one rank: student, adaptors, balancer and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from radio.dist import Group
from radio.model import RadioModel
from radio.students.vit import ViT

from .balancing import make_balancer
from .batches import Batch
from .config import TrainConfig
from .ema import Average
from .monitor import PerformanceMonitor
from .optim import learning_rate, make_optimizer, moments
from .parallel import DistributedStudent, blocks_of, find_peers, gather_weights, is_half
from .partition import Partition, TeacherGroup
from .sampling import draw_window, generator
from .step import DistillationLoss, Losses, Part, in_parts


class Learned(NamedTuple):
    """The losses and the gradient norm of one step, on the device."""

    total: Tensor  # [] scaled so that the mean over ranks is the step's loss
    norm: Tensor  # [] of the whole gradient, the same on every rank
    losses: list[Losses]


class _Done(NamedTuple):
    """Result of one forward and backward."""

    losses: Losses
    loss: Tensor  # [] its contribution to the step's loss


@final
class Learner:
    """Student, adaptors, optimiser and moving average of the weights. Every rank calls every method.

    Args:
        model: the student and the adaptors that live on this rank, on the device.
        windows: the attention windows to sample from at each resolution.
        config: the run's settings.
        partition: the groups of teachers and their ranks.
        group: all ranks.
        device: this rank's device.
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
        self.distiller = DistillationLoss(model, here, config.loss, balancer.to(device))
        self.peers = find_peers(partition, group.rank)
        self.engine = DistributedStudent(self.distiller, group, self.peers, device, config)
        self.optimizer = make_optimizer(self.distiller, config.optim)
        self.average = Average(model, config.ema) if config.ema else None
        self.pace = PerformanceMonitor(config, partition, group, device, _first_weights(model))
        self.parallel_groups = can_run_in_parallel(model, config, partition, group, device)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="abreast")

    def advance(self, batch: Batch, step: int) -> tuple[Learned, Tensor]:
        """Do one step; return its losses and whether it was applied ([] bool). No host sync."""
        config = self.config
        learned = self.learn(batch, step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(step, config.steps, config.optim)
        with self.pace.watch.time("optimiser"):
            fine = self.optimizer.guard(learned.norm, config.optim.clip)
            self.optimizer.step()
        with self.pace.watch.time("communication"):
            self.distiller.update(self.engine.peer_mean)
        if self.average is not None:
            self.average.update(fine)
        return learned, fine

    def learn(self, batch: Batch, step: int) -> Learned:
        """Compute the gradients of a step into this rank's weights."""
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        detail = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        parts = [
            part
            for lesson in batch.lessons
            for part in in_parts(lesson, self._sample_crops(lesson.group, step), config.grad_accum_steps)
        ]
        done = (
            self._in_parallel(parts, step, detail)
            if self.parallel_groups
            else self._in_turn(parts, step, detail)
        )
        total = torch.zeros((), device=self.device)
        for each in done:
            total += each.loss
        with self.pace.watch.time("communication"):
            norm = self.engine.reduce_gradients(total)
        return Learned(total, norm, [each.losses for each in done])

    def _in_turn(self, parts: Sequence[Part], step: int, detail: bool) -> list[_Done]:
        """Run the parts one after another; the gradients accumulate in the weights."""
        done = []
        for place, part in enumerate(parts, start=1):
            with self.engine.turn(last=place == len(parts)):
                losses, loss = self._forward(part, step, detail)
                with self.pace.watch.time("backward", part.lesson.group.name):
                    loss.backward()
            done.append(_Done(losses, loss.detach()))
        return done

    def _in_parallel(self, parts: Sequence[Part], step: int, detail: bool) -> list[_Done]:
        """Run two parts at a time, in threads; gradients are added in the parts' order, as in `_in_turn`."""
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
        """Compute the losses of a part and its contribution to the step's loss: [], with its graph."""
        group = part.lesson.group
        window = draw_window(self.windows[group.side], self.config.seed, step)
        with self.pace.watch.time("forward", group.name), self.autocast():
            losses = self.distiller(self.engine.encode, part, window, detail)
        return losses, losses.total * (self.engine.scale / self.config.grad_accum_steps)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context: bfloat16 where the settings or the device require it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_half(self.config, self.device))

    def tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of this rank that a state needs, whole or sharded."""
        averages = {} if self.average is None else self.average.tensors
        return {
            **{f"weights.{name}": tensor for name, tensor in self.distiller.state_dict().items()},
            **{f"optimizer.{name}": t for name, t in moments(self.optimizer, self.distiller).items()},
            **{f"average.{name}": tensor for name, tensor in averages.items()},
        }

    def checkpoints(self) -> dict[str, dict[str, Tensor]]:
        """Gather the model's weights by file name on the first rank's CPU; empty on other ranks."""
        weights = self.model.state_dict()
        files = {"ckpt.pt": gather_weights(weights, self.group, self.peers)}
        if self.average is not None:
            averaged = {**weights, **self.average.tensors}
            files["ckpt-ema.pt"] = gather_weights(averaged, self.group, self.peers)
        return files

    def _sample_crops(self, group: TeacherGroup, step: int) -> Tensor | None:
        """Sample position crops for the whole step; return those of this rank's images."""
        crops = self.model.sample_crops(
            self.partition.batch_size, generator(self.config.seed, "positions", step)
        )
        if crops is None:
            return None
        rows = self.partition.rows(group, self.group.rank)
        share = crops[rows.start : rows.stop]
        if self.device.type == "cuda":  # a copy from pinned memory is asynchronous
            share = share.pin_memory()
        return share.to(self.device, non_blocking=True)


def can_run_in_parallel(
    model: RadioModel, config: TrainConfig, partition: Partition, group: Group, device: torch.device
) -> bool:
    """Check whether groups can use the student in parallel: on a CPU, with a teacher cache.

    Only with our ViT, whose forward is deterministic and stateless, unlike one with batch norms.
    """
    idle = config.cache.folder is not None and device.type == "cpu" and torch.get_num_threads() > 1
    alone = group.world == 1 and len(partition.groups) > 1 and not config.compile
    return idle and alone and isinstance(model.student, ViT)


def _first_weights(model: RadioModel) -> list[nn.Parameter]:
    """Return the student's weights outside its blocks; those that images meet first get gradients last."""
    student = model.student
    assert isinstance(student, nn.Module)  # as RadioModel makes sure
    inside = {id(weight) for block in blocks_of(student) for weight in block.parameters()}
    return [weight for weight in student.parameters() if id(weight) not in inside]
