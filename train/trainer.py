"""The training loop: a run is built, taken up where it was stopped, and carried to its last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from evals.core.dist import Group
from radio.config import write_yaml
from radio.errors import RadioError
from radio.model import build
from radio.types import Features

from .ahead import ahead, half_the_threads
from .assembly import (
    check_settings,
    check_student,
    deal,
    deciding,
    gather_facts,
    load_teachers,
    make_card,
    model_config,
    provenance,
    student_resolutions,
    window_candidates,
)
from .batches import Batch, crop_sides, load, remembered, taught
from .cache import CacheJob, GroupedCaches, open_caches
from .config import TrainConfig
from .crops import FixedCrops
from .data.progress import LISTING, start_progress
from .data.sources import Sources, open_sources
from .data.stream import fewer_workers, open_stream
from .guards import Guard
from .learner import Learner
from .metrics import Clock, Meters
from .partition import TeacherGroup
from .pictures import Joined, open_pictures
from .preempt import Preemption
from .sinks import JsonLines, ProgressConsole, Record
from .state import States
from .step import teacher_features


class Run:
    """One distillation run.

    Args:
        config: its settings.
        group: the ranks that share it.
        device: where this rank computes.
        console: where it reports.
        restart: begin anew instead of going on from the run folder's state.
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
        self.config, self.group, self.device, self.console = config, group, device, console
        self.partition = deal(config, group.world)
        self.mine = self.partition.of(group.rank)
        mine = [name for teachers in self.mine for name in teachers.teachers]
        every = [t.name for t in config.teachers]
        self.teachers = load_teachers(config, device, mine)
        facts = gather_facts(config, self.teachers, group)
        self.sizes = {name: fact.size for name, fact in facts.items()}
        online = config.cache.folder is None
        self.data = open_sources(config.data) if online else open_pictures(config.data)
        self.progress = start_progress(config, self.partition, group, self.data)
        self.sides = crop_sides(self.partition, self.sizes)
        card = make_card(config, facts, self.data)
        self.model = build(model_config(config, facts), config.seed, card, config.out.name)
        for name in set(every) - set(mine):
            del self.model.adaptors[name]
        self.model.to(device).train()
        beside = student_resolutions(config)
        self.windows = window_candidates(self.model, config, beside)
        check_student(self.model.student, beside, self.windows)
        self.learner = Learner(self.model, self.windows, config, self.partition, group, device)
        self.meters, self.guard, self.clock = Meters(), Guard(device), Clock()
        self.stop, self.stopped = Preemption(group), False
        self.states = States(
            config.out / "state",
            group,
            deciding(config, facts, self.data),
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            tell=self._tell,
        )
        self.step = 0 if restart else self._resume()
        self.cache = self._open_caches() if self.step < config.steps else None
        self.overlaps = config.teachers_ahead and self.cache is None

    def train(self) -> Path:
        """Run to the last step, or to where it is asked to stop (`stopped`); the path of `ckpt.pt`.

        Raises:
            RadioError: too many steps not finite or pictures broken, or the last state cannot be written.
        """
        config = self.config
        if self.step == config.steps:
            return config.out / "ckpt.pt"
        if not self.step:  # the states of an earlier run must not outlive its log
            self.states.clear()
        log = JsonLines(config.out / "metrics.jsonl", self.step) if self.group.leads else None
        if self.group.leads:
            write_yaml(config, config.out / "config.yaml")
        try:
            with (
                self.stop,
                half_the_threads() if self.overlaps and self.device.type == "cpu" else nullcontext(),
            ):
                self._loop(log)
            self.states.wait(last=True)
            if broken := self.progress.in_words():
                self._tell(f"passed over: {broken}; {config.out / LISTING} names them")
        finally:
            if log is not None:
                log.close()
            self.states.wait()
        return config.out / "ckpt.pt"

    def _loop(self, log: JsonLines | None) -> None:
        config = self.config
        self.clock.read()
        with ProgressConsole(self.console, config.recipe, config.steps, self.step) as bar:
            for batch in ahead(self.batches()) if self.overlaps else self.batches():
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
                if self.stopped or self._due(config.save_every):
                    self.save()
                if self.stopped:
                    return

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps still to do, with the teachers' features."""
        config = self.config
        if self.cache is not None:
            known = load(self.cache, config, self.partition, self.group.rank, self.step, self.device)
            return remembered(known, self.mine, self.device, self.cache.targets)
        assert isinstance(self.data, Sources)
        shares, pin = self.progress.shares(self.sides), self.device.type == "cuda"
        if fewer := fewer_workers(config.data.workers, shares):
            self._tell(fewer)
        steps = range(self.step, config.steps)
        rows = open_stream(self.data, shares, config.data, config.seed, steps, pin=pin)
        return taught(rows, self.mine, self.device, self._teach)

    def advance(self, batch: Batch) -> None:
        """One step, and what is measured of it. Reads nothing back from the device."""
        learned, fine = self.learner.advance(batch, self.step)
        self.guard.see(fine, [losses.parts for losses in learned.losses])
        self.meters.add({"loss": learned.total, "grad_norm": learned.norm}, fine)
        for losses in learned.losses:
            self.meters.add(losses.parts, fine)
            if losses.details:
                self.meters.add(losses.details, fine)
        self.clock.step(batch.waited)
        self.progress.add(batch.marks)

    def record(self) -> Record:
        """The means since the last log step.

        Raises:
            RadioError: too many steps in a row were not finite, or too many pictures are broken.
        """
        config = self.config
        skipped = self.guard.read(self.group, self.step, config.max_skipped)
        if skipped.recent:
            self._tell(f"step {self.step}: {skipped.describe()}")
        lap = self.clock.read()
        means = self.meters.read(self.group)
        seen = self.step * self.partition.batch_size
        broken = self.progress.broken(seen, config.data.max_broken)
        return {
            "step": self.step,
            "samples": seen,
            **means,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "images_per_second": lap.steps * self.partition.batch_size / lap.seconds,
            "data_wait": lap.waiting / lap.seconds,
            "seconds": lap.seconds,
            "broken": sum(broken.values()),
            **{f"broken/{cause}": count for cause, count in broken.items() if count},
            "skipped": skipped.total,
            **({"not_finite": ", ".join(skipped.names)} if skipped.recent else {}),
        }

    def save(self) -> None:
        """Begin to write a state to go on from, `ckpt.pt` to evaluate, and its average; every rank calls it.

        The state gets its name last: a run that is stopped before does its last steps again.

        Raises:
            RadioError: too many steps in a row were not finite.
        """
        self.guard.check(self.step, self.config.max_skipped)
        files = self.learner.checkpoints()
        self.model.card["provenance"] = provenance(self.step, self.step * self.partition.batch_size)

        def publish() -> None:
            for name, tensors in files.items():
                self.model.save(self.config.out / name, tensors)

        mine = {"meters": self.meters.state(), "guard": self.guard.state()}
        notes = {"ranks": self.group.gather_objects(mine), "data": self.progress.state()}
        self.states.write(self.step, self.learner.tensors(), notes, publish)

    def _resume(self) -> int:
        found = self.states.newest()
        if found is None:
            return 0
        self.states.read(found, self.learner.tensors())
        ranks = found.notes["ranks"]
        if len(ranks) == self.group.world:
            mine = ranks[self.group.rank]
            self.meters.restore(mine["meters"], self.device)
            self.guard.restore(mine["guard"])
        else:
            if self.group.leads:
                self.meters.restore([row for rank in ranks for row in rank["meters"]], self.device)
            self.guard.restore(ranks[0]["guard"])
        self.progress.restore(found.notes["data"])
        return found.step

    def _tell(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _teach(self, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
        """What a group's teachers say of its pictures."""
        with self.learner.autocast():
            return teacher_features(
                {name: self.teachers[name] for name in group.teachers}, self.sizes, images
            )

    def _open_caches(self) -> GroupedCaches | None:
        """The teacher caches of this rank's groups; None when the teachers run online."""
        config, options = self.config, self.config.cache
        if options.folder is None:
            return None
        assert isinstance(self.data, Joined)
        count = min(options.pictures or len(self.data), len(self.data))
        jobs = {}
        for group, side in zip(self.partition.groups, self.sides, strict=True):
            if group in self.mine:
                crops = FixedCrops(self.data, config.data, side, config.seed, count, options.crops)
                teachers = {name: self.teachers[name] for name in group.teachers}
                jobs[group.name] = CacheJob(options.folder, teachers, self.sizes, crops, self.device)
        total = sum(len(job.crops) for job in jobs.values())
        with ProgressConsole(self.console, "teacher cache", total, 0) as bar:
            return open_caches(
                jobs,
                self.partition,
                self.group,
                workers=config.data.workers,
                confirm=self._confirm,
                progress=bar.advance,
            )

    def _confirm(self, size: int) -> None:
        self._tell(f"teacher cache: {size / 1e9:.2f} GB in {self.config.cache.folder}")
        if size <= 1e9 or not self.config.cache.confirm:
            return
        if not self.console.is_terminal:
            raise RadioError(f"a teacher cache of {size / 1e9:.1f} GB would be written; agree with --yes")
        if self.console.input("write it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise RadioError(
                "the teacher cache was not written; leave --cache.folder out to run the teachers online"
            )


def summarise(record: Record, config: TrainConfig) -> str:
    """The figures of one record on one line: the loss, each teacher's summary/spatial, and the rate.

    A part that has no weight in the loss is a dash.
    """

    def part(name: str, weight: float) -> str:
        return f"{record[name]:.3f}" if weight else "-"

    parts = []
    for t in config.teachers:
        summary = part(f"{t.name}/summary", t.summary_weight)
        parts.append(f"{t.name} {summary}/{part(f'{t.name}/spatial', t.spatial_weight)}")
    return f"loss {record['loss']:.3f}  {' '.join(parts)}  {record['images_per_second']:.0f} img/s"
