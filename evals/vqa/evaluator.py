"""Visual question answering: LLaVA-1.5's recipe on any frozen backbone, scored on four benchmarks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from evals.core.blocks import Table
from evals.core.evaluator import domain_notes, machine_settings
from evals.core.report import DatasetInfo, Metric, Report, file_name, write
from radio.chunks import Damage, default_cache
from radio.config import check, to_plain
from radio.data import ImageSource
from radio.dist import Group, current
from radio.errors import ConfigError, DataError
from radio.image_files import spread
from radio.progress import ProgressFactory, no_progress
from radio.provenance import choose_device, commit, describe_device, versions
from radio.types import Backbone

from .benchmarks import open_benchmark, read_predictions
from .data import NamedImages, fingerprint, read_records
from .language import LanguageModel, TinyShape, load_library, open_language
from .scenes import benchmarks, describe_questions, describe_training, load_scenes, training_images
from .scenes import training_records as generated_records
from .scoring import TASKS, Benchmark, Scores, mean_accuracy
from .settings import Preset, VqaSettings, choose_preset, choose_size, language_name

if TYPE_CHECKING:
    from .llava import Encoder
    from .training import Trained, TrainingData

_ANSWERS_FORMAT = "am-radio-vqa-answers/2"


class Answered(NamedTuple):
    """A benchmark with its answers by question id, and their scores where the right answers are public."""

    benchmark: Benchmark
    answers: Mapping[str, str]
    blind: Mapping[str, str] | None  # answers without the images
    scores: Scores | None
    blind_scores: Scores | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the report says about a run."""

    answered: list[Answered]
    losses: dict[str, float] = field(default_factory=dict)  # final loss of each stage
    resolved: dict[str, Any] = field(default_factory=dict)
    data: Sequence[DatasetInfo] = ()  # of the training
    notes: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    device: str = "none: a file of predictions was scored"
    fingerprint: str = ""  # of the model


