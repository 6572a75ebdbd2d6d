"""The generated world as LLaVA's training data and as the benchmarks, without any files of these.

The turns of one conversation never reveal an answer: a question that names the main object (about its
position) comes after the one about its colour or shape, and those two are never in one conversation. Some
conversations are without their image, so that the language model learns what can be guessed: a blind
baseline that had never seen such questions would be below chance.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from evals.core.evaluator import EvalRun
from radio.chunks import (
    TensorSpec,
    cached_chunks,
    chunk_path,
    read_tensors,
    write_tensors,
)
from radio.images import decode
from radio.scenes import CLASSES, COLOURS, SHAPES, Question, Scene, Split, questions, render

from . import scoring
from .benchmarks import choose, gqa_groups, scienceqa_groups, short, short_with_ocr
from .data import Record, Turn
from .scoring import (
    LETTERS,
    Benchmark,
    commonest,
    score_exact,
    score_letter,
    score_yes_no,
    vqa_accuracy,
)
from .settings import Rule, Task

# Letters: N scenes, S side in pixels.

_SIZE = 96
_CHUNK = 256  # scenes per file of the cache
_FORMAT = "am-radio-vqa-scenes/1"
_JPEG_QUALITY = 95  # of the benchmarks whose images are photographs


class Scenes(NamedTuple):
    """Rendered scenes of a split, and what is said about each."""

    split: Split
    seed: int
    frames: NDArray[np.uint8]  # [N, 3, S, S]
    facts: list[Any]


def load_scenes(run: EvalRun, split: Split, count: int, describe: Callable[[Scene, int, int], Any]) -> Scenes:
    """Render scenes, or load those in the cache; rank r renders chunks r, r + world, ...

    Args:
        describe: returns the facts about a scene of some index and seed, in the types of JSON.

    Raises:
        DataError: ranks do not share the cache.
    """
    seed = run.settings.seed
    first = render(0, split=split, seed=seed, size=_SIZE)
    sample = hashlib.sha256(first.image.tobytes()).hexdigest()  # differs if the generator changes
    key = json.dumps([_FORMAT, split, count, seed, sample, describe(first, 0, seed)])
    folder = run.cache / "vqa" / "scenes" / hashlib.sha256(key.encode()).hexdigest()
    spans = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]

    def read(path: Path) -> tuple[NDArray[np.uint8], list[Any]]:
        shape = (len(spans[int(path.stem)]), 3, _SIZE, _SIZE)
        chunk = read_tensors(path, {"frames": TensorSpec(torch.uint8, shape)})
        return chunk.tensors["frames"].numpy(), json.loads(chunk.metadata["facts"])

    def make(numbers: list[int]) -> None:
        for number in numbers:
            scenes = [render(index, split=split, seed=seed, size=_SIZE) for index in spans[number]]
            facts = [describe(scene, index, seed) for scene, index in zip(scenes, spans[number], strict=True)]
            frames = torch.from_numpy(np.stack([scene.image for scene in scenes]))
            write_tensors(chunk_path(folder, number), {"frames": frames}, {"facts": json.dumps(facts)})

    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    chunks = [read(path) for path in paths]
    return Scenes(
        split,
        seed,
        np.concatenate([frames for frames, _ in chunks]),
        [fact for _, facts in chunks for fact in facts],
    )


@final
class SceneFrames:
    """Rendered scenes as an image source, under the names that a data set has for them.

    Args:
        rows: the row in `scenes.frames` of each name.
        jpeg: as decoded from a JPEG file, as photographs are.
    """

    def __init__(self, scenes: Scenes, rows: Mapping[str, int], *, jpeg: bool) -> None:
        self.name, self.location = f"scenes:{scenes.split}", f"scenes:{scenes.split}?seed={scenes.seed}"
        self.classes: tuple[str, ...] = ("",)
        self.notes: tuple[str, ...] = ()
        self.keys = tuple(sorted(rows))
        self.labels = np.zeros(len(self.keys), dtype=np.int64)
        self._frames, self._jpeg = scenes.frames[[rows[key] for key in self.keys]], jpeg

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names and pixels."""
        digest = hashlib.sha256(json.dumps([self.keys, self._frames.shape, self._jpeg]).encode())
        digest.update(self._frames.data)
        return digest.hexdigest()

    def read(self, index: int) -> Tensor:
        """Return an image, uint8 [3, S, S]."""
        frame = self._frames[index]
        if not self._jpeg:
            return torch.from_numpy(frame.copy())
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
        image.save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        return decode(file.getvalue())


_HINTS = ("", "", "Look at the big object.")
_NUM_CHOICES = 4
_BLIND_EVERY = 10
_STREAM = 71  # random stream of the choices


