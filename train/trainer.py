"""The trainer: set up a run, resume it where it was stopped, and train to its last step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import torch
from annotated_types import MinLen
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor
from typing_extensions import TypedDict

from radio.checkpoint import load as load_checkpoint
from radio.config import defaults_of, to_plain, write_yaml
from radio.dist import Ranks
from radio.errors import CheckpointError, RadioError
from radio.io import check_writable
from radio.model import build
from radio.resources import memory_of
from radio.students import students
from radio.types import Features, Teacher

from .checkpoints import CheckpointManager, SavedState, make_metadata, provenance, resume_signature
from .config import TrainConfig, run_name
from .data.crops import draw_window, generator
from .data.errors import ERROR_LIST, LOG_KEYS
from .data.loader import Batch, GroupBatch, Loader, LoaderState, limit_threads, with_targets
from .data.streams import ConcatImages, open_images, open_sources
from .distributed import (
    DistributedStudent,
    PreemptedError,
    Preemption,
    StudentPass,
    can_run_in_parallel,
    check_started,
    find_peers,
    first_weights,
    is_half,
)
from .groups import TeacherGroup
from .loggers import Log, ProgressConsole, Record, open_log, say, summarise
from .losses import DistillationLoss, Losses, make_balancer
from .mesa import AveragedStudent, first_mesa_step
from .monitor import (
    MetricMeans,
    MetricMeansState,
    NonFiniteMonitor,
    NonFiniteState,
    PerformanceMonitor,
    first_bad,
)
from .normalise import last_layer, make_statistics, measure, measures
from .optim import Average, learning_rate, make_optimizer, moments, odd_count
from .reparametrise import Reparametrisation
from .setup import (
    check_memory,
    check_settings,
    choose_windows,
    gather_facts,
    load_teachers,
    make_framing,
    model_config,
    mosaic_shifts,
    teacher_features,
)
from .stages import Stage
from .teacher_cache import GroupedCaches, fill_caches
from .warm_start import read_fingerprint, warm_start

if TYPE_CHECKING:
    from .scoring import Follower

# Final weights are doubtful if this fraction of steps was skipped, or the loss rose by this factor.
_DOUBTFUL_FRACTION, _DOUBTFUL_RISE = 0.1, 3.0


class _RankNotes(TypedDict):
    meters: MetricMeansState
    guard: NonFiniteState


class _Notes(TypedDict):
    """What a training state holds besides tensors."""

    ranks: Annotated[list[_RankNotes], MinLen(1)]
    data: LoaderState
    first_loss: NotRequired[float | None]  # of the stage; None before the first finite one


_NOTES: TypeAdapter[Any] = TypeAdapter(_Notes)


class Trainer:
    """One distillation run.

    Args:
        config: its settings; those of the stage, if one is given.
        ranks: all ranks of the run.
        device: this rank's device.
        console: where to report.
        restart: start over instead of resuming from the run folder's state.
        teachers: this rank's teachers on the device, by name (default: loaded as configured).
        eval_workers: processes that evaluate side by side; see `run_contestants`.
        stage: which part of a run in stages this is (default: the first).
        stop: the stages' common wish to stop (default: one of its own).

    Raises:
        CheckpointError: what the stage before has left in the run folder is no start for this one.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        device: torch.device,
        console: Console,
        *,
        restart: bool = False,
        teachers: Mapping[str, Teacher] | None = None,
        eval_workers: int = 1,
        stage: Stage | None = None,
        stop: Preemption | None = None,
    ) -> None:
        self.stage = stage or Stage(config=config, run=config)
        self.end = self.stage.last_step
        self.config, self.ranks, self.device, self.console = config, ranks, device, console
        self.partition = check_settings(config, ranks.world)
        check_started(config)
        self.groups = self.partition.of(ranks.rank)

        # Teachers of this rank's groups, and what every rank has to know about all teachers.
        names = [name for group in self.groups for name in group.teachers]
        self.teachers = load_teachers(config, device, names) if teachers is None else dict(teachers)
        facts = gather_facts(config, self.teachers, ranks)
        self.sizes = {name: fact.sizes for name, fact in facts.items()}

        # Data: streams, or images by number for a teacher cache.
        self.cache: GroupedCaches | None = None
        self.data = (
            open_sources(config.data) if config.cache.folder is None else open_images(config.data, self._say)
        )
        self.framing = make_framing(config, facts)
        self.sides = self.partition.crop_sides(self.sizes)
        if self.framing is not None:
            self.sides = tuple(map(self.framing.crop_sides, self.partition.groups))
        # With a teacher cache, the loader only counts errors.
        self.loader = Loader(
            config, self.partition, ranks, self.data, self.sides, device, self._say, self.framing
        )

        # The student with the adaptors of this rank's teachers.
        described = model_config(config, facts)
        check_memory(config, described, self.partition, ranks.rank, memory_of(device))
        metadata = {**make_metadata(config, facts, self.data), "settings": to_plain(self.stage.run)}
        self.model = build(described, config.seed, metadata, run_name(config))
        init: str | None = None
        self._taken: tuple[str, ...] = ()  # adaptors that speak their teachers' own spaces from the start
        if config.init is not None:
            init, self._taken = warm_start(self.model, config.init, self._say)
        elif self.stage.run.init is not None:  # which the first stage was started from
            init = read_fingerprint(self.model, self.stage.run.init)
        if init is not None:
            self.model.metadata["init"] = {"model": self.stage.run.init, "fingerprint": init}
        averages = self._take_over() if self.stage.index else {}
        held = {name for group in self.partition.peers(ranks.rank) for name in group.adaptors}
        for name in set(self.model.adaptors) - held:
            delattr(self.model.get_submodule("adaptors"), name)
        self.model.to(device).train()
        self.windows = choose_windows(self.model.student, config)
        # Small teachers' heads are small until `_measure` lets them predict normalised tokens.
        folded = self._taken if config.normalise.kind != "none" else ()
        self.reparametrisation = Reparametrisation(self.model, config, [last_layer(name) for name in folded])

        # Losses, gradients over the ranks, optimizer.
        local = [teacher for teacher in config.teachers if teacher.adaptor_name in held]
        balancer = make_balancer(config.balance, local, self.model.summary_dim).to(device)
        widths = {t.name: (facts[t.name].summary_dim, facts[t.name].token_dim) for t in local}
        statistics = make_statistics(config, widths).to(device)
        self.loss = DistillationLoss(self.model, local, config.loss, balancer, statistics, config.mesa)
        self.student = DistributedStudent(
            self.loss, ranks, find_peers(self.partition, ranks.rank), device, config
        )
        self.optimizer = make_optimizer(self.loss, config.optim)
        self.average = Average(self.model, config.ema) if config.ema else None
        if self.average is not None and averages:
            self.average.start_from(self.reparametrisation.unfold(averages))
        self.averaged: AveragedStudent | None = None
        if config.mesa and self.average is not None:
            buffers = partial(self.reparametrisation.buffers_for, self.average.tensors)
            self.averaged = AveragedStudent(StudentPass(self.model.student), self.average.tensors, buffers)
        self.parallel_groups = can_run_in_parallel(self.model, config, self.partition, ranks, device)
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="group")
        self._two_operators = device.type == "cpu" and (self.prefetches or self.parallel_groups)

        # Measurements, the log, evaluations, and a stop by a signal.
        self.meters, self.nonfinite = MetricMeans(), NonFiniteMonitor(device)
        self.performance = PerformanceMonitor(
            config, self.partition, ranks, device, first_weights(self.model)
        )
        self.first: Tensor | None = None  # [] the first finite loss; its mean over ranks is the step's
        self.last = 0.0  # loss of the last record
        self.log: Log | None = None
        self.follower: Follower | None = None
        if config.eval_every:
            from .scoring import Follower  # the evaluators are many modules

            self.follower = Follower(config, ranks, console, eval_workers)
        self.stop, self.stopped = stop or Preemption(ranks), False

        # The state to resume from; then the teacher cache, unless no step is left.
        self.states = CheckpointManager(
            config.out / "state",
            ranks,
            resume_signature(config, facts, self.data, init=init, before=self.stage.before),
            defaults=defaults_of(config),
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            log=self._say,
            schema=_NOTES,
            after=self.stage.first_step,
        )
        self.step = 0 if restart else self.resume()
        if isinstance(self.data, ConcatImages) and self.step < self.end:
            with self.stop.paused():  # what is written of a cache stays
                self.cache = fill_caches(
                    config, self.partition, ranks, self.data, self.teachers, self.sizes, device, console
                )

    def train(self) -> Path:
        """Train to the last step, or until a signal stops it (`stopped`); return the path of `ckpt.pt`.

        Raises:
            RadioError: too many steps are not finite, too many images broken, or the last save failed.
        """
        config = self.config
        if self.step == self.end:
            self._publish_again()
            return config.out / "ckpt.pt"
        if not self.step:  # the states of an earlier run must not outlive its log
            self.states.clear()
        if not self.steps_done and measures(config):
            try:
                self._measure()
            except PreemptedError:  # before anything is saved: measured anew when the run goes on
                self.stopped = True
                return config.out / "ckpt.pt"
        self.ranks.on_leader(self._open_log)
        try:
            with self.stop, limit_threads() if self._two_operators else nullcontext():
                self._loop()
            self.states.wait(last=True)
            if not self.stopped and (doubt := self._doubt()):
                self._say(doubt)
            if uneven := self.performance.in_words():
                self._say(uneven)
            if broken := self.loader.errors.describe():
                self._say(f"passed over: {broken}; {config.out / ERROR_LIST} names them")
        finally:
            if self.log is not None:
                self.log.close()
            self.states.wait()
        return config.out / "ckpt.pt"

    def _loop(self) -> None:
        config = self.config
        if self.step and self._evaluates():  # the run was stopped before this evaluation
            self.evaluate()
        self.performance.start()
        with ProgressConsole(self.console, config.recipe, self.end, self.step) as bar:
            for batch in self.batches():
                self.train_step(batch)
                self.step += 1
                figures = ""
                if self._is_due(config.log_every):
                    record = self.record()
                    figures = summarise(record, config)
                    if self.log is not None:
                        self.log.write(record)
                bar.advance(self.step, figures)
                self.stopped = self.stop.agreed() and (self.step < self.end or not self.stage.is_last)
                if self.stopped or self._is_due(config.save_every) or self._evaluates():
                    self.save()
                if self.stopped:
                    return
                if self._evaluates():
                    self.evaluate()

    def _measure(self) -> None:
        """Measure the teachers' features on the images of the first steps, for the losses."""
        config = self.config
        steps = replace(config, steps=min(config.normalise.steps, config.steps))
        if self.cache is not None:
            batches = self.cache.batches(steps, 0, self.device)
        else:
            rows = self.loader.rows(range(steps.steps), pin=self.device.type == "cuda")
            read = with_targets(rows, self.groups, self.device, self._teach, config.seed, 0, self.framing)
            batches = (batch for batch, _ in read)
        watched = self.stop.watch(batches)
        with ProgressConsole(self.console, "teachers' features", steps.steps, 0) as bar:
            lines = measure(self.loss.statistics, watched, self.student, self.device, bar.advance)
        taken = [name for name in self._taken if name in self.model.adaptors]
        for weights in (self.average.tensors if self.average else {}, dict(self.model.named_parameters())):
            if weights:
                plain = self.reparametrisation.at_start(weights)
                changed = self.loss.statistics.unfold(plain, taken)
                self.reparametrisation.write({name: plain[name] for name in changed}, weights)
        for line in lines:
            self._say(line)

    @property
    def steps_done(self) -> int:
        """Number of steps done of this stage, which schedule, data and random values follow."""
        return self.step - self.stage.first_step

    @property
    def samples(self) -> int:
        """Number of images seen in the whole run."""
        return self.stage.first_sample + self.steps_done * self.partition.batch_size

    @property
    def prefetches(self) -> bool:
        """Whether the teachers work on the next batch during a step."""
        return self.config.prefetch_teachers and self.config.cache.folder is None

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the remaining steps, with the teachers' features."""
        if self.cache is not None:
            return self.cache.batches(self.config, self.steps_done, self.device)
        return self.loader.batches(self.steps_done, self.run_teachers, ahead=self.prefetches)

    def run_teachers(self, step: int, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
        """Compute the features of a group's images in a step by its teachers."""
        with self.performance.watch.time("teachers", group.name):
            return self._teach(step, group, images)

    def _teach(self, step: int, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
        teachers = {name: self.teachers[name] for name in group.teachers}
        side = group.side_at(self.config.seed, step)
        sizes = {name: self.sizes[name][side] for name in teachers}
        frames = None if self.framing is None else self.framing.at(group, step).teachers
        with self._autocast():
            return teacher_features(teachers, sizes, images, mosaic_shifts(self.config, step), frames)

    def train_step(self, batch: Batch) -> Tensor:
        """Do one step; return whether it was applied: [] bool. Never waits for the device."""
        config = self.config
        losses, total, norm = self.compute_gradients(batch)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(self.steps_done, config.steps, config.optim)
        with self.performance.watch.time("optimiser"):
            applied = self.optimizer.guard(norm, config.optim.clip)
            self.optimizer.step()
        with self.performance.watch.time("communication"):
            self.loss.update(self.student.peer_sum)
        if self.average is not None:
            self.average.update(applied)
        first = total.detach()
        self.first = first if self.first is None else torch.where(self.first.isfinite(), self.first, first)
        self.nonfinite.update(applied, [each.parts for each in losses])
        self.meters.add({"loss": total, "grad_norm": norm}, applied)
        for each in losses:
            self.meters.add(each.parts, applied)
            if each.details:
                self.meters.add(each.details, applied)
        self.performance.step(batch.waited)
        return applied

    def compute_gradients(self, batch: Batch) -> tuple[list[Losses], Tensor, Tensor]:
        """Compute the gradients of a step, the same as of all its images in one process.

        Returns the losses of each forward, the loss [] (its mean over ranks is the step's), and the norm []
        of the whole gradient, the same on every rank.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.reparametrisation.advance(self.steps_done)
        parts = [
            part
            for group_batch in batch.groups
            for part in self._with_crops(group_batch).split(self.config.grad_accum_steps)
        ]
        losses = self._backward_in_parallel(parts) if self.parallel_groups else self._backward(parts)
        total = torch.zeros((), device=self.device)
        for each in losses:
            total += each.total.detach() * self._scale
        with self.performance.watch.time("communication"):
            norm = self.student.reduce_gradients(total)
        return losses, total, norm

    def _forward(self, part: GroupBatch) -> Losses:
        step, config = self.steps_done, self.config
        detail = (self.step + 1) % config.log_every == 0 or self.step + 1 == self.end
        window = draw_window(self.windows[part.images.shape[-1]], config.seed, step)
        encode = self.student.encode_frozen if step < config.freeze_trunk_steps else self.student.encode
        average = self.averaged if step >= first_mesa_step(config) else None
        with self.performance.watch.time("forward", part.group.name), self._autocast():
            # `loss` owns student and adaptors; the student is called through its DDP or FSDP wrapper.
            losses: Losses = self.loss(encode, part, window, detail, average)
        return losses

    def _backward(self, parts: Sequence[GroupBatch]) -> list[Losses]:
        """Run forward and backward of the parts one after another; gradients add up in the weights."""
        done = []
        for index, part in enumerate(parts, start=1):
            with self.student.turn(last=index == len(parts)):
                losses = self._forward(part)
                with self.performance.watch.time("backward", part.group.name):
                    (losses.total * self._scale).backward()
            done.append(losses._replace(total=losses.total.detach()))
        return done

    def _backward_in_parallel(self, parts: Sequence[GroupBatch]) -> list[Losses]:
        """Run two parts at a time, in threads; gradients are added in the parts' order, as in `_backward`."""
        weights = [weight for weight in self.loss.parameters() if weight.requires_grad]

        def work(part: GroupBatch) -> tuple[Losses, tuple[Tensor | None, ...]]:
            losses = self._forward(part)
            with self.performance.watch.time("backward", part.group.name):
                grads = torch.autograd.grad(losses.total * self._scale, weights, allow_unused=True)
            return losses._replace(total=losses.total.detach()), grads

        done = []
        for losses, grads in self._threads.map(work, parts):
            pairs = [(w, grad) for w, grad in zip(weights, grads, strict=True) if grad is not None]
            torch.autograd.backward([w for w, _ in pairs], [grad for _, grad in pairs])
            done.append(losses)
        return done

    @property
    def _scale(self) -> float:
        """Factor on a part's loss, for the mean over the ranks of its group and the accumulated steps."""
        return self.student.scale / self.config.grad_accum_steps

    def _with_crops(self, batch: GroupBatch) -> GroupBatch:
        """Add this rank's part of the position crops that are sampled for the whole step."""
        seeded = generator(self.config.seed, "positions", self.steps_done)
        crops = self.model.sample_crops(self.partition.batch_size, seeded)
        if crops is None:
            return batch
        rows = self.partition.rows(batch.group, self.ranks.rank)
        local = crops[rows.start : rows.stop]
        if self.device.type == "cuda":  # a copy from pinned memory is asynchronous
            local = local.pin_memory()
        return batch._replace(crops=local.to(self.device, non_blocking=True))

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the autocast context: bfloat16 where the settings or the device require it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_half(self.config, self.device))

    def record(self) -> Record:
        """Make the record of a log step: means since the last one. It waits for the device; steps do not.

        Raises:
            RadioError: too many steps in a row were not finite, or too many images were broken.
        """
        config = self.config
        skipped = self.nonfinite.read(self.ranks, self.step, config.max_nonfinite_steps)
        if skipped.recent:
            self._say(f"step {self.step}: {skipped.describe()}")
        figures = self.performance.read()
        means = self.meters.read(self.ranks)
        self.last = means["loss"]
        broken = self.loader.errors.check(
            self.steps_done * self.partition.batch_size, config.data.max_error_fraction
        )
        return {
            "step": self.step,
            "samples": self.samples,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            **figures,
            "broken": sum(broken.values()),
            **{LOG_KEYS[cause]: count for cause, count in broken.items() if count},
            "skipped": skipped.total,
            **({"not_finite": ", ".join(skipped.names)} if skipped.recent else {}),
        }

    def state_tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of this rank that a state needs, whole or sharded."""
        averages = {} if self.average is None else self.average.tensors
        return {
            **{f"weights.{name}": tensor for name, tensor in self.loss.state_dict().items()},
            **{f"optimizer.{name}": tensor for name, tensor in moments(self.optimizer, self.loss).items()},
            **{f"average.{name}": tensor for name, tensor in averages.items()},
        }

    def save(self) -> None:
        """Start to write a training state, `ckpt.pt`, and `ckpt-ema.pt` if any; every rank calls it.

        The state gets its final name last: a run that is stopped before repeats its last steps. If the log
        has unwritten records, no state is saved, since it must not be ahead of the log.

        Raises:
            RadioError: too many steps in a row were not finite, or a weight is not finite.
        """
        self.nonfinite.check(self.step, self.config.max_nonfinite_steps)
        if self.step == self.end:
            self.nonfinite.check_any(self.steps_done)
        self.states.wait()  # the previous save may still be writing the metadata changed below
        tensors = self.state_tensors()
        problems = self.ranks.gather_objects((first_bad(tensors), self.log.flush() if self.log else ""))
        bad, unwritten = (next(filter(None, each), "") for each in zip(*problems, strict=True))
        if bad:
            last = self.states.last_step
            stands = f"what was saved at step {last} stands" if last else "nothing is saved"
            raise RadioError(
                f"step {self.step}: {bad} is not finite any more, though losses and gradients were; "
                f"{stands}. Begin anew with --restart and a lower --optim.lr, or with --optim.clip 1"
            )
        if unwritten:
            self._say(f"no state of step {self.step} is written before the log is ({unwritten})")
            return
        publish = self._publisher()
        local = {"meters": self.meters.state_dict(), "guard": self.nonfinite.state_dict()}
        notes = {
            "ranks": self.ranks.gather_objects(local),
            "data": self.loader.state_dict(),
            "first_loss": self._first_loss(),
        }
        self.states.write(self.step, tensors, notes, lambda: publish(None))

    def resume(self) -> int:
        """Load the newest whole state of the run folder; return the number of steps done."""
        state = self.states.resume(self.state_tensors(), self._misfit)
        if state is None:
            return self._start()
        if state.step > self.end:
            raise CheckpointError(
                f"{state.path}: is beyond the run's last step, {self.end}, and so not this run's; "
                f"move it away, or begin anew with --restart"
            )
        ranks = state.notes["ranks"]
        if len(ranks) == self.ranks.world:
            local = ranks[self.ranks.rank]
            self.meters.load_state_dict(local["meters"])
            self.nonfinite.load_state_dict(local["guard"])
        else:  # the first rank takes the sums of all
            if self.ranks.leads:
                rows = [row for rank in ranks for row in rank["meters"]["rows"]]
                self.meters.load_state_dict({"rows": rows})
            self.nonfinite.load_state_dict(ranks[0]["guard"])
            if mosaics := ", ".join(t.name for t in self.config.teachers if t.mosaic):
                self._say(
                    f"the number of ranks was {len(ranks)} and is {self.ranks.world}: mosaics hold other "
                    f"images together, and the features of {mosaics} differ by more than rounding"
                )
        self.loader.load_state_dict(state.notes["data"])
        first = state.notes.get("first_loss")
        self.first = None if first is None else torch.tensor(first, device=self.device)
        return state.step

    def _take_over(self) -> dict[str, Tensor]:
        """Start from the checkpoints of the stage before if they still are; return the weights' averages."""
        names = ["ckpt.pt", *(["ckpt-ema.pt"] if self.config.ema else [])]
        files = [self.config.out / name for name in names]
        read = self.ranks.on_leader(lambda: [_read_step(file) for file in files])
        self._taken_over = read == [self.stage.first_step] * len(files)
        if not self._taken_over:  # as later, where the stage has states of its own
            return {}
        averages: dict[str, Tensor] = {}
        for file in reversed(files):  # the averages are read through the model, and then overwritten
            say = self._say if file is files[0] else lambda line: None
            _, self._taken = warm_start(self.model, str(file), say)
            if file is not files[0]:
                averages = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        return averages

    def _start(self) -> int:
        """Return the step before the first one of the stage, where it has no state yet."""
        if self.stage.index and not self._taken_over:
            raise CheckpointError(
                f"{self.config.out}: neither a state of stage {self.stage.index + 1} nor the checkpoint of "
                f"step {self.stage.first_step}, which it starts from, is whole; begin anew with --restart"
            )
        return self.stage.first_step

    def _misfit(self, state: SavedState) -> str:
        """Describe optimizer counts that contradict the loaded state's step; empty if none."""
        skipped = state.notes["ranks"][0]["guard"]["total"]
        # Another package's student may skip blocks, and a trunk that was frozen has fewer steps.
        seldom = students.plugin(self.config.student) or self.config.freeze_trunk_steps
        partly = "model.student." if seldom else "-"
        steps = state.step - self.stage.first_step
        odd = odd_count(self.optimizer, self.loss, steps - skipped, partly=partly)
        return odd and f"optimizer.{odd} in it, after {steps} steps of which {skipped} were left out"

    def _publisher(self) -> Callable[[Collection[str] | None], None]:
        """Copy this step's weights; return a function that writes the named checkpoints (None: all)."""
        weights = self.model.state_dict()

        def gather(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return self.student.gather(self.loss.statistics.fold(self.reparametrisation.fold(learned)))

        files = {"ckpt.pt": gather(weights)}
        if self.average is not None:
            files["ckpt-ema.pt"] = gather({**weights, **self.average.tensors})
        self.model.metadata["provenance"] = provenance(self.step, self.samples)

        def publish(names: Collection[str] | None) -> None:
            for name, tensors in files.items():
                if names is None or name in names:
                    self.model.save(self.config.out / name, tensors)

        return publish

    def _publish_again(self) -> None:
        """Rewrite a finished stage's checkpoints unless whole and of its last step; every rank calls it."""
        out = self.config.out
        names = ["ckpt.pt", *(["ckpt-ema.pt"] if self.average is not None else [])]
        gone = self.ranks.on_leader(lambda: [name for name in names if _read_step(out / name) != self.step])
        if gone:
            publish = self._publisher()
            self.ranks.on_leader(lambda: publish(gone))
            self._say(f"written again from the state of step {self.step}: {', '.join(gone)}")

    def evaluate(self) -> None:
        """Evaluate the student saved at this step, unless already done; every rank calls it."""
        assert self.follower is not None
        self.states.wait()
        saved = self.states.last_step == self.step
        done = self.log is None or self.follower.has_done(self.step)
        (saved, done), *_ = self.ranks.gather_objects((saved, done))
        if done or not saved:
            return
        start = time.perf_counter()
        record = self.follower.evaluate(self.step)
        if self.log is not None:
            self.log.write(record)
        self.performance.skip(time.perf_counter() - start)

    def _evaluates(self) -> bool:
        return self.follower is not None and self.step % self.config.eval_every == 0

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.end

    def _first_loss(self) -> float | None:
        """Return the first finite loss; None before it. Every rank calls it."""
        first = math.nan if self.first is None else float(self.ranks.sum(self.first.cpu())) / self.ranks.world
        return first if math.isfinite(first) else None

    def _doubt(self) -> str:
        """Warn if the final weights are doubtful, else return an empty string. Every rank calls it."""
        guard = self.nonfinite.state_dict()
        skipped, in_a_row = guard["total"], guard["in_a_row"]
        first = self._first_loss() or 0.0
        doubts = []
        if in_a_row or skipped > _DOUBTFUL_FRACTION * self.steps_done:
            doubts.append(f"{skipped} of the {self.steps_done} steps were left out, not finite")
        if self.last > _DOUBTFUL_RISE * first > 0:
            doubts.append(f"the loss rose from {first:.3g} to {self.last:.3g}")
        remedy = "the weights may be useless; begin anew with --restart and a lower --optim.lr"
        return f"warning: {', '.join(doubts)}: {remedy}" if doubts else ""

    def _open_log(self) -> None:
        check_writable(self.config.out / "state", "--out")  # else it would fail at the first save
        self.log = open_log(self.stage.run, self.step, self._say, self.end)
        write_yaml(self.stage.run, self.config.out / "config.yaml")

    def _say(self, line: str) -> None:
        say(self.console, line)


def _read_step(checkpoint: Path) -> int:
    """Return the step of a checkpoint; 0 if there is none, or no whole one."""
    try:
        origin = load_checkpoint(checkpoint).metadata.get("provenance")
    except CheckpointError:
        return 0
    step = origin.get("step") if isinstance(origin, dict) else 0
    return step if isinstance(step, int) else 0