@final
class VqaEvaluator:
    """Score any backbone by a LLaVA-1.5 that is trained on its patch tokens."""

    name = "vqa"
    expensive = True  # it trains a language model
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
        started again continues from the last checkpoint, or with the first questions without answers.

        Raises:
            ConfigError: settings that contradict each other, or a stage neither requested nor trained before.
            DataError: data that are absent, or a record or image that cannot be used.
            CheckpointError: a language model that cannot be read.
            MissingExtraError: transformers, accelerate or peft is not installed.
            MissingWeightsError: the package of `smollm2` is not installed.
            RadioError: values that are not finite.
        """
        load_library(with_peft=settings.lora_rank is not None)  # fail early if it is not installed
        if settings.predictions is not None:
            raise ConfigError("--predictions takes answers from a file; name no model")
        group = group or current()
        outcome = evaluate(model, settings, group, watch)
        return write_report(outcome, settings, name or model.name, out, group)

    def run_without_model(self, settings: VqaSettings, out: Path) -> Report | None:
        """Score the file of `--predictions`; return None without one.

        Raises:
            DataError: files that are absent or damaged, or predictions that do not fit the questions.
        """
        if settings.predictions is None:
            return None
        (benchmark,) = _named_benchmarks(settings)
        answered = score(benchmark, read_predictions(settings.predictions), None, settings.allow_missing)
        assert answered.scores is not None, "or `score` has raised"
        outcome = Outcome(
            answered=[answered], resolved={"split": benchmark.split}, notes=_missing([answered])
        )
        return write_report(outcome, settings, settings.predictions.stem, out, Group())


def evaluate(model: Backbone, settings: VqaSettings, group: Group, progress: ProgressFactory) -> Outcome:
    """Train LLaVA on the model's tokens, and answer and score the benchmarks' questions."""
    from .llava import Encoder, save_llava
    from .training import LlavaTraining

    check(settings)
    started = time.monotonic()
    cache, device = settings.cache or default_cache(), choose_device(settings.device)
    damage = Damage()
    preset_name, preset = choose_preset(settings)
    size, size_notes = choose_size(model, settings, preset)
    language_choice, shape = language_name(settings, preset_name), TinyShape()
    # A pretrained one is opened before the data are made; the tiny one is made from their words.
    language: LanguageModel | None = None
    if language_choice != "tiny":
        language = open_language(language_choice, (), shape, settings.train_seed)
    opened = _open_benchmarks(settings, preset, cache, group, damage) if "score" in settings.stages else []
    data = _open_data(settings, preset, cache, group, damage)
    workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    encoder = Encoder(
        model=model,
        size=size,
        device=device,
        dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        cache=cache,
        token_cache_gb=settings.token_cache_gb,
        workers=workers if settings.workers is None else settings.workers,
        group=group,
        watch=progress,
        damage=damage,
        image_tokens=settings.image_tokens,
    )
    records = [record for stage in data.values() for record in stage.records]
    training = LlavaTraining(
        settings=settings,
        preset=preset,
        encoder=encoder,
        language=language or open_language(language_choice, records, shape, settings.train_seed),
        data=data,
        layer_norm=preset.layer_norm if settings.layer_norm is None else settings.layer_norm,
        folder=cache / "vqa" / "stages",
        group=group,
        progress=progress,
        damage=damage,
    )
    training.check_room()
    prepared = time.monotonic()
    trained = training.run()
    finished = time.monotonic()
    answered = [
        _answer(benchmark, trained, training.language, encoder, settings, preset) for benchmark in opened
    ]
    if settings.save is not None and group.leads:
        save_llava(trained.model, training.language, settings.save)
    used = {name: stage for name, stage in data.items() if name in trained.stages}
    scored = [one for one in answered if one.scores is not None]
    sources = {stage.source.location: stage.source for stage in data.values() if stage.source is not None}
    return Outcome(
        answered=answered,
        losses={name: stage.final_loss for name, stage in trained.stages.items()},
        resolved={
            "preset": preset_name,
            "size": list(encoder.size),
            "grid": list(encoder.grid),
            "layer_norm": training.layer_norm,
            "language_model": training.language.name,
            "language_fingerprint": training.language.fingerprint,
            "stages": {name: to_plain(stage.plan.describe()) for name, stage in trained.stages.items()},
            "new_tokens": preset.new_tokens,
            "template": "vicuna_v1",
            "decoding": "greedy",
            "precision": training.precision,
            "ranks": group.world,
        },
        data=[
            DatasetInfo(
                role=role,
                name=stage.name,
                fingerprint=stage.fingerprint,
                count=len(stage.records),
                num_classes=0,
            )
            for role, stage in used.items()
        ],
        notes=(
            *size_notes,
            *(note for stage in used.values() for note in stage.notes),
            *_missing(scored),
            *_meaningless_blind(scored, data),
            *damage.notes(group),
            *domain_notes(model, sources.values()),
        ),
        seconds={
            "training": finished - prepared,
            "answers": time.monotonic() - finished,
            "total": time.monotonic() - started,
        },
        device=describe_device(device),
        fingerprint=model.fingerprint,
    )


def _named_benchmarks(settings: VqaSettings) -> list[Benchmark]:
    """Open the benchmark whose files the settings name, if they name any."""
    if settings.files is None:
        return []
    assert settings.task is not None, "checked by the settings"
    rule, limit = settings.answer_normalization, settings.limit
    return [open_benchmark(settings.task, settings.files, rule=rule, limit=limit)]


def _open_benchmarks(
    settings: VqaSettings, preset: Preset, cache: Path, group: Group, damage: Damage
) -> list[Benchmark]:
    """Open the benchmarks that the settings name: one in its own files, or those of the generated world.

    Raises:
        ConfigError: the model is trained on other data than the generated world, and no benchmark is named.
        DataError: files that are absent or not the benchmark's, or absent images.
    """
    opened = _named_benchmarks(settings)
    if not opened:
        if settings.instruct_data is not None:
            raise ConfigError(
                "--stages has score and no benchmark was named; give --task with --questions and --images, "
                "or leave score out"
            )
        count, seed = (settings.scenes or preset.scenes)[1], settings.seed
        describe = partial(describe_questions, seed=seed)
        scenes = load_scenes("val", count, seed, describe, cache=cache, group=group, damage=damage)
        tasks = TASKS if settings.task is None else (settings.task,)
        opened = benchmarks(scenes, tasks, rule=settings.answer_normalization, limit=settings.limit)
    for benchmark in opened:
        benchmark.check()
    return opened


def _open_data(
    settings: VqaSettings, preset: Preset, cache: Path, group: Group, damage: Damage
) -> dict[str, TrainingData]:
    """Load the data of both stages and check every record.

    Raises:
        DataError: a file that is absent, or a record that cannot be used.
    """
    from .training import TrainingData, digest

    def pack(
        records: list[Any], source: ImageSource | None, name: str, notes: tuple[str, ...]
    ) -> TrainingData:
        content = "no images" if source is None else source.fingerprint
        return TrainingData(records, source, name, digest(fingerprint(records), content), notes)

    data = {}
    if settings.pretrain_data is None or settings.instruct_data is None:
        count, seed = (settings.scenes or preset.scenes)[0], settings.seed
        describe = partial(describe_training, seed=seed)
        scenes = load_scenes("train", count, seed, describe, cache=cache, group=group, damage=damage)
        for stage, all_records in generated_records(scenes).items():
            records = list(spread(all_records, settings.limit))
            data[stage] = pack(records, training_images(scenes, records), f"scenes:{scenes.split}", ())
        return data
    for stage, file, folder in (
        ("pretrain", settings.pretrain_data, settings.pretrain_images),
        ("instruct", settings.instruct_data, settings.instruct_images),
    ):
        images = NamedImages(folder) if folder is not None else None
        is_image = images.__contains__ if images is not None else lambda _: False
        records, notes = read_records(file, is_image, settings.limit, settings.max_error_fraction)
        names = {record.image for record in records if record.image is not None}
        source = images.source(names, cache / "fingerprints") if images is not None and names else None
        data[stage] = pack(records, source, file.name, notes)
    blank = [record.id for record in data["pretrain"].records if record.image is None]
    if blank:
        raise DataError(
            f"{settings.pretrain_data}: {len(blank)} records have no image, the first has the id {blank[0]}; "
            f"the projector learns from images only, remove them"
        )
    return data


def _answer(
    benchmark: Benchmark,
    trained: Trained,
    language: LanguageModel,
    encoder: Encoder,
    settings: VqaSettings,
    preset: Preset,
) -> Answered:
    """Answer all questions of a benchmark, with the images and blind; score them where that is possible.

    Raises:
        DataError: an image that cannot be read, or ranks that do not share the cache.
    """
    from .generation import Generator, answer_all, make_prompt
    from .training import digest

    source: ImageSource | None = None
    names = {question.image for question in benchmark.questions if question.image is not None}
    if names:
        images = benchmark.images
        assert images is not None, "checked when it was opened"
        memo = encoder.cache / "fingerprints"
        source = NamedImages(images).source(names, memo) if isinstance(images, Path) else images
    generator = Generator(
        model=trained.model.to(encoder.device),
        language=language,
        inputs=encoder.encode(source, preset.instruct.view) if source is not None else None,
        device=encoder.device,
        new_tokens=preset.new_tokens,
        batch=settings.answer_batch or preset.answer_batch,
        bf16=settings.precision == "bf16",
    )
    is_blind_too = preset.blind if settings.blind is None else settings.blind
    answers = []
    for blind in (False, True) if is_blind_too else (False,):
        prompts = [make_prompt(question, blind=blind) for question in benchmark.questions]
        content = source.fingerprint if source is not None else ""
        key = digest(_ANSWERS_FORMAT, trained.key, content, preset.new_tokens, blind, prompts)
        answers.append(
            answer_all(
                prompts,
                generator,
                encoder.cache / "vqa" / "answers" / key,
                title=f"{benchmark.task}{' blind' if blind else ''} {encoder.model.name}",
                group=encoder.group,
                progress=encoder.watch,
                damage=encoder.damage,
            )
        )
    if not benchmark.has_answers:
        return Answered(benchmark, answers[0], None, None, None)
    return score(benchmark, answers[0], answers[1] if is_blind_too else None, settings.allow_missing)


def score(
    benchmark: Benchmark, answers: Mapping[str, str], blind: Mapping[str, str] | None, allow_missing: bool
) -> Answered:
    """Score the answers, and those without the images if there are any.

    Raises:
        DataError: questions without an answer, or answers to other questions.
    """
    blind_scores = None if blind is None else benchmark.score(blind, allow_missing)
    return Answered(benchmark, answers, blind, benchmark.score(answers, allow_missing), blind_scores)


def metrics(answered: Iterable[Answered], seed: int) -> dict[str, Metric]:
    """Compute the accuracies: the mean, each benchmark, both without images, then each kind of question.

    The means are `accuracy` and `blind_accuracy`; intervals are bootstraps over images.
    """
    answered = list(answered)
    accuracies: dict[str, Metric] = {}
    kinds: dict[str, Metric] = {}
    for prefix, all_scores in (
        ("", {one.benchmark.task: one.scores for one in answered}),
        ("blind_", {one.benchmark.task: one.blind_scores for one in answered}),
    ):
        scores = {task: one for task, one in all_scores.items() if one is not None}
        if scores:
            accuracies[f"{prefix}accuracy"] = mean_accuracy(list(scores.values()), seed)
        for task, of_task in scores.items():
            values = of_task.metrics(seed)
            accuracies[f"{prefix}{task}"] = values.pop("accuracy")
            if not prefix:
                kinds |= {f"{task}_{name}": metric for name, metric in values.items()}
    return accuracies | kinds


def records_of(one: Answered) -> str:
    """Return one JSON line per question with answer, right answer and score, which can be scored again."""
    assert one.scores is not None
    lines = []
    for question, value in zip(one.benchmark.questions, one.scores.values, strict=True):
        record = {
            "question_id": question.id,
            "image": question.image,
            "question": question.text,
            "answer": one.answers.get(question.id, ""),
            "expected": question.expected,
            "score": value,
        }
        if one.blind is not None:
            record["blind"] = one.blind.get(question.id, "")
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _missing(answered: Sequence[Answered]) -> list[str]:
    return [
        f"{len(one.scores.missing)} of {len(one.scores.ids)} questions of {one.benchmark.task} have no "
        f"prediction and count as wrong"
        for one in answered
        if one.scores is not None and one.scores.missing
    ]


def _meaningless_blind(answered: Sequence[Answered], data: Mapping[str, TrainingData]) -> list[str]:
    """Return a note if the blind baseline is meaningless."""
    has_text_only = any(record.image is None for record in data["instruct"].records)
    if has_text_only or all(one.blind is None for one in answered):
        return []
    note = (
        "the blind answers mean nothing: each training conversation had an image, so that the model never "
        "learned to answer without one"
    )
    return [note]


def write_report(outcome: Outcome, settings: VqaSettings, label: str, out: Path, group: Group) -> Report:
    """Assemble the report; on the leader, write it, the records and any submission into `out`."""
    base = file_name(VqaEvaluator.name, label)
    scored = [one for one in outcome.answered if one.scores is not None]
    unscored = [one for one in outcome.answered if one.scores is None]
    losses = {
        f"{name}_loss": Metric(value=loss, higher_is_better=False, unit="nats")
        for name, loss in outcome.losses.items()
    }
    tables: dict[str, Table] = {}
    for one in scored:
        assert one.scores is not None
        tables |= {f"{one.benchmark.task}_{name}": table for name, table in one.scores.tables().items()}
    libraries = ("transformers", "accelerate", "tokenizers") if outcome.fingerprint else ()
    records = {out / f"{base}-{one.benchmark.task}.jsonl": one for one in scored}
    submissions = {out / f"{base}-{one.benchmark.task}-submission.json": one for one in unscored}
    report = Report(
        task=VqaEvaluator.name,
        model=label,
        fingerprint=outcome.fingerprint,
        primary_metric="accuracy" if scored else list(losses)[-1],
        metrics=metrics(scored, settings.seed) | losses,
        settings={**to_plain(settings), "resolved": outcome.resolved},
        data=(*outcome.data, *(one.benchmark.data_used() for one in (*scored, *unscored))),
        device=outcome.device,
        seconds=outcome.seconds or {"total": 0.0},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine_settings=machine_settings(settings),
        versions={**versions(), **{name: version(name) for name in libraries}},
        git=commit(),
        notes=tuple(outcome.notes),
        tables=tables,
        files=tuple(path.name for path in (*records, *submissions)),
    )
    if group.leads:
        for path, one in submissions.items():
            one.benchmark.write_submission(one.answers, path)
        write(report, out / f"{base}.json", {path: records_of(one) for path, one in records.items()})
    return report
