"""Visual question answering: LLaVA-1.5's recipe on any frozen backbone, scored on its benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from evals.core.blocks import Bars, Block, Example, Examples, Image
from evals.core.evaluator import EvalRun, Result
from evals.core.report import Metric, Record
from radio.chunks import DamagedError, cached_chunks, chunk_path, write_records
from radio.chunks import read_records as read_chunk
from radio.config import to_plain
from radio.data import ImageSource
from radio.errors import ConfigError, DataError
from radio.image_files import spread
from radio.types import Backbone

from .benchmarks import open_benchmark
from .data import NamedImages, fingerprint, read_records
from .language import LanguageModel, TinyShape, load_library, open_language
from .records import read_predictions
from .scenes import benchmarks, describe_questions, describe_training, load_scenes, training_images
from .scenes import training_records as generated_records
from .scoring import TASKS, Benchmark, BenchmarkQuestion, Scores, mean_accuracy
from .settings import RULED, Preset, Task, VqaSettings, choose_preset, choose_size, language_name

if TYPE_CHECKING:
    from .llava import Generator, Prompt
    from .training import LlavaTraining, Trained, TrainingData

_ANSWERS_FORMAT = "am-radio-vqa-answers/2"
CHUNK = 128  # questions per file of answers: a killed run loses no more than these
_NUM_EXAMPLES = 3  # right answers, and wrong ones, that the page shows of a benchmark
_MAX_LETTERS = 240  # of a question on the page
_NOTHING_BLIND = (
    "the blind answers mean nothing: each training conversation had an image, so that the model never "
    "learned to answer without one"
)


class Answered(NamedTuple):
    """A benchmark with its answers by question id, and their scores where the right answers are public."""

    benchmark: Benchmark
    answers: Mapping[str, str]
    blind: Mapping[str, str] | None = None  # answers without the images
    scores: Scores | None = None
    blind_scores: Scores | None = None
    source: ImageSource | None = None  # of the images


def evaluate(model: Backbone, settings: VqaSettings, run: EvalRun) -> Result:
    """Train LLaVA on the model's tokens, and answer and score the benchmarks' questions.

    A killed run that is started again continues from the last checkpoint, or with the first questions without
    answers.

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
    from .llava import TokenEncoder, save_llava
    from .training import LlavaTraining

    preset_name, preset = choose_preset(settings)
    size, size_notes = choose_size(model, settings, preset)
    seed = run.settings.seed if settings.training_seed is None else settings.training_seed
    language_choice, shape = language_name(settings, preset_name), TinyShape()
    # A pretrained one is opened before the data are made; the tiny one is made from their words.
    language: LanguageModel | None = None
    if language_choice != "tiny":
        language = open_language(language_choice, (), shape, seed)
    opened = _open_benchmarks(settings, preset, run) if "score" in settings.stages else []
    data = _open_data(settings, preset, run)
    encoder = TokenEncoder(
        model=model,
        size=size,
        run=run,
        token_cache_gb=settings.token_cache_gb,
        image_tokens=settings.image_tokens,
        merges=settings.token_reduction == "merge",
    )
    records = [record for stage in data.values() for record in stage.records]
    first, normaliser = data["pretrain"].source, None
    if settings.normalise_features and first is not None:
        normaliser = encoder.fit_normaliser(first, preset.pretrain.view)
    training = LlavaTraining(
        settings=settings,
        preset=preset,
        encoder=encoder,
        language=language or open_language(language_choice, records, shape, seed),
        data=data,
        layer_norm=preset.layer_norm if settings.layer_norm is None else settings.layer_norm,
        seed=seed,
        run=run,
        normaliser=normaliser,
    )
    training.check_room()
    started = time.monotonic()
    trained = training.train()
    finished = time.monotonic()
    answered = [_answer(benchmark, trained, training, settings) for benchmark in opened]
    if settings.save is not None and run.ranks.leads:
        save_llava(trained.model, training.language, settings.save)
    has_blind = any(one.blind is not None for one in answered)
    has_text_only = any(record.image is None for record in data["instruct"].records)
    used = {name: stage for name, stage in data.items() if name in trained.stages}
    losses = {
        f"{name}_loss": Metric(value=stage.final_loss, higher_is_better=False, unit="nats")
        for name, stage in reversed(trained.stages.items())
    }
    result = _result(answered, run)
    return replace(
        result,
        metrics={**result.metrics, **losses},
        data=[*(stage.info(role) for role, stage in used.items()), *result.data],
        notes=[
            *size_notes,
            *(note for stage in used.values() for note in stage.notes),
            *result.notes,
            *([_NOTHING_BLIND] if has_blind and not has_text_only else []),
        ],
        resolved={
            "preset": preset_name,
            "size": list(encoder.size),
            "grid": list(encoder.grid),
            "image_tokens": encoder.num_tokens,
            "layer_norm": training.layer_norm,
            "normalised_features": normaliser is not None,
            "language_model": training.language.name,
            "language_fingerprint": training.language.fingerprint,
            "stages": {name: to_plain(stage.plan.describe()) for name, stage in trained.stages.items()},
            "new_tokens": preset.new_tokens,
            "template": "vicuna_v1",
            "decoding": "greedy",
        },
        seconds={"training": finished - started, "answers": time.monotonic() - finished},
    )