def describe_training(scene: Scene, index: int, seed: int) -> Any:
    """Return the caption of a scene and the conversations about it."""
    # Only the name: most words of longer captions belong to the template, and would be learned first.
    return {"caption": f"a {CLASSES[scene.label]}", "talks": conversations_about(scene, index, seed)}


def training_records(scenes: Scenes) -> dict[str, list[Record]]:
    """Make the records of the stages `pretrain` (captions) and `instruct` (conversations)."""
    captions, conversations = [], []
    for index, facts in enumerate(scenes.facts):
        image = f"{index:08d}.png"
        captions.append(Record(f"{index}", image, (Turn("", facts["caption"]),)))
        for number, talk in enumerate(facts["talks"]):
            is_blind = (index + number) % _BLIND_EVERY == 0
            turns = tuple(Turn(question, answer) for question, answer in talk)
            conversations.append(Record(f"{index}-{number}", None if is_blind else image, turns))
    return {"pretrain": captions, "instruct": conversations}


def training_images(scenes: Scenes, records: Iterable[Record]) -> SceneFrames:
    """Return the images that the records name."""
    names = {record.image for record in records if record.image is not None}
    return SceneFrames(scenes, {name: int(name.removesuffix(".png")) for name in names}, jpeg=False)


def conversations_about(scene: Scene, index: int, seed: int) -> list[list[tuple[str, str]]]:
    """Build the conversations about one scene, as (question, answer) turns."""
    generator = np.random.default_rng([_STREAM, seed, index])
    first = {question.kind: question for question in questions(scene, index, split="train", seed=seed)}
    # another seed gives other questions about the same scene
    second = {question.kind: question for question in questions(scene, index, split="train", seed=seed + 1)}
    talks = [
        (first["colour"], first.get("position")),
        (first["shape"], first.get("count")),
        (first["exists"],),
        (second["exists"],),
        (second.get("position"),),
        (second.get("count"), second["colour"]),
    ]
    turns = [[(short(q.text), q.answer) for q in talk if q is not None] for talk in talks]
    turns += [[_multiple_choice(first[kind], generator)] for kind in ("colour", "shape")]
    return [talk for talk in turns if talk]


def _multiple_choice(question: Question, generator: np.random.Generator) -> tuple[str, str]:
    pool: Sequence[str] = COLOURS if question.kind == "colour" else SHAPES
    others = [word for word in pool if word != question.answer]
    chosen = [*generator.permutation(others)[: _NUM_CHOICES - 1].tolist(), question.answer]
    choices = generator.permutation(chosen).tolist()
    hint = _HINTS[int(generator.integers(len(_HINTS)))]
    return choose(question.text, choices, hint), ascii_uppercase[choices.index(question.answer)]


_BENCHMARK_STREAM = 0x5E9A
_NUM_PEOPLE = 10
_MAX_DISSENT = 3  # people who answer differently; the rest is enough for a full score
_NUMBER_WORDS = ("zero", "one", "two", "three", "four")
_GQA_TYPES = {  # GQA's structural and semantic types
    "colour": ("query", "attr"),
    "shape": ("query", "cat"),
    "exists": ("verify", "obj"),
    "position": ("choose", "rel"),
    "count": ("query", "global"),
}
_ANSWER_TYPES = {"exists": "yes/no", "count": "number"}  # VQAv2's; `other` for other kinds
_SCHOOL: dict[str, tuple[str, str, Sequence[str]]] = {  # subject, topic, and what to choose from
    "colour": ("natural science", "physics", COLOURS),
    "shape": ("language science", "vocabulary", SHAPES),
}
_VARIANTS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "colour": lambda answer: (f"dark {answer}", f"light {answer}", answer.capitalize(), "not sure"),
    "shape": lambda answer: (f"a {answer}", f"big {answer}", f"{answer}.", "not sure"),
    "exists": lambda answer: (answer.capitalize(), f"{answer}.", "maybe", "not sure"),
    "position": lambda answer: (f"the {answer}", f"on the {answer}", "near the middle", "not sure"),
    "count": lambda answer: (_NUMBER_WORDS[int(answer)], f"{answer} objects", "some", "not sure"),
}


def describe_questions(scene: Scene, index: int, seed: int) -> Any:
    """Return the questions about a scene."""
    return questions(scene, index, split="val", seed=seed)


