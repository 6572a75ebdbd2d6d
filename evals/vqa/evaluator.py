"""Visual question answering: LLaVA-1.5's recipe on any frozen backbone, scored on four benchmarks."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from evals.core.evaluator import domain_notes, machine_settings
from evals.core.report import DataUsed, Metric, Report, Table, file_name, write
from radio.chunks import Damage, default_cache
from radio.config import check, to_plain
from radio.dist import Group, current
from radio.errors import ConfigError
from radio.progress import ProgressFactory, no_progress
from radio.provenance import choose_device, commit, describe_device, versions
from radio.types import Backbone

from .exams import Answers, Marked, data_used, mark, metrics, open_exams, records_of, tables
from .library import load_library, require_peft
from .presets import choose, choose_size, language_name
from .settings import VqaSettings
from .tasks import TaskData, open_task, read_predictions

if TYPE_CHECKING:
    from .course import Course, Done, Material


class _Outcome(NamedTuple):
    """The trained stages and the answers of a run."""

    course: Course
    done: dict[str, Done]
    marked: list[Marked]
    unmarked: list[tuple[TaskData, Answers]]  # benchmarks whose right answers are not public
    seconds: dict[str, float]
    notes: tuple[str, ...]


@final
class VqaEvaluator:
    """Scores any backbone by a LLaVA-1.5 that is trained on its patch tokens."""

    name = "vqa"
    settings = VqaSettings

    def with_seed(self, settings: VqaSettings, number: int) -> VqaSettings:
        """Return the same protocol with other initial weights and another order of samples."""
        return replace(settings, training_seed=settings.train_seed + number)

    def run(
        self,
        model: Backbone,
        settings: VqaSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
        group: Group | None = None,
    ) -> Report:
        """Score `model`; writes `vqa-NAME.json` and `vqa-NAME-TASK.jsonl` for each benchmark into `out`.

        Every rank of a torchrun job calls this and gets the same report; rank 0 writes. A killed run that is
        started again resumes at the last saved step, or at the first chunk of questions without answers.

        Raises:
            ConfigError: settings that contradict each other, or a stage neither requested nor trained before.
            DataError: data that are absent, or a record or image that cannot be used.
            CheckpointError: a language model that cannot be read, or a damaged state.
            MissingExtraError: transformers, accelerate or peft is not installed.
            MissingWeightsError: the package of `smollm2` is not installed.
            RadioError: values that are not finite.
        """
        load_library()  # fail early if it is not installed
        if settings.lora_rank is not None:
            require_peft()
        if settings.predictions is not None:
            raise ConfigError("--predictions takes answers from a file; name no model")
        group = group or current()
        started = time.monotonic()
        outcome = _run(model, settings, group, watch)
        label = name or model.name
        base = file_name(self.name, label)
        report = _report(
            settings,
            label,
            model.fingerprint,
            metrics=metrics(outcome.marked, settings.seed) | _losses(outcome.done),
            primary_metric="accuracy" if outcome.marked else f"{list(outcome.done)[-1]}_loss",
            resolved=_resolved(outcome, settings, group),
            data=_data(outcome),
            device=describe_device(outcome.course.device),
            seconds={**outcome.seconds, "total": time.monotonic() - started},
            notes=(
                *outcome.notes,
                *outcome.course.encoder.damage.notes(group),
                *domain_notes(model, _sources(outcome)),
            ),
            found=tables(outcome.marked),
            files=(
                *(f"{base}-{one.data.task}.jsonl" for one in outcome.marked),
                *(f"{base}-{data.task}-submission.json" for data, _ in outcome.unmarked),
            ),
        )
        if group.leads:
            records = {out / f"{base}-{one.data.task}.jsonl": records_of(one) for one in outcome.marked}
            for data, answers in outcome.unmarked:
                data.write_submission(answers.seen, out / f"{base}-{data.task}-submission.json")
            write(report, out / f"{base}.json", records)
        return report

    def run_without_model(self, settings: VqaSettings, out: Path) -> Report | None:
        """Score the file of `--predictions`; return None without one.

        Raises:
            DataError: files that are absent or damaged, or predictions that do not fit the questions.
        """
        if settings.predictions is None:
            return None
        files, task = settings.files, settings.task
        assert files is not None and task is not None, "checked by the settings"
        data = open_task(task, files, rule=settings.answer_normalization, limit=settings.limit)
        marked = mark(data, Answers(read_predictions(settings.predictions)), settings.allow_missing)
        label = settings.predictions.stem
        base = file_name(self.name, label)
        found = metrics([marked], settings.seed)
        report = _report(
            settings,
            label,
            fingerprint="",
            metrics=found,
            primary_metric="accuracy",
            resolved={"split": data.split},
            data=(data_used(data),),
            device="none: a file of predictions was scored",
            seconds={"total": 0.0},
            notes=_missing([marked]),
            found=tables([marked]),
            files=(f"{base}-{task}.jsonl",),
        )
        write(report, out / f"{base}.json", {out / report.files[0]: records_of(marked)})
        return report


def _run(model: Backbone, settings: VqaSettings, group: Group, watch: ProgressFactory) -> _Outcome:
    from .course import Course, open_material
    from .encoding import Encoder
    from .language import TinyShape, open_language

    check(settings)
    cache, device = settings.cache or default_cache(), choose_device(settings.device)
    damage = Damage()
    name, preset = choose(settings)
    size, notes = choose_size(model, settings, preset)
    wanted, shape = language_name(settings, name), TinyShape()
    # a pretrained one is opened before the data are written; the tiny one is made from their words
    opened = None if wanted == "tiny" else open_language(wanted, (), shape, settings.train_seed)
    exams: list[TaskData] = []
    if "score" in settings.stages:
        exams = open_exams(settings, (settings.scenes or preset.scenes)[1], cache, group, damage)
    material = open_material(settings, preset, cache, group, damage)
    prepared = time.monotonic()
    encoder = Encoder(
        model=model,
        size=size,
        device=device,
        dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        cache=cache,
        token_cache_gb=settings.token_cache_gb,
        workers=_workers(settings, device),
        group=group,
        watch=watch,
        damage=damage,
        image_tokens=settings.image_tokens,
    )
    records = [record for one in material.values() for record in one.records]
    course = Course(
        settings=settings,
        preset=preset,
        encoder=encoder,
        language=opened or open_language(wanted, records, shape, settings.train_seed),
        material=material,
        num_tokens=encoder.grid[0] * encoder.grid[1],
        layer_norm=preset.layer_norm if settings.layer_norm is None else settings.layer_norm,
        folder=cache / "vqa" / "stages",
        device=device,
        group=group,
        watch=watch,
    )
    course.check_room()
    done, weights, key = course.run()
    trained = time.monotonic()
    said = _examine(course, weights, key, exams) if exams or settings.save else []
    marked = [mark(data, answers, settings.allow_missing) for data, answers in said if data.has_answers]
    unmarked = [(data, answers) for data, answers in said if not data.has_answers]
    seconds = {"training": trained - prepared, "answers": time.monotonic() - trained}
    left_out = [note for name, one in material.items() if name in done for note in one.notes]
    notes = (*notes, *left_out, *_missing(marked), *_blindness(marked, material))
    return _Outcome(course, done, marked, unmarked, seconds, notes)


def _examine(
    course: Course, weights: Any, key: str, exams: Sequence[TaskData]
) -> list[tuple[TaskData, Answers]]:
    """Answer every question, and save the model if requested."""
    from .asking import ask_all
    from .llava import save_llava

    settings = course.settings
    model = course.build(weights)
    said = [(data, ask_all(course, model, key, data)) for data in exams]
    if settings.save is not None and course.group.leads:
        save_llava(model, course.language, settings.save)
    return said


def _workers(settings: VqaSettings, device: torch.device) -> int:
    if settings.workers is not None:
        return settings.workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _losses(done: dict[str, Done]) -> dict[str, Metric]:
    return {
        f"{name}_loss": Metric(value=stage.final_loss, higher_is_better=False, unit="nats")
        for name, stage in done.items()
    }


def _resolved(outcome: _Outcome, settings: VqaSettings, group: Group) -> dict[str, Any]:
    course = outcome.course
    return {
        "preset": choose(settings)[0],
        "size": list(course.encoder.size),
        "grid": list(course.encoder.grid),
        "layer_norm": course.layer_norm,
        "language_model": course.language.name,
        "language_fingerprint": course.language.fingerprint,
        "stages": {name: to_plain(stage.plan.describe()) for name, stage in outcome.done.items()},
        "new_tokens": course.preset.new_tokens,
        "template": "vicuna_v1",
        "decoding": "greedy",
        "precision": course.numbers,
        "ranks": group.world,
    }


def _data(outcome: _Outcome) -> tuple[DataUsed, ...]:
    rows = [
        DataUsed(
            role=role,
            name=material.name,
            fingerprint=material.fingerprint,
            count=len(material.records),
            num_classes=0,
        )
        for role, material in outcome.course.material.items()
        if role in outcome.done
    ]
    asked = [*(one.data for one in outcome.marked), *(data for data, _ in outcome.unmarked)]
    return (*rows, *(data_used(data) for data in asked))


def _sources(outcome: _Outcome) -> list[Any]:
    found = [material.source for material in outcome.course.material.values()]
    return [source for source in found if source is not None]


def _missing(marked: Sequence[Marked]) -> tuple[str, ...]:
    return tuple(
        f"{len(one.scores.missing)} of {len(one.scores.ids)} questions of {one.data.task} have no "
        f"prediction and count as wrong"
        for one in marked
        if one.scores.missing
    )


def _blindness(marked: Sequence[Marked], material: dict[str, Material]) -> tuple[str, ...]:
    """Return a note if the blind baseline is meaningless."""
    instruct = material["instruct"].records
    if all(one.blind is None for one in marked) or any(record.image is None for record in instruct):
        return ()
    note = (
        "the blind answers mean nothing: each training conversation had an image, so that the model never "
        "learned to answer without one"
    )
    return (note,)


def _report(
    settings: VqaSettings,
    label: str,
    fingerprint: str,
    *,
    metrics: dict[str, Metric],
    primary_metric: str,
    resolved: dict[str, Any],
    data: tuple[DataUsed, ...],
    device: str,
    seconds: dict[str, float],
    notes: tuple[str, ...],
    found: dict[str, Table],
    files: tuple[str, ...],
) -> Report:
    used = ("transformers", "accelerate", "tokenizers") if fingerprint else ()
    return Report(
        task=VqaEvaluator.name,
        model=label,
        fingerprint=fingerprint,
        primary_metric=primary_metric,
        metrics=metrics,
        settings={**to_plain(settings), "resolved": resolved},
        data=data,
        device=device,
        seconds=seconds,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine_settings=machine_settings(settings),
        versions={**versions(), **{name: version(name) for name in used}},
        git=commit(),
        notes=notes,
        tables=found,
        files=files,
    )