def score_predictions(settings: VqaSettings, run: EvalRun) -> Result:
    """Score the file of `--predictions`.

    Raises:
        DataError: files that are absent or damaged, or predictions that do not fit the questions.
    """
    assert settings.predictions is not None
    (benchmark,) = _named_benchmarks(settings, run)
    answers = read_predictions(settings.predictions, benchmark.task)
    scores = benchmark.score(answers, settings.allow_missing)
    result = _result([Answered(benchmark, answers, scores=scores)], run)
    return replace(result, resolved={"split": benchmark.split})


def _named_benchmarks(settings: VqaSettings, run: EvalRun) -> list[Benchmark]:
    """Open the benchmark whose files the settings name, or all of a data root; none without either."""
    rule, limit = settings.answer_normalization, run.settings.limit
    if settings.files is not None:
        assert settings.task is not None, "checked by the settings"
        return [open_benchmark(settings.task, settings.files, rule=rule, limit=limit)]
    return [
        open_benchmark(task, files, rule=rule if task in RULED else None, limit=limit)
        for task, files in settings.benchmarks.items()
    ]


def _open_benchmarks(settings: VqaSettings, preset: Preset, run: EvalRun) -> list[Benchmark]:
    """Open the benchmarks that the settings name: one in its own files, or those of the generated world."""
    opened = _named_benchmarks(settings, run)
    if not opened:
        if settings.instruct_data is not None:
            raise ConfigError(
                "--stages has score and no benchmark was named; give --task with --questions and --images, "
                "or a --data-root that has them, or leave score out"
            )
        scenes = load_scenes(run, "val", (settings.scenes or preset.scenes)[1], describe_questions)
        tasks = TASKS if settings.task is None else (settings.task,)
        rule, limit = settings.answer_normalization, run.settings.limit
        opened = benchmarks(scenes, tasks, rule=rule, limit=limit)
    for benchmark in opened:
        benchmark.check()
    return opened


def _open_data(settings: VqaSettings, preset: Preset, run: EvalRun) -> dict[str, TrainingData]:
    """Load the data of both stages and check every record."""
    from .training import TrainingData, digest

    def pack(records: list[Any], source: ImageSource | None, name: str, notes: tuple[str, ...]) -> Any:
        if source is not None:
            run.note_source(source)  # the leading rank hashes the images
            notes = (*notes, *source.notes)
        content = "no images" if source is None else source.fingerprint
        return TrainingData(records, source, name, digest(fingerprint(records), content), notes)

    data = {}
    if settings.pretrain_data is None or settings.instruct_data is None:
        scenes = load_scenes(run, "train", (settings.scenes or preset.scenes)[0], describe_training)
        for stage, all_records in generated_records(scenes).items():
            records = list(spread(all_records, run.settings.limit))
            data[stage] = pack(records, training_images(scenes, records), "scenes:train", ())
        return data
    for stage, file, folder in (
        ("pretrain", settings.pretrain_data, settings.pretrain_images),
        ("instruct", settings.instruct_data, settings.instruct_images),
    ):
        images = NamedImages(folder) if folder is not None else None
        is_image = images.__contains__ if images is not None else lambda _: False
        reading = read_records(file, is_image, run.settings.limit, settings.max_error_fraction)
        records = reading.records
        names = {record.image for record in records if record.image is not None}
        source = (
            images.source(names, run.fingerprints, run.progress) if images is not None and names else None
        )
        data[stage] = pack(records, source, file.name, reading.notes)
    blank = [record.id for record in data["pretrain"].records if record.image is None]
    if blank:
        raise DataError(
            f"{settings.pretrain_data}: {len(blank)} records have no image, the first has the id {blank[0]}; "
            f"the projector learns from images only, remove them"
        )
    return data


