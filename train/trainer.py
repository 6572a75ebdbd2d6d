"""The training loop: a run is built, taken up where it was stopped, and carried to its last step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from evals.core.dist import Group
from radio.config import to_plain, write_yaml
from radio.errors import RadioError
from radio.model import build
from radio.types import Features

from .ahead import ahead, half_the_threads
from .assembly import (
    check_settings,
    check_student,
    deal,
    gather_facts,
    load_teachers,
    make_card,
    model_config,
    provenance,
    student_resolutions,
    window_candidates,
)
from .balancing import make_balancer
from .batches import Batch, GroupedCrops, crop_sides, load, remembered, taught
from .cache import FeatureCache, write_cache
from .config import TrainConfig
from .crops import FixedCrops, RandomCrops, check_broken
from .metrics import Clock, Meters
from .optim import learning_rate, make_optimizer
from .parallel import Engine, find_peers, gather_weights, is_half
from .partition import TeacherGroup
from .pictures import open_pictures
from .sampling import draw_window, generator
from .sinks import JsonLines, ProgressConsole, Record
from .state import load_state, save_state
from .step import Distiller, Losses, in_parts, teacher_features


class Learned(NamedTuple):
    """What the gradients of one step came from, on the device."""

    total: Tensor  # [] scaled so that the mean over ranks is the step's loss
    norm: Tensor  # [] of the whole gradient, the same on every rank
    losses: list[Losses]


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
        every = [t.name for t in config.teachers]  # a cache is written by one rank
        self.teachers = load_teachers(config, device, mine if config.cache.folder is None else every)
        facts = gather_facts(config, self.teachers, group)
        self.sizes = {name: fact.size for name, fact in facts.items()}
        self.pictures = open_pictures(config.data)
        self.sides = crop_sides(self.partition, self.sizes)
        card = make_card(config, facts, self.pictures)
        self.model = build(model_config(config, facts), config.seed, card, config.out.name)
        for name in set(every) - set(mine):
            del self.model.adaptors[name]
        self.model.to(device).train()
        beside = student_resolutions(config)
        self.windows = window_candidates(self.model, config, beside)
        check_student(self.model.student, beside, self.windows)
        taught = [t for t in config.teachers if t.name in mine]
        balancer = make_balancer(config.balance, taught, self.model.summary_dim).to(device)
        self.distiller = Distiller(self.model, config.teachers, config.loss, balancer)
        self.peers = find_peers(self.partition, group.rank)
        self.engine = Engine(self.distiller, group, self.peers, device, config)
        self.optimizer = make_optimizer(self.distiller, config.optim)
        self.meters, self.clock, self.broken = Meters(), Clock(), 0
        self.step = 0 if restart else self._resume()
        self.cache = self._open_cache() if self.step < config.steps else None
        self.overlaps = config.teachers_ahead and self.cache is None

    def train(self) -> Path:
        """Run to the last step; the path of `ckpt.pt`.

        Raises:
            RadioError: the loss is no longer finite, or too many pictures are broken.
        """
        config = self.config
        if self.step == config.steps:
            return config.out / "ckpt.pt"
        if self.group.leads and not self.step:  # the state of an earlier run must not outlive its log
            (config.out / "state.pt").unlink(missing_ok=True)
        log = JsonLines(config.out / "metrics.jsonl", self.step) if self.group.leads else None
        if self.group.leads:
            write_yaml(config, config.out / "config.yaml")
        try:
            with half_the_threads() if self.overlaps and self.device.type == "cpu" else nullcontext():
                self._loop(log)
        finally:
            if log is not None:
                log.close()
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
                if self._due(config.save_every):
                    self.save()

    def batches(self) -> Iterator[Batch]:
        """The batches of the steps still to do, with the teachers' features."""
        crops = GroupedCrops(self.pictures, self.config, self.partition, self.sides)
        dataset = crops if self.cache is None else self.cache
        rows = load(dataset, self.config, self.partition, self.group.rank, self.step, self.device)
        if self.cache is None:
            return taught(rows, self.mine, self.device, self._teach)
        return remembered(rows, self.mine, self.device, self.cache.targets)

    def advance(self, batch: Batch) -> None:
        """One step: forwards, losses, backwards, update. Reads nothing back from the device."""
        config, step = self.config, self.step
        found = self.learn(batch)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate(step, config.steps, config.optim)
        fine = self.optimizer.guard(found.norm, config.optim.clip)
        self.optimizer.step()
        self.distiller.settle(self.engine.mean)
        self.meters.add({"loss": found.total, "grad_norm": found.norm}, fine)
        for losses in found.losses:
            self.meters.add(losses.parts, fine)
            if losses.details:
                self.meters.add(losses.details, fine)
        self.clock.step(batch.waited)
        self.broken += batch.broken

    def learn(self, batch: Batch) -> Learned:
        """Leave the gradients of the whole step in the weights of this rank."""
        config, step = self.config, self.step
        self.optimizer.zero_grad(set_to_none=True)
        detail = (step + 1) % config.log_every == 0 or step + 1 == config.steps
        parts = [
            part
            for lesson in batch.lessons
            for part in in_parts(lesson, self._drawn(lesson.group), config.accumulate)
        ]
        found, total = [], torch.zeros((), device=self.device)
        for place, (lesson, drawn) in enumerate(parts, start=1):
            window = draw_window(self.windows[lesson.group.side], config.seed, step)
            with self.engine.turn(last=place == len(parts)):
                with self._autocast():
                    losses = self.distiller(self.engine.encode, lesson, drawn, window, detail)
                loss = losses.total * (self.engine.scale / config.accumulate)
                loss.backward()
            total += loss.detach()
            found.append(losses)
        return Learned(total, self.engine.settle(total), found)

    def record(self) -> Record:
        """The means since the last log step.

        Raises:
            RadioError: loss or gradient is not finite, or too many pictures are broken; what was saved stays.
        """
        config = self.config
        lap = self.clock.read()
        means = self.meters.read(self.group)
        self._check_finite(math.isfinite(means["loss"]) and math.isfinite(means["grad_norm"]))
        seen, broken = self.step * self.partition.batch_size, self._all_broken()
        check_broken(broken, seen, config.data)
        return {
            "step": self.step,
            "samples": seen,
            **means,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": lap.steps * self.partition.batch_size / lap.seconds,
            "data_wait": lap.waiting / lap.seconds,
            "seconds": lap.seconds,
            "broken": broken,
        }

    def save(self) -> None:
        """Write `ckpt.pt` to evaluate and `state.pt` to go on from, each atomically; every rank calls it.

        The state comes last: a run that is stopped between the two does its last steps again.

        Raises:
            RadioError: a loss since the last log step is not finite.
        """
        tensors = gather_weights(self.model, self.group, self.peers)
        meters = {"meters": self.meters.state(), "broken": self._all_broken()}
        if not self.group.leads:
            return
        self.model.card["provenance"] = provenance(self.step, self.step * self.partition.batch_size)
        self.model.save(self.config.out / "ckpt.pt", tensors)
        state = self.config.out / "state.pt"
        save_state(state, self.distiller, self.optimizer, self.step, self._settings(), meters)

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise RadioError(
                f"step {self.step}: the loss or its gradient is not finite; what was saved last stands. "
                f"Lower --optim.lr and begin anew with --restart"
            )

    def _all_broken(self) -> int:
        return int(self.group.sum(torch.tensor(self.broken)))

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _resume(self) -> int:
        path = self.config.out / "state.pt"
        if not path.is_file():
            return 0
        step, extra = load_state(path, self.distiller, self.optimizer, self._settings())
        self.meters.restore(extra["meters"], self.device)
        self.broken = int(extra["broken"]) if self.group.leads else 0
        return step

    def _settings(self) -> str:
        """Everything that decides the weights, so that no other run takes up this one's state."""
        plain = to_plain(self.config)
        for name in (
            "recipe",
            "out",
            "device",
            "log_every",
            "save_every",
            "score",
            "compile",
            "teachers_ahead",
            "partition",
            "split",
            "engine",
            "accumulate",
        ):
            plain.pop(name)
        for name in ("workers", "max_broken"):
            plain["data"].pop(name)
        plain["cache"].pop("confirm")
        return json.dumps({**plain, "pictures": self.pictures.fingerprint}, sort_keys=True)

    def _drawn(self, group: TeacherGroup) -> Tensor | None:
        """This rank's share of what the student draws for all pictures of the step."""
        drawn = self.model.draw(
            self.partition.batch_size, generator(self.config.seed, "positions", self.step)
        )
        if drawn is None:
            return None
        rows = self.partition.rows(group, self.group.rank)
        return drawn[rows.start : rows.stop].to(self.device)

    def _teach(self, group: TeacherGroup, images: Tensor) -> dict[str, Features]:
        """What a group's teachers say of its pictures."""
        with self._autocast():
            return teacher_features(
                {name: self.teachers[name] for name in group.teachers}, self.sizes, images
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        half = is_half(self.config, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def _open_cache(self) -> FeatureCache | None:
        """The teacher cache of this run, written by the first rank; None when the teachers run online."""
        config, options = self.config, self.config.cache
        if options.folder is None:
            return None
        count = min(options.pictures or len(self.pictures), len(self.pictures))
        crops = FixedCrops(
            RandomCrops(self.pictures, config.data, max(self.sides), config.seed), count, options.crops
        )
        if not self.group.leads:
            self.group.barrier()
        with ProgressConsole(self.console, "teacher cache", len(crops), 0) as bar:
            cache = write_cache(
                options.folder,
                self.teachers,
                self.sizes,
                crops,
                config.seed,
                device=self.device,
                workers=config.data.workers,
                confirm=self._confirm,
                progress=bar.advance,
            )
        if self.group.leads:
            self.group.barrier()
        return cache

    def _confirm(self, size: int) -> None:
        line = f"teacher cache: {size / 1e9:.2f} GB in {self.config.cache.folder}"
        self.console.print(line, highlight=False, soft_wrap=True)
        if size <= 1e9 or not self.config.cache.confirm:
            return
        if not self.console.is_terminal:
            raise RadioError(
                f"a teacher cache of {size / 1e9:.1f} GB would be written; agree with --cache.no-confirm"
            )
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
