"""One interface to all benchmarks: questions in, scores out. Needs neither a model nor torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from radio.errors import DataError, did_you_mean

from .prompts import IMAGE
from .scoring import custom, gqa, scienceqa, textvqa, vqav2
from .scoring.exam import Exam, Question, TaskFiles
from .scoring.predictions import read_predictions
from .scoring.scores import Scores
from .scoring.soft import Rule

__all__ = [
    "TASKS",
    "Question",
    "Rule",
    "Scores",
    "Task",
    "TaskData",
    "TaskFiles",
    "open_task",
    "read_predictions",
]

Task = Literal["gqa", "vqav2", "textvqa", "scienceqa", "custom"]
TASKS: tuple[Task, ...] = ("gqa", "vqav2", "textvqa", "scienceqa")
"""The published benchmarks; `custom` are the user's own questions."""

_NEEDLESS: dict[Task, tuple[str, ...]] = {
    "gqa": ("annotations", "splits", "ocr", "ocr_file"),
    "vqav2": ("splits", "ocr", "ocr_file"),
    "textvqa": ("annotations", "splits"),
    "scienceqa": ("annotations", "ocr", "ocr_file"),
    "custom": ("annotations", "splits", "ocr", "ocr_file"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """One benchmark's split: its questions, and how their answers are scored."""

    task: Task
    exam: Exam
    images: Path | None  # the folder below which each question's image is
    fingerprint: str  # of the files' contents
    num_questions: int  # of the split; with a limit, `questions` has fewer

    @property
    def split(self) -> str:
        """Name of the split: `val`, `testdev`, `test-dev`, …"""
        return self.exam.split

    @property
    def questions(self) -> tuple[Question, ...]:
        """The questions, in the order of the file."""
        return self.exam.questions

    @property
    def expected(self) -> tuple[str, ...]:
        """The right or most common answer of each question; empty if they are not public."""
        return self.exam.expected

    @property
    def has_answers(self) -> bool:
        """Whether answers can be scored here."""
        return bool(self.exam.marks)

    def score(self, answers: Mapping[str, str], allow_missing: bool = False) -> Scores:
        """Score the answers, given by question id.

        ScienceQA's protocol counts a missing answer as wrong; other benchmarks only with `allow_missing`.

        Raises:
            DataError: answers that are not public, answers to other questions, or questions without one.
        """
        name = f"{self.task} {self.split}"
        if not self.has_answers:
            raise DataError(
                f"there are no right answers to {name} in the files, so nothing can be scored; give files "
                f"that hold them" + (", or write a submission" if self.task == "vqav2" else "")
            )
        unknown = [one for one in answers if one not in self.exam.known]
        if unknown:
            raise DataError(
                f"{len(unknown)} of the {len(answers)} predictions are for questions that {name} does not "
                f"ask, the first is for {unknown[0]}; give the predictions of this split"
            )
        missing = tuple(question.id for question in self.questions if question.id not in answers)
        if missing and not (allow_missing or self.exam.missing_is_wrong):
            raise DataError(
                f"{len(missing)} of the {len(self.questions)} questions of {name} have no prediction, the "
                f"first is {missing[0]}; answer them too, or allow missing ones, which then count as wrong"
            )
        return Scores(
            ids=tuple(question.id for question in self.questions),
            values=tuple(
                mark(answers[question.id]) if question.id in answers else 0.0
                for question, mark in zip(self.questions, self.exam.marks, strict=True)
            ),
            images=tuple(question.image or f"question {question.id}" for question in self.questions),
            groups=self.exam.groups,
            missing=missing,
        )

    def write_submission(self, answers: Mapping[str, str], path: Path, *, normalise: bool = True) -> None:
        """Write EvalAI's file of VQAv2; see `scoring.vqav2.write_submission`.

        Raises:
            DataError: not VQAv2, or not exactly the answers to all questions; nothing is written.
        """
        self._check_submission()
        vqav2.write_submission(self.questions, answers, path, normalise=normalise)

    def check(self) -> None:
        """Check before hours of training that a model's answers can be scored at the end.

        Raises:
            DataError: absent images, questions that contain `<image>`, or neither right answers nor a
                submission that could be written.
        """
        self.check_images()
        marked = [question.id for question in self.questions if IMAGE in question.prompt]
        if marked:
            raise DataError(
                f"{len(marked)} questions of {self.task} {self.split} hold the mark {IMAGE} themselves, the "
                f"first is {marked[0]}; take it out"
            )
        if not self.has_answers:
            self._check_submission()

    def _check_submission(self) -> None:
        if self.task != "vqav2":
            raise DataError(
                f"{self.task} takes no EvalAI submission here; only vqav2 does, and {self.task} "
                f"{self.split} needs files that hold the right answers"
            )
        if len(self.questions) < self.num_questions:
            raise DataError(
                f"a submission answers all {self.num_questions} questions, and the limit left "
                f"{len(self.questions)}; leave the limit out"
            )

    def check_images(self) -> Path:
        """Check that every question's image exists; return the folder or tar file of the images.

        Raises:
            DataError: no folder given, or absent images.
        """
        from .images import Images  # imports torch

        if self.images is None:
            raise DataError(f"{self.task}: no folder of images was given; a model needs to see them")
        names = dict.fromkeys(question.image for question in self.questions if question.image)
        there = Images(self.images)
        absent = [name for name in names if name not in there]
        if absent:
            raise DataError(
                f"{self.images}: {len(absent)} of the {len(names)} images of {self.task} {self.split} are "
                f"not there, the first is {absent[0]}"
            )
        return self.images


def open_task(
    task: Task, files: TaskFiles, *, rule: Rule | None = None, limit: int | None = None
) -> TaskData:
    """Open a benchmark from its local files.

    Args:
        task: which benchmark the files are.
        files: see `TaskFiles`.
        rule: how VQAv2 (default: `official`) and TextVQA (default: `m4c`) compare answers.
        limit: use this many questions, evenly spread over the file.

    Raises:
        DataError: an unknown benchmark; a file that is absent, another benchmark's, or not read by this one.
    """
    known = get_args(Task)
    if task not in known:
        raise DataError(f"no benchmark {task!r}; there are {', '.join(known)}{did_you_mean(task, known)}")
    needless = [name for name in _NEEDLESS[task] if getattr(files, name)]
    if needless:
        raise DataError(f"{task} does not read {' and '.join(needless)}; leave that out")
    exam = _read(task, files, rule)
    number = len(exam.questions)
    return TaskData(
        task=task,
        exam=exam if limit is None else _limited(exam, limit),
        images=files.images,
        fingerprint=_fingerprint(files, exam.split),
        num_questions=number,
    )


def _read(task: Task, files: TaskFiles, rule: Rule | None) -> Exam:
    if task in ("gqa", "scienceqa", "custom") and rule is not None:
        raise DataError(f"{task} has one rule, and got {rule!r}; leave that out")
    if rule is not None and rule not in get_args(Rule):
        raise DataError(f"no rule {rule!r}; there are {', '.join(get_args(Rule))}")
    if task == "vqav2":
        return vqav2.read(files, rule or "official")
    if task == "textvqa":
        return textvqa.read(files, rule or "m4c")
    if task == "custom":
        return custom.read(files)
    return gqa.read(files) if task == "gqa" else scienceqa.read(files)


def _limited(exam: Exam, limit: int) -> Exam:
    if limit < 1:
        raise DataError(f"a limit of {limit} leaves no questions; give 1 or more, or leave it out")
    number = len(exam.questions)
    if limit >= number:
        return exam
    chosen = [place * number // limit for place in range(limit)]
    return replace(
        exam,
        questions=tuple(exam.questions[place] for place in chosen),
        marks=tuple(exam.marks[place] for place in chosen) if exam.marks else (),
        expected=tuple(exam.expected[place] for place in chosen) if exam.expected else (),
        groups={
            name: group._replace(labels=tuple(group.labels[place] for place in chosen))
            for name, group in exam.groups.items()
        },
    )


def _fingerprint(files: TaskFiles, split: str) -> str:
    sha = hashlib.sha256(split.encode())
    for path in (files.questions, files.annotations, files.splits, files.ocr_file):
        if path is not None:
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()