def _answer(
    benchmark: Benchmark, trained: Trained, training: LlavaTraining, settings: VqaSettings
) -> Answered:
    """Answer all questions of a benchmark, with the images and blind; score them where that is possible."""
    from .llava import Generator, make_prompt
    from .training import digest

    encoder, preset, run = training.encoder, training.preset, training.run
    source: ImageSource | None = None
    names = {question.image for question in benchmark.questions if question.image is not None}
    if names:
        images = benchmark.images
        assert images is not None, "checked when it was opened"
        source = images if not isinstance(images, Path) else _open_images(images, names, run)
    generator = Generator(
        model=trained.model.to(run.device),
        language=training.language,
        inputs=encoder.encode(source, preset.instruct.view) if source is not None else None,
        device=run.device,
        new_tokens=preset.new_tokens,
        batch=settings.answer_batch or preset.answer_batch,
        bf16=run.settings.precision == "bf16",
    )
    is_blind_too = preset.blind if settings.blind is None else settings.blind
    answers = []
    for blind in (False, True) if is_blind_too else (False,):
        prompts = [make_prompt(question, blind=blind) for question in benchmark.questions]
        content = source.fingerprint if source is not None else ""
        key = digest(_ANSWERS_FORMAT, trained.key, content, preset.new_tokens, blind, prompts)
        title = f"{benchmark.task}{' blind' if blind else ''} {encoder.model.name}"
        folder = run.cache / "vqa" / "answers" / key
        answers.append(answer_all(prompts, generator, folder, title=title, run=run))
    answered = Answered(benchmark, answers[0], source=source)
    if benchmark.has_answers:
        scores = [benchmark.score(of_mode, settings.allow_missing) for of_mode in answers]
        answered = answered._replace(scores=scores[0])
        if is_blind_too:
            answered = answered._replace(blind=answers[1], blind_scores=scores[1])
    return answered


def _open_images(path: Path, names: Iterable[str], run: EvalRun) -> ImageSource:
    """Open the named images; the leading rank hashes them."""
    source = NamedImages(path).source(names, run.fingerprints, run.progress)
    run.ranks.on_leader(lambda: source.fingerprint)
    run.notes += [note for note in source.notes if note not in run.notes]
    return source


class _Answer(TypedDict):
    question_id: str
    answer: str


_ANSWER = TypeAdapter(_Answer)


def answer_all(
    prompts: Sequence[Prompt], generator: Generator, folder: Path, *, title: str, run: EvalRun
) -> dict[str, str]:
    """Return every question's answer by its id, the same on every rank; chunks in the folder are reused.

    Raises:
        DataError: an image that cannot be read, or ranks that do not share the folder.
    """
    from .llava import limit_threads

    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]

    def read(path: Path) -> dict[str, str]:
        answers = {row["question_id"]: row["answer"] for row in read_chunk(path, _ANSWER)}
        if list(answers) != [prompt.id for prompt in chunks[int(path.stem)]]:
            raise DamagedError(f"{path}: holds answers to other questions")
        return answers

    def make(numbers: list[int]) -> None:
        with run.progress(title, sum(len(chunks[number]) for number in numbers)) as advance:
            for number in numbers:
                with limit_threads(generator.model, generator.device):
                    answers = generator.answer(chunks[number])
                pairs = zip(chunks[number], answers, strict=True)
                rows = [{"question_id": prompt.id, "answer": text} for prompt, text in pairs]
                write_records(chunk_path(folder, number, "jsonl"), rows)
                advance(len(answers))

    paths = cached_chunks(
        folder, len(chunks), read=read, make=make, ranks=run.ranks, damage=run.damage, ending="jsonl"
    )
    return {id: answer for path in paths for id, answer in read(path).items()}


