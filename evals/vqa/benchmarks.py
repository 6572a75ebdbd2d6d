"""The generated world as all four benchmarks, each in the file format in which it is published."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from radio.errors import DataError
from radio.io import write_text
from radio.scenes import COLOURS, SHAPES, Question, questions, render

from .scoring.exam import TaskFiles
from .scoring.scienceqa import LETTERS
from .tasks import Task
from .worlds import make_world

if TYPE_CHECKING:
    from radio.chunks import Damage

_METADATA, _FORMAT = "benchmarks.json", "am-radio-vqa-benchmarks/2"
_JPEG_QUALITY = 95
_STREAM = 0x5E9A  # a random stream separate from the scenes'
_NUM_CHOICES = 4
_NUM_PEOPLE = 10
_MOST_OTHERS = 3  # people who answer differently; the rest is enough for a full score
_NUMBER_WORDS = ("zero", "one", "two", "three", "four")

_GQA_TYPES = {  # GQA's structural and semantic types
    "colour": ("query", "attr"),
    "shape": ("query", "cat"),
    "exists": ("verify", "obj"),
    "position": ("choose", "rel"),
    "count": ("query", "global"),
}
_VQA_TYPES = {
    "colour": ("other", "what color is the"),
    "shape": ("other", "what"),
    "exists": ("yes/no", "is there a"),
    "position": ("other", "is the"),
    "count": ("number", "how many"),
}
_SCHOOL = {  # subject, topic, and what to choose from
    "colour": ("natural science", "physics", COLOURS),
    "shape": ("language science", "vocabulary", SHAPES),
}
_HINTS = ("", "Look at the big object.")

_FILES: dict[Task, TaskFiles] = {
    "gqa": TaskFiles(questions=Path("gqa/val_balanced_questions.json"), images=Path("images")),
    "vqav2": TaskFiles(
        questions=Path("vqav2/v2_OpenEnded_mscoco_val2014_questions.json"),
        annotations=Path("vqav2/v2_mscoco_val2014_annotations.json"),
        images=Path("vqav2/val2014"),
    ),
    "textvqa": TaskFiles(questions=Path("textvqa/TextVQA_0.5.1_val.json"), images=Path("images")),
    "scienceqa": TaskFiles(
        questions=Path("scienceqa/problems.json"),
        splits=Path("scienceqa/pid_splits.json"),
        images=Path("scienceqa/images"),
    ),
}


class _Asked(NamedTuple):
    """A scene's index, its questions, and the generator of all random choices about them."""

    scene: int
    questions: tuple[Question, ...]
    draws: np.random.Generator


def write_benchmarks(
    root: Path, count: int, seed: int, *, size: int = 96, damage: Damage | None = None
) -> dict[Task, TaskFiles]:
    """Write the files of the four benchmarks about `count` generated images below `root`; return their paths.

    All images are of the world's validation split. Answers are equally frequent, so that a question's words
    reveal nothing about its answer. The folder appears when it is complete; an existing one is left
    unchanged unless it is damaged.

    Raises:
        DataError: fewer than one image, or a folder that holds something else.
        SceneError: a size or seed out of range.
    """
    if count < 1:
        raise DataError(f"benchmarks of {count} images hold no questions; ask for 1 or more")
    metadata = {"format": _FORMAT, "count": count, "seed": seed, "size": size}
    make_world(root, _METADATA, metadata, partial(_fill, count=count, seed=seed, size=size), damage)
    return files_below(root)


def files_below(root: Path) -> dict[Task, TaskFiles]:
    """Return the paths of the files that `write_benchmarks` writes."""
    return {task: _below(root, files) for task, files in _FILES.items()}


def _fill(root: Path, *, count: int, seed: int, size: int) -> None:
    asked = []
    for index in range(count):
        scene = render(index, split="val", seed=seed, size=size)
        _save(root, index, Image.fromarray(np.ascontiguousarray(scene.image.transpose(1, 2, 0))))
        draws = np.random.default_rng([_STREAM, seed, index])
        asked.append(_Asked(index, questions(scene, index, split="val", seed=seed), draws))
    _save_annotations(root, asked)


