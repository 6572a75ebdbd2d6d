"""The training loop: build a run, resume it where it was stopped, and train to its last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
from annotated_types import MinLen
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor
from typing_extensions import TypedDict

from radio.checkpoint import load as load_checkpoint
from radio.config import write_yaml
from radio.dist import Group
from radio.errors import CheckpointError, RadioError
from radio.io import check_writable
from radio.memory import memory_of
from radio.model import build
from radio.students import students
from radio.types import Features

from .ahead import limit_threads, prefetch
from .assembly import (
    check_memory,
    check_settings,
    check_student,
    gather_facts,
    load_teachers,
    make_metadata,
    model_config,
    partition_ranks,
    provenance,
    resume_signature,
    student_resolutions,
    window_candidates,
)
from .batches import Batch, cached_batches, crop_sides, load, online_batches
from .cache import GroupedCaches
from .caching import cache_jobs, fill_caches
from .config import TrainConfig, run_name
from .data.faults import LOG_KEYS
from .data.progress import LISTING, DataState, start_progress
from .data.sources import Sources, open_sources
from .data.stream import fewer_workers, open_stream
from .images import ConcatImages, open_images
from .learner import Learner
from .loggers import Log, ProgressConsole, Record, open_log, say, summarise
from .monitor import Meters, MetersState, NonFiniteMonitor, NonFiniteState, first_bad
from .optim import odd_count
from .parallel import check_started
from .partition import TeacherGroup
from .preempt import Preemption
from .state import CheckpointManager, Found
from .step import teacher_features

if TYPE_CHECKING:
    from .scoring import Follower

# Final weights are doubtful if this share of steps was skipped, or the loss rose by this factor.
_DOUBTFUL_SHARE, _DOUBTFUL_RISE = 0.1, 3.0


class Trainer:
    """One distillation run.

    Args:
        config: its settings.
        group: all ranks of the run.
        device: this rank's device.
        console: where to report.
        restart: start over instead of resuming from the run folder's state.
    """

    def __init__(
        self,
        config: TrainConfig,
        group: Group,
        device: torch.device,
        console: Console,
        *,
        restart: bool = False,
    ) -> None:
        check_settings(config, group.world)
        check_started(config)
        self.config, self.group, self.device, self.console = config, group, device, console
        self.partition = partition_ranks(config, group.world)
        self.mine = self.partition.of(group.rank)
        mine = [name for teachers in self.mine for name in teachers.teachers]
        every = [t.name for t in config.teachers]
        self.teachers = load_teachers(config, device, mine)
        facts = gather_facts(config, self.teachers, group)
        self.sizes = {name: fact.size for name, fact in facts.items()}
        online = config.cache.folder is None
        self.data = open_sources(config.data) if online else open_images(config.data, self._tell)
        self.progress = start_progress(config, self.partition, group, self.data, self._tell)
        self.sides = crop_sides(self.partition, self.sizes)
        metadata = make_metadata(config, facts, self.data)
        described = model_config(config, facts)
        check_memory(config, described, self.partition, group.rank, memory_of(device))
        self.model = build(described, config.seed, metadata, run_name(config))
        for name in set(every) - set(mine):
            delattr(self.model.get_submodule("adaptors"), name)
        self.model.to(device).train()
        beside = student_resolutions(config)
        self.windows = window_candidates(self.model, config, beside)
        check_student(self.model.student, beside, self.windows)
        self.learner = Learner(self.model, self.windows, config, self.partition, group, device)
        self.meters, self.guard, self.pace = Meters(), NonFiniteMonitor(device), self.learner.pace
        self.stop, self.stopped = Preemption(group), False
        self.first: Tensor | None = None  # [] the first step's loss; its mean over ranks is the step's
        self.last = 0.0  # loss of the last record
        self.log: Log | None = None
        self.follower = _follower(config, group, console) if config.eval_every else None
        self.states = CheckpointManager(
            config.out / "state",
            group,
            resume_signature(config, facts, self.data),
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            log=self._tell,
            schema=_NOTES,
        )
        self.step = 0 if restart else self._resume()
        self.cache: GroupedCaches | None = None
        if isinstance(self.data, ConcatImages) and self.step < config.steps:
            jobs = cache_jobs(config, self.partition, group, self.data, self.teachers, self.sizes, device)
            self.cache = fill_caches(config, jobs, self.partition, group, console)
        self.overlaps = config.prefetch_teachers and self.cache is None
        self.pairs = device.type == "cpu" and (self.overlaps or self.learner.parallel_groups)  # of operators

    def train(self) -> Path:
        """Train to the last step, or until a signal stops it (`stopped`); return the path of `ckpt.pt`.

        Raises:
            RadioError: too many steps are not finite, too many images broken, or the last save failed.
        """
        config = self.config
        if self.step == config.steps:
            self._publish_again()
            return config.out / "ckpt.pt"
        if not self.step:  # the states of an earlier run must not outlive its log
            self.states.clear()
        self.group.on_leader(self._open)
        log = self.log
        try:
            with self.stop, limit_threads() if self.pairs else nullcontext():
                self._loop(log)
            self.states.wait(last=True)
            if not self.stopped and (doubt := self._doubt()):
                self._tell(doubt)
            if uneven := self.pace.in_words():
                self._tell(uneven)
            if broken := self.progress.in_words():
                self._tell(f"passed over: {broken}; {config.out / LISTING} names them")
        finally:
            if log is not None:
                log.close()
            self.states.wait()
        return config.out / "ckpt.pt"

    def _open(self) -> None:
        check_writable(self.config.out / "state", "--out")  # else it would fail at the first save
        self.log = open_log(self.config, self.step, self._tell)
        write_yaml(self.config, self.config.out / "config.yaml")

    def _publish_again(self) -> None:
        """Rewrite a finished run's checkpoints if missing or damaged; every rank calls it."""
        names = ["ckpt.pt", *(["ckpt-ema.pt"] if self.learner.average is not None else [])]
        out = self.config.out
        gone = self.group.on_leader(lambda: [name for name in names if not _is_whole(out / name)])
        if gone:
            on_saved = self._on_saved()
            self.group.on_leader(lambda: on_saved(gone))
            self._tell(f"written again from the state of step {self.step}: {', '.join(gone)}")

    def _on_saved(self) -> Callable[[Collection[str] | None], None]:
        """Copy this step's weights; return a function that writes the named checkpoints (None: all)."""
        files = self.learner.checkpoints()
        self.model.metadata["provenance"] = provenance(self.step, self.step * self.partition.batch_size)

        def on_saved(names: Collection[str] | None) -> None:
            for name, tensors in files.items():
                if names is None or name in names:
                    self.model.save(self.config.out / name, tensors)

        return on_saved

    def _loop(self, log: Log | None) -> None:
        config = self.config
        if self.step and self._evaluates():  # the run was stopped before this evaluation
            self.evaluate(log)
        self.pace.start()
        with ProgressConsole(self.console, config.recipe, config.steps, self.step) as bar:
            for batch in prefetch(self.batches(), self.device) if self.overlaps else self.batches():
                self.advance(batch)
                self.step += 1
                if self._due(config.log_every):
                    record = self.record()
                    bar.advance(self.step, summarise(record, config))
                    if log is not None:
                        log.write(record)
                else:
                    bar.advance(self.step)
                self.stopped = self.stop.agreed() and self.step < config.steps
                if self.stopped or self._due(config.save_every) or self._evaluates():
                    self.save()
                if self.stopped:
                    return
                if self._evaluates():
                    self.evaluate(log)

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the remaining steps, with the teachers' features."""
        config = self.config
        if self.cache is not None:
            known = load(self.cache, config, self.partition, self.group.rank, self.step, self.device)
            return cached_batches(known, self.mine, self.device, self.cache.targets)
        assert isinstance(self.data, Sources)
        shares, pin = self.progress.shares(self.sides), self.device.type == "cuda"
        if fewer := fewer_workers(config.data.workers, shares):
            self._tell(fewer)
        steps = range(self.step, config.steps)
        rows = open_stream(self.data, shares, config.data, config.seed, steps, pin=pin)
        return online_batches(rows, self.mine, self.device, self._teach)

    def advance(self, batch: Batch) -> None:
        """Do one step and update the meters, without a host sync."""
        learned, fine = self.learner.advance(batch, self.step)
        if self.first is None:
            self.first = learned.total.detach()
        self.guard.update(fine, [losses.parts for losses in learned.losses])
        self.meters.add({"loss": learned.total, "grad_norm": learned.norm}, fine)
        for losses in learned.losses:
            self.meters.add(losses.parts, fine)
            if losses.details:
                self.meters.add(losses.details, fine)
        self.pace.step(batch.waited)
        self.progress.add(batch.marks)

    def record(self) -> Record:
        """Make the record of a log step: means since the last one.

        Raises:
            RadioError: too many steps in a row were not finite, or too many images were broken.
        """
        config = self.config
        skipped = self.guard.read(self.group, self.step, config.max_nonfinite_steps)
        if skipped.recent:
            self._tell(f"step {self.step}: {skipped.describe()}")
        pace = self.pace.read()
        means = self.meters.read(self.group)
        self.last = means["loss"]
        seen = self.step * self.partition.batch_size
        broken = self.progress.broken(seen, config.data.max_error_fraction)
        return {
            "step": self.step,
            "samples": seen,
            **means,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            **pace,
            "broken": sum(broken.values()),
            **{LOG_KEYS[cause]: count for cause, count in broken.items() if count},
            "skipped": skipped.total,
            **({"not_finite": ", ".join(skipped.names)} if skipped.recent else {}),
        }

    def save(self) -> None:
        """Start to write a training state, `ckpt.pt`, and `ckpt-ema.pt` if any; every rank calls it.

        The state gets its final name last: a run that is stopped before repeats its last steps. If the log
        has unwritten records, no state is saved, since it must not be ahead of the log.

        Raises:
            RadioError: too many steps in a row were not finite, or a weight is not finite.
        """
        self.guard.check(self.step, self.config.max_nonfinite_steps)
        if self.step == self.config.steps:
            self.guard.check_any(self.step)
        self.states.wait()  # the previous save may still be writing the metadata changed below
        tensors = self.learner.tensors()
        found = self.group.gather_objects((first_bad(tensors), self.log.flush() if self.log else ""))
        bad, unwritten = (next(filter(None, each), "") for each in zip(*found, strict=True))
        if bad:
            self._refuse(bad)
        if unwritten:
            self._tell(f"no state of step {self.step} is written before the log is ({unwritten})")
            return
        on_saved = self._on_saved()
        mine = {"meters": self.meters.state_dict(), "guard": self.guard.state_dict()}
        notes = {"ranks": self.group.gather_objects(mine), "data": self.progress.state()}
        self.states.write(self.step, tensors, notes, lambda: on_saved(None))

    def _refuse(self, name: str) -> NoReturn:
        stands = (
            f"what was saved at step {self.states.last_step} stands"
            if self.states.last_step
            else "nothing is saved"
        )
        raise RadioError(
            f"step {self.step}: {name} is not finite any more, though losses and gradients were; {stands}. "
            f"Begin anew with --restart and a lower --optim.lr, or with --optim.clip 1"
        )

    def evaluate(self, log: Log | None) -> None:
        """Evaluate the student saved at this step, unless already done; every rank calls it."""
        assert self.follower is not None
        self.states.wait()
        saved = self.states.last_step == self.step
        done = log is None or self.follower.has_done(self.step)
        (saved, done), *_ = self.group.gather_objects((saved, done))
        if done or not saved:
            return
        start = time.perf_counter()
        found = self.follower.evaluate(self.step)
        if log is not None:
            log.write(found)
        self.pace.skip(time.perf_counter() - start)

    def _evaluates(self) -> bool:
        return self.follower is not None and self.step % self.config.eval_every == 0

    def _resume(self) -> int:
        found = self.states.resume(self.learner.tensors(), self._misfit)
        if found is None:
            return 0
        if found.step > self.config.steps:
            raise CheckpointError(
                f"{found.path}: is beyond the run's last step, {self.config.steps}, and so not this run's; "
                f"move it away, or begin anew with --restart"
            )
        ranks = found.notes["ranks"]
        if len(ranks) == self.group.world:
            mine = ranks[self.group.rank]
            self.meters.load_state_dict(mine["meters"])
            self.guard.load_state_dict(mine["guard"])
        else:
            if self.group.leads:
                self.meters.load_state_dict(
                    {"rows": [row for rank in ranks for row in rank["meters"]["rows"]]}
                )
            self.guard.load_state_dict(ranks[0]["guard"])
        self.progress.restore(found.notes["data"])
        return found.step

    def _misfit(self, found: Found) -> str:
        """Describe optimizer counts that contradict the loaded state's step; empty if none."""
        left_out = found.notes["ranks"][0]["guard"]["total"]
        partly = "model.student." if students.plugin(self.config.student) else "-"  # may skip blocks
        odd = odd_count(self.learner.optimizer, self.learner.distiller, found.step - left_out, partly=partly)
        return odd and f"optimizer.{odd} in it, after {found.step} steps of which {left_out} were left out"

    def _doubt(self) -> str:
        """Warn if the final weights are doubtful, else return an empty string. Every rank calls it."""
        guard = self.guard.state_dict()
        left_out, in_a_row = guard["total"], guard["in_a_row"]
        first = 0.0 if self.first is None else float(self.group.sum(self.first.cpu())) / self.group.world
        doubts = []
        if in_a_row or left_out > _DOUBTFUL_SHARE * self.step:
            doubts.append(f"{left_out} of the {self.step} steps were left out, not finite")
        if self.last > _DOUBTFUL_RISE * first > 0:
            doubts.append(f"the loss rose from {first:.3g} to {self.last:.3g}")
        remedy = "the weights may be useless; begin anew with --restart and a lower --optim.lr"
        return f"warning: {', '.join(doubts)}: {remedy}" if doubts else ""

    def _tell(self, line: str) -> None:
        say(self.console, line)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _teach(self, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
        """Compute the features of a group's images by its teachers."""
        with self.pace.watch.time("teachers", group.name), self.learner.autocast():
            return teacher_features(
                {name: self.teachers[name] for name in group.teachers}, self.sizes, images
            )


def _is_whole(checkpoint: Path) -> bool:
    try:
        load_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


class _RankNotes(TypedDict):
    meters: MetersState
    guard: NonFiniteState


class _Notes(TypedDict):
    ranks: Annotated[list[_RankNotes], MinLen(1)]
    data: DataState


_NOTES: TypeAdapter[Any] = TypeAdapter(_Notes)


def _follower(config: TrainConfig, group: Group, console: Console) -> Follower:
    from .scoring import Follower  # the evaluators are many modules

    return Follower(config, group, console)