def benchmarks(
    scenes: Scenes, tasks: Sequence[Task], *, rule: Rule | None = None, limit: int | None = None
) -> list[Benchmark]:
    """Make benchmarks about scenes of the split `val`, with ids and image names as in the real ones.

    POPE has the questions of one file: those whether an object is there. Answers are equally frequent, so
    that a question's words reveal nothing about its answer.

    Args:
        rule: how VQAv2 (default: `official`) and TextVQA (default: `m4c`) compare answers.
        limit: use this many questions of each, evenly spread.
    """
    collected: dict[Task, list[scoring.BenchmarkQuestion]] = {task: [] for task in (*scoring.TASKS, "pope")}
    rows: dict[str | None, int] = {}
    for index, facts in enumerate(scenes.facts):
        draws = np.random.default_rng([_BENCHMARK_STREAM, scenes.seed, index])
        about = _ask(index, [Question(*fact) for fact in facts], draws, rule)
        for task in collected:
            collected[task] += about[task]
            rows |= {question.image: index for question in about[task]}
    opened = []
    for task in tasks:
        content = [(question.id, question.prompt, question.expected) for question in collected[task]]
        benchmark = Benchmark(
            task=task,
            split="test" if task == "scienceqa" else "val",
            questions=tuple(collected[task]),
            known=frozenset(question.id for question in collected[task]),
            missing_is_wrong=task == "scienceqa",
            fingerprint=hashlib.sha256(json.dumps([task, content]).encode()).hexdigest(),
        ).limited(limit)
        names = {str(question.image): rows[question.image] for question in benchmark.questions}
        images = SceneFrames(scenes, names, jpeg=task != "scienceqa")
        opened.append(replace(benchmark, images=images))
    return opened


def _ask(
    index: int, about: Sequence[Question], draws: np.random.Generator, rule: Rule | None
) -> dict[Task, list[scoring.BenchmarkQuestion]]:
    """Ask the questions about one scene in the manner of each benchmark.

    Args:
        draws: the generator of all draws about the scene, which come in the order of the benchmarks.
    """
    make, name = scoring.BenchmarkQuestion, f"scene{index:07d}.jpg"
    gqa, vqav2, textvqa = [], [], []
    for number, (kind, text, answer) in enumerate(about):
        structural, semantic = _GQA_TYPES[kind]
        groups = gqa_groups({"structural": structural, "semantic": semantic})
        exact = partial(score_exact, truth=answer)
        gqa.append(make(f"{index:07d}{number}", name, text, short(text), exact, answer, groups))
    photo = f"COCO_val2014_{index + 1:012d}.jpg"
    for number, question in enumerate(about):
        people, id = _people(question, draws), str((index + 1) * 1000 + number)
        score = partial(vqa_accuracy, truths=people, rule=rule or "official")
        groups = {"answer_type": _ANSWER_TYPES.get(question.kind, "other")}
        prompt = short(question.text)
        vqav2.append(make(id, photo, question.text, prompt, score, commonest(people), groups))
    for _ in range(int(draws.integers(4))):  # OCR tokens, of which no prompt makes use
        draws.choice(8, 4)
    for number, question in enumerate(about):
        if question.kind in _SCHOOL:  # the world has no writing
            people, id = _people(question, draws), str(10 * index + number)
            score = partial(vqa_accuracy, truths=people, rule=rule or "m4c")
            text = question.text[:1].lower() + question.text[1:]
            textvqa.append(make(id, name, text, short_with_ocr(text, None), score, commonest(people)))
    subject_kind = tuple(_SCHOOL)[index % len(_SCHOOL)]
    text, answer = next(
        (question.text, question.answer) for question in about if question.kind == subject_kind
    )
    subject, topic, words = _SCHOOL[subject_kind]
    others = draws.permutation([word for word in words if word != answer]).tolist()
    place = index // len(_SCHOOL) % _NUM_CHOICES  # each letter is right equally often
    choices = [*others[:place], answer, *others[place : _NUM_CHOICES - 1]]
    prompt = choose(text, choices, "Look at the big object." if index % 3 == 0 else "")
    right = LETTERS[place]
    groups = scienceqa_groups({"subject": subject, "topic": topic, "grade": f"grade{1 + index % 12}"})
    drawing = f"test/{index + 1}/image.png"
    letter = partial(score_letter, right=right)
    scienceqa = [make(str(index + 1), drawing, text, prompt, letter, right, groups)]
    pope = [
        make(
            str((index + 1) * 1000 + number),
            photo,
            question.text,
            short(question.text),
            partial(score_yes_no, right=question.answer),
            question.answer,
            {"sampling": "random"},
        )
        for number, question in enumerate(about)
        if question.kind == "exists"
    ]
    return {"gqa": gqa, "vqav2": vqav2, "textvqa": textvqa, "scienceqa": scienceqa, "pope": pope}


def _people(question: Question, draws: np.random.Generator) -> list[str]:
    """Draw the answers of ten people: half of the time all equal, otherwise one to three differ.

    None of these is another possible answer of the question's kind, so that a constant answer stays at
    chance.
    """
    answers = [question.answer] * _NUM_PEOPLE
    if draws.random() < 0.5:
        return answers
    variants = _VARIANTS[question.kind](question.answer)
    for person in draws.permutation(_NUM_PEOPLE)[: int(draws.integers(1, _MAX_DISSENT + 1))]:
        answers[int(person)] = variants[int(draws.integers(len(variants)))]
    return answers