def _save(root: Path, index: int, image: Image.Image) -> None:
    """Write an image under each name that the four benchmarks have for it."""
    photo, drawing = io.BytesIO(), io.BytesIO()
    image.save(photo, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    image.save(drawing, format="PNG", compress_level=1)
    for name, data in (
        (f"images/{_name(index)}.jpg", photo),
        (f"vqav2/val2014/COCO_val2014_{index + 1:012d}.jpg", photo),
        (f"scienceqa/images/test/{index + 1}/image.png", drawing),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.getvalue())


def _save_annotations(root: Path, asked: list[_Asked]) -> None:
    def save(path: Path | None, data: Any) -> None:
        assert path is not None
        write_text(root / path, json.dumps(data) + "\n")

    save(_FILES["gqa"].questions, dict(_gqa(asked)))
    head = {"data_type": "mscoco", "data_subtype": "val2014", "info": {"description": "generated scenes"}}
    pairs = list(_vqav2(asked))
    asks = {**head, "task_type": "Open-Ended", "questions": [question for question, _ in pairs]}
    save(_FILES["vqav2"].questions, asks)
    save(_FILES["vqav2"].annotations, {**head, "annotations": [annotation for _, annotation in pairs]})
    text = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    save(_FILES["textvqa"].questions, {**text, "data": list(_textvqa(asked))})
    problems = dict(_scienceqa(asked))
    save(_FILES["scienceqa"].questions, problems)
    save(_FILES["scienceqa"].splits, {"test": list(problems), "minitest": list(problems)[::4]})


def _name(index: int) -> str:
    return f"scene{index:07d}"


def _gqa(asked: list[_Asked]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every question as (id, GQA's record)."""
    for index, found, _ in asked:
        for number, question in enumerate(found):
            structural, semantic = _GQA_TYPES[question.kind]
            yield (
                f"{index:07d}{number}",
                {
                    "question": question.text,
                    "imageId": _name(index),
                    "answer": question.answer,
                    "isBalanced": True,
                    "types": {"structural": structural, "semantic": semantic, "detailed": question.kind},
                },
            )


def _vqav2(asked: list[_Asked]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield every question and its annotation, where up to three of the ten people may answer differently."""
    for index, found, draws in asked:
        for number, question in enumerate(found):
            head = {"question_id": (index + 1) * 1000 + number, "image_id": index + 1}
            answer_type, question_type = _VQA_TYPES[question.kind]
            given = [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                for person, answer in enumerate(_people(question, draws), start=1)
            ]
            yield (
                {**head, "question": question.text},
                {
                    **head,
                    "answer_type": answer_type,
                    "question_type": question_type,
                    "multiple_choice_answer": question.answer,
                    "answers": given,
                },
            )


def _textvqa(asked: list[_Asked]) -> Iterator[dict[str, Any]]:
    """Yield the questions about colours and shapes, with random OCR tokens: the world has no writing."""
    for index, found, draws in asked:
        tokens = ["".join(draws.choice(list("KQXZ0379"), 4)) for _ in range(int(draws.integers(4)))]
        for number, question in enumerate(found):
            if question.kind in _SCHOOL:
                yield {
                    "question_id": 10 * index + number,
                    "image_id": _name(index),
                    "question": question.text[:1].lower() + question.text[1:],
                    "answers": _people(question, draws),
                    "ocr_tokens": tokens,
                    "set_name": "val",
                }


def _scienceqa(asked: list[_Asked]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield one question per image with four choices, alternating between colour and shape."""
    for index, found, draws in asked:
        kind = tuple(_SCHOOL)[index % len(_SCHOOL)]
        question = next(question for question in found if question.kind == kind)
        subject, topic, words = _SCHOOL[kind]
        others = draws.permutation([word for word in words if word != question.answer]).tolist()
        place = index // len(_SCHOOL) % _NUM_CHOICES  # each letter is right equally often
        choices = [*others[:place], question.answer, *others[place : _NUM_CHOICES - 1]]
        yield (
            str(index + 1),
            {
                "question": question.text,
                "choices": choices,
                "answer": place,
                "hint": _HINTS[index % 3 == 0],
                "image": "image.png",
                "task": "closed choice",
                "grade": f"grade{1 + index % 12}",
                "subject": subject,
                "topic": topic,
                "category": topic,
                "skill": f"Name the {kind}",
                "lecture": "",
                "solution": f"The answer is {LETTERS[place]}.",
                "split": "test",
            },
        )


def _people(question: Question, draws: np.random.Generator) -> list[str]:
    """Draw the answers of ten people: half of the time all equal, otherwise one to three differ.

    None of these is another possible answer of the question's kind, so that a constant answer stays at
    chance.
    """
    said = [question.answer] * _NUM_PEOPLE
    if draws.random() < 0.5:
        return said
    variants = _VARIANTS[question.kind](question.answer)
    for person in draws.permutation(_NUM_PEOPLE)[: int(draws.integers(1, _MOST_OTHERS + 1))]:
        said[int(person)] = variants[int(draws.integers(len(variants)))]
    return said


_VARIANTS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "colour": lambda answer: (f"dark {answer}", f"light {answer}", answer.capitalize(), "not sure"),
    "shape": lambda answer: (f"a {answer}", f"big {answer}", f"{answer}.", "not sure"),
    "exists": lambda answer: (answer.capitalize(), f"{answer}.", "maybe", "not sure"),
    "position": lambda answer: (f"the {answer}", f"on the {answer}", "near the middle", "not sure"),
    "count": lambda answer: (_NUMBER_WORDS[int(answer)], f"{answer} objects", "some", "not sure"),
}


def _below(root: Path, files: TaskFiles) -> TaskFiles:
    """Prefix every path with `root`."""
    return TaskFiles(
        questions=root / files.questions,
        annotations=files.annotations and root / files.annotations,
        splits=files.splits and root / files.splits,
        images=files.images and root / files.images,
    )
