"""The output of a benchmark's reader: the questions, and how each answer is scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

Mark = Callable[[str], float]  # score of an answer, 0 to 1


class Question(NamedTuple):
    """One question of a benchmark."""

    id: str
    image: str | None  # the file's name below the images folder
    text: str  # as in the benchmark
    prompt: str  # the user's whole text in the protocol


class Grouping(NamedTuple):
    """The group of each question in one respect, such as the type of its answer."""

    labels: tuple[str, ...]
    as_metrics: bool = True  # False: too many groups for metrics, so only in the table


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFiles:
    """The local files of one benchmark. Files that a benchmark does not read must be left out.

    - gqa: `questions` is `val_balanced_questions.json`, `testdev_balanced_questions.json` or the like; the
      answers are in it.
    - vqav2: `questions` is `v2_OpenEnded_mscoco_*_questions.json`, `annotations` is
      `v2_mscoco_*_annotations.json`; without it, no scores but a submission.
    - textvqa: `questions` is `TextVQA_0.5.1_val.json`; `ocr` puts OCR tokens into the prompts, those of
      `ocr_file` (`TextVQA_Rosetta_OCR_v0.2_val.json`) or else of each question's own `ocr_tokens`.
    - scienceqa: `questions` is `problems.json`, `splits` is `pid_splits.json`.
    """

    questions: Path
    annotations: Path | None = None
    splits: Path | None = None
    split: str | None = None
    """ScienceQA: the list of `pid_splits.json` (default: test). Others name it in their files; give it if
    they do not."""
    ocr: bool = False
    ocr_file: Path | None = None
    images: Path | None = None
    """The folder of the images; not needed to score predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """The questions of one benchmark's split in the order of the file, and how they are scored."""

    split: str
    questions: tuple[Question, ...]
    marks: tuple[Mark, ...]  # one per question; empty if the answers are not public
    expected: tuple[str, ...]  # the right or most common answer of each question; empty if `marks` is
    known: frozenset[str]  # ids allowed in predictions, including questions that are not scored
    groups: Mapping[str, Grouping] = field(default_factory=dict)
    missing_is_wrong: bool = False  # a question without a prediction is a wrong answer, not an error


def commonest(answers: Iterable[str]) -> str:
    """Return the most common answer, the first of equally common ones."""
    return Counter(answers).most_common(1)[0][0]