def _result(answered: Sequence[Answered], run: EvalRun) -> Result:
    """Collect what answers say: accuracies, records, examples; write submissions where none are public."""
    scores = {one.benchmark.task: one.scores for one in answered if one.scores is not None}
    blind = {one.benchmark.task: one.blind_scores for one in answered if one.blind_scores is not None}
    seed = run.settings.seed
    metrics: dict[str, Metric] = {}
    kinds: dict[str, Metric] = {}
    for prefix, by_task in (("", scores), ("blind_", blind)):
        if by_task:
            metrics[f"{prefix}accuracy"] = mean_accuracy(list(by_task.values()), seed)
        for task, of_task in by_task.items():
            values = of_task.metrics(seed)
            metrics[f"{prefix}{task}"] = values.pop("f1" if of_task.positive else "accuracy")
            if not prefix:
                kinds |= {f"{task}_{name}": metric for name, metric in values.items()}
    primary = "pope" if list(scores) == ["pope"] else "accuracy"
    if scores:
        metrics = {primary: metrics[primary]} | metrics
    files = []
    for one in answered:
        if one.scores is None:
            files.append(f"{run.base}-{one.benchmark.task}-submission.json")
            if run.ranks.leads:
                one.benchmark.write_submission(one.answers, run.folder / files[-1])
    missing = [
        f"{len(of_task.missing)} of {len(of_task.values)} questions of {task} have no prediction and count "
        f"as wrong"
        for task, of_task in scores.items()
        if of_task.missing
    ]
    baselines = {"without the image": metrics[f"blind_{primary}"].value} if blind else {}
    blocks: list[Block] = [_bars(metrics, scores)] if scores else []
    blocks += [_examples(one, run) for one in answered if one.scores]
    for task, of_task in scores.items():
        blocks += of_task.tables(task)
    return Result(
        metrics=metrics | kinds,
        data=[one.benchmark.info() for one in answered],
        records=_records(answered),
        blocks=blocks,
        baselines=baselines,
        notes=missing,
        files=files,
    )


def _records(answered: Sequence[Answered]) -> Iterator[Record]:
    """Yield each question with its answer, right answer and score; an image's questions are one unit."""
    for one in answered:
        if one.scores is None:
            continue
        rows = zip(one.benchmark.questions, one.scores.values, one.scores.images, strict=True)
        for question, value, unit in rows:
            record: dict[str, Any] = {
                "id": question.id,
                "part": one.benchmark.task,
                "score": value,
                "unit": unit,
                "image": question.image,
                "question": question.text,
                "answer": one.answers.get(question.id, ""),
                "expected": question.expected,
            }
            if one.blind is not None:
                record["blind"] = one.blind.get(question.id, "")
            yield record


def _bars(metrics: Mapping[str, Metric], scores: Mapping[Task, Scores]) -> Bars:
    bars = {}
    for task, of_task in scores.items():
        label = f"{task} (F1)" if of_task.positive else task
        bars[label] = metrics[task]
        if f"blind_{task}" in metrics:
            bars[f"{label}, blind"] = metrics[f"blind_{task}"]
    return Bars(
        title="accuracy by benchmark",
        x_label="accuracy (%)",
        names=tuple(bars),
        values=tuple(metric.value for metric in bars.values()),
        low=tuple(metric.low for metric in bars.values()),
        high=tuple(metric.high for metric in bars.values()),
        caption="Accuracy on each benchmark; blind: the same questions without the image.",
    )


def _examples(one: Answered, run: EvalRun) -> Examples:
    """Show some right and some wrong answers, evenly spread over the questions."""
    assert one.scores is not None
    pairs = list(zip(one.benchmark.questions, one.scores.values, strict=True))
    right = [pair for pair in pairs if pair[1] >= 0.5]
    wrong = [pair for pair in pairs if pair[1] < 0.5]
    chosen = [*spread(right, _NUM_EXAMPLES), *spread(wrong, _NUM_EXAMPLES)]
    examples = tuple(_example(one, question, value, run) for question, value in chosen)
    return Examples(title=f"{one.benchmark.task}: answers right and wrong", examples=examples)


def _example(one: Answered, question: BenchmarkQuestion, value: float, run: EvalRun) -> Example:
    image: Image | None = None
    if one.source is not None and question.image is not None:
        pixels = one.source.read(one.source.keys.index(question.image))
        image = run.save_image(pixels, question.image, side=192, shown=96)
    text = question.text if len(question.text) <= _MAX_LETTERS else f"{question.text[:_MAX_LETTERS]}…"
    answer = one.answers.get(question.id) or "(nothing)"
    expected = f"expected: {question.expected}, worth {value:g}"
    lines = (text, f"answered: {answer}", expected, question.image or "")
    return Example(image=image, lines=lines, good=value >= 0.5)
