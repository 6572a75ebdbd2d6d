"""What a benchmark's reader hands over: the questions, and what each answer is worth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

Mark = Callable[[str], float]  # what an answer is worth, 0 to 1


class Question(NamedTuple):
    """One question of a benchmark."""

    id: str
    image: str | None  # the file's name below the images folder
    text: str  # as the benchmark asks it
    prompt: str  # the user's whole text by the protocol


class Grouping(NamedTuple):
    """The group of each question in one respect, such as the type of its answer."""

    labels: tuple[str, ...]
    as_metrics: bool = True  # False: too many groups for metrics, they go into the table alone


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFiles:
    """The local files of one benchmark. What a benchmark does not read must be left out.

    - gqa: `questions` is `val_balanced_questions.json`, `testdev_balanced_questions.json` or the like; the
      answers are in it.
    - vqav2: `questions` is `v2_OpenEnded_mscoco_*_questions.json`, `annotations` is
      `v2_mscoco_*_annotations.json`; without it there are no scores, only a submission.
    - textvqa: `questions` is `TextVQA_0.5.1_val.json`; `ocr` puts OCR tokens into the prompts, those of
      `ocr_file` (`TextVQA_Rosetta_OCR_v0.2_val.json`) or else of each question's own `ocr_tokens`.
    - scienceqa: `questions` is `problems.json`, `splits` is `pid_splits.json`.
    """

    questions: Path
    annotations: Path | None = None
    splits: Path | None = None
    split: str | None = None
    """ScienceQA: the list of `pid_splits.json` (test unless given). Elsewhere the files say it; give it where
    they do not."""
    ocr: bool = False
    ocr_file: Path | None = None
    images: Path | None = None
    """The folder of the pictures; not needed to score predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """The questions of one benchmark's split in the order of the file, and how they are marked."""

    split: str
    questions: tuple[Question, ...]
    marks: tuple[Mark, ...]  # one a question; none at all where the answers are not public
    expected: tuple[str, ...]  # the right or the commonest answer of each question; empty with the marks
    known: frozenset[str]  # the ids that predictions may hold: also of questions that are not scored
    groups: Mapping[str, Grouping] = field(default_factory=dict)
    missing_is_wrong: bool = False  # a question without a prediction is a wrong answer, not an error


def commonest(answers: Iterable[str]) -> str:
    """The answer that most people gave, the first of equally common ones."""
    return Counter(answers).most_common(1)[0][0]
