"""Score answers by the rules of GQA, VQAv2, TextVQA, ScienceQA and POPE; needs no torch.

Answers of people are compared after one of two normalisations, so that `The  two dogs.` and `2 dogs` are
equal. `official` is that of the VQA evaluation (S. Antol et al. 2015; visualqa.org). TextVQA's scorers
(`m4c`) lower first, drop every comma and question mark, separate a possessive, and then do the same.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evals.core.blocks import Table
from evals.core.report import DatasetInfo, Metric
from evals.core.stats import interval, mean_present, resampled_sums
from radio.errors import DataError, MissingDataError
from radio.io import write_text

from .settings import Rule, Task

if TYPE_CHECKING:
    from radio.data import ImageSource

# Letters: Q questions, P images, K groups, R resamples.

TASKS: tuple[Task, ...] = ("gqa", "vqav2", "textvqa", "scienceqa")
"""The published benchmarks with an accuracy; POPE has an F1, and `custom` are the user's own questions."""

IMAGE = "<image>"
LETTERS = "ABCDE"
_LETTERS = tuple(LETTERS)

_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_MOST_PERIODS = 32  # both scorers pass re.UNICODE, which is 32, as the count
_PERIOD = re.compile(r"\.(?!\d)")  # not followed by a digit: decimals keep theirs
_LETTER = re.compile(r"The answer is ([A-Z]).")  # any character after the letter, as in LLaVA's evaluation

# For each ending, the words that the table combines with it: `hed` is in it; `shed` and `wed` are words.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_NOT_HAVE = "could had might should would"
_HAVE = "could might must not should they we what where who would you"
_WOULD = "he how it someone something there they where who you"
_WOULD_HAVE = "he it she somebody someone something there they we who you"
_WILL = "how it somebody someone something they what who why you"
_IS = "he how somebody someone that there what when where who why"
_ARE = "there they what why you"
_ALONE = {
    "maam": "ma'am",
    "oclock": "o'clock",
    "twas": "'twas",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "somebody'd": "somebodyd",  # reversed by mistake, as in every scorer
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}


def _contractions() -> dict[str, str]:
    table = dict(_ALONE)
    for stems, bare, right in (
        (_NOT, "nt", "n't"),
        (_HAVE, "ve", "'ve"),
        (_WOULD, "d", "'d"),
        (_WILL, "ll", "'ll"),
        (_IS, "s", "'s"),
        (_ARE, "re", "'re"),
    ):
        table |= {stem + bare: stem + right for stem in stems.split()}
    for stems, halves, right in (
        (_NOT_HAVE, ("nt've", "n'tve"), "n't've"),
        (_WOULD_HAVE, ("d've", "'dve"), "'d've"),
    ):
        table |= {stem + half: stem + right for stem in stems.split() for half in halves}
    return table


CONTRACTIONS: dict[str, str] = _contractions()
"""Contractions without apostrophes, and their correct spelling. The public table's capital entries (`Im`) are
omitted: words are lowered before the look-up, so those never apply."""


def clean(answer: str) -> str:
    """Put an answer on one line and strip it: the only normalisation of unanimous answers."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)  # most of millions of answers repeat
def official(answer: str) -> str:
    """Normalise an answer as the official VQA evaluation does where people disagree."""
    return _words(_punctuation(clean(answer)))


@lru_cache(maxsize=1 << 16)
def m4c(answer: str) -> str:
    """Normalise an answer as TextVQA's scorers do."""
    lowered = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _words(_punctuation(clean(lowered)))


def _punctuation(text: str) -> str:
    """Remove each punctuation mark that is next to a space, or all of them in a text with `1,000`.

    Other marks become a space; the first 32 full stops that are not before a digit are removed.
    """
    numbers = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        goes = numbers or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


NUM_ANSWERS = 10
_ENOUGH = 3  # people who must agree for a score of 1


def leave_one_out(matches: int, count: int = NUM_ANSWERS) -> float:
    """Compute the mean of min(1, matches in the set / 3) over the sets of all answers but one.

    Of ten answers, 1, 2, 3 and 4 or more matches give 0.3, 0.6, 0.9 and 1.
    """
    assert 0 <= matches <= count
    without = matches * min(_ENOUGH, max(0, matches - 1)) + (count - matches) * min(_ENOUGH, matches)
    return without / (_ENOUGH * count)


def vqa_accuracy(answer: str, truths: Sequence[str], rule: Rule) -> float:
    """Score an answer against people's answers, from 0 to 1."""
    if rule == "m4c":
        given = m4c(answer)
        return leave_one_out(sum(m4c(truth) == given for truth in truths), len(truths))
    given = clean(m4c(answer) if rule == "llava" else answer)
    expected = [clean(truth) for truth in truths]
    if len(set(expected)) > 1:
        given, expected = official(given), [official(truth) for truth in expected]
    return leave_one_out(expected.count(given), len(expected))


def score_exact(answer: str, truth: str) -> float:
    """Score an answer by GQA's rule: equal, but for case and full stops at its end."""
    return float(answer.rstrip(".").lower() == truth)


def score_letter(answer: str, right: str) -> float:
    """Score an answer by the letter that it chooses."""
    return float(letter(answer) == right)


def letter(answer: str) -> str | None:
    """Return the letter that an answer chooses, by LLaVA's rule on the unchanged text; None without one.

    It is the whole text, or its first letter before a full stop and a space, or the capital after
    "The answer is " (with any one character after it), if that occurs once.
    """
    if answer in _LETTERS:
        return answer
    if answer[:1] in _LETTERS and answer[1:3] == ". ":
        return answer[0]
    letters = _LETTER.findall(answer)
    return str(letters[0]) if len(letters) == 1 else None


def says_yes(answer: str) -> bool:
    """Read an answer by POPE's rule: no, if the first sentence has the word `No`, `no` or `not`; else yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score_yes_no(answer: str, right: str) -> float:
    """Score an answer to a question with the right answer `yes` or `no`, by POPE's rule."""
    return float(says_yes(answer) == (right == "yes"))


def exact_or_soft(answer: str, truths: Sequence[str]) -> float:
    """Score an answer after normalising all answers as in VQAv2's evaluation.

    With ten or more people's answers it is VQA's accuracy (0.3, 0.6, 0.9 or 1 for 1, 2, 3 or more of ten who
    agree); with fewer it is 1 if one of them is equal, else 0.
    """
    same = [_normalised(truth) for truth in truths].count(_normalised(answer))
    return leave_one_out(same, len(truths)) if len(truths) >= NUM_ANSWERS else float(same > 0)


def _normalised(answer: str) -> str:
    """Normalise as VQAv2's evaluation does; only strip and lower where that leaves nothing (`the`, `?`)."""
    return official(answer) or answer.strip().lower()


ScoreFn = Callable[[str], float]
"""Scores an answer from 0 to 1."""

_TABLE_ONLY = ("topic",)  # of ScienceQA: too many for metrics


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion:
    """One question of a benchmark, and how its answer is scored."""

    id: str
    image: str | None  # name of the image in the benchmark's folder
    text: str  # as in the benchmark
    prompt: str  # the user's whole text in the protocol
    score: ScoreFn | None = None  # None if the right answer is not public
    expected: str = ""  # the right or most common answer
    groups: Mapping[str, str] = field(default_factory=dict)  # its kinds, such as {"answer_type": "yes/no"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """The questions of a benchmark's split, in the order of its file."""

    task: Task
    split: str  # `val`, `testdev`, `test-dev`, ...
    questions: tuple[BenchmarkQuestion, ...]
    known: frozenset[str]  # ids allowed in predictions, including questions that are not scored
    missing_is_wrong: bool = False  # a question without a prediction is a wrong answer, not an error
    images: Path | ImageSource | None = None  # a folder or tar file; needed only if a model answers
    fingerprint: str = ""  # hash of the contents
    num_left_out: int = 0  # questions of the split that the limit leaves out

    @property
    def name(self) -> str:
        """Benchmark and split."""
        return f"{self.task} {self.split}"

    @property
    def has_answers(self) -> bool:
        """Whether answers can be scored here."""
        return all(question.score is not None for question in self.questions)

    @property
    def num_questions(self) -> int:
        """Number of questions of the split; with a limit, `questions` has fewer."""
        return len(self.questions) + self.num_left_out

    def score(self, answers: Mapping[str, str], allow_missing: bool = False) -> Scores:
        """Score the answers, given by question id.

        ScienceQA's protocol counts a missing answer as wrong; other benchmarks only with `allow_missing`.

        Raises:
            DataError: answers that are not public, answers to other questions, or questions without one.
        """
        if not self.has_answers:
            raise DataError(
                f"there are no right answers to {self.name} in the files, so nothing can be scored; give "
                f"files that hold them" + (", or write a submission" if self.task == "vqav2" else "")
            )
        unknown = [id for id in answers if id not in self.known]
        if unknown:
            raise DataError(
                f"{len(unknown)} of the {len(answers)} predictions are for questions that {self.name} does "
                f"not ask, the first is for {unknown[0][:80]}; give the predictions of this split"
            )
        missing = tuple(question.id for question in self.questions if question.id not in answers)
        if missing and not (allow_missing or self.missing_is_wrong):
            raise DataError(
                f"{len(missing)} of the {len(self.questions)} questions of {self.name} have no prediction, "
                f"the first is {missing[0][:80]}; answer them too, or allow missing ones, which then count "
                f"as wrong"
            )
        return Scores(
            values=tuple(
                question.score(answers[question.id]) if question.score and question.id in answers else 0.0
                for question in self.questions
            ),
            images=tuple(question.image or f"question {question.id}" for question in self.questions),
            groups=self.groups,
            missing=missing,
            positive=tuple(question.expected == "yes" for question in self.questions)
            if self.task == "pope"
            else (),
        )

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Labels of the questions in each respect that all of them have, such as the type of the answer."""
        return {
            name: tuple(question.groups[name] for question in self.questions)
            for name in self.questions[0].groups
            if all(name in question.groups for question in self.questions)
        }

    def limited(self, limit: int | None) -> Benchmark:
        """Keep `limit` questions, evenly spread over the file; None keeps all.

        Raises:
            DataError: a limit below 1.
        """
        if limit is not None and limit < 1:
            raise DataError(f"a limit of {limit} leaves no questions; give 1 or more, or leave it out")
        count = len(self.questions)
        if limit is None or limit >= count:
            return self
        kept = tuple(self.questions[index * count // limit] for index in range(limit))
        return replace(self, questions=kept, num_left_out=self.num_questions - limit)

    def check(self) -> None:
        """Check before hours of training that a model's answers can be scored at the end.

        Raises:
            DataError: no folder of images, absent ones, questions that contain `<image>`, or neither right
                answers nor a submission that could be written.
        """
        if self.images is None:
            raise DataError(f"{self.task}: no folder of images was given; a model needs to see them")
        if isinstance(self.images, Path):
            from .data import NamedImages  # imports torch

            images = NamedImages(self.images)
            names = dict.fromkeys(question.image for question in self.questions if question.image)
            absent = [name for name in names if name not in images]
            if absent:
                raise MissingDataError(
                    f"{self.images}: {len(absent)} of the {len(names)} images of {self.name} are not there, "
                    f"the first is {absent[0][:80]}"
                )
        marked = [question.id for question in self.questions if IMAGE in question.prompt]
        if marked:
            raise DataError(
                f"{len(marked)} questions of {self.name} hold the mark {IMAGE} themselves, the first is "
                f"{marked[0][:80]}; take it out"
            )
        if not self.has_answers:
            self._check_submission()

    def write_submission(self, answers: Mapping[str, str], path: Path) -> None:
        """Write the predictions in EvalAI's format: one JSON array [{question_id, answer}] of every question.

        The server does not normalise answers where all ten people agree, so that `Yes` is wrong against
        `yes`; therefore they are normalised here, as LLaVA does.

        Raises:
            DataError: not VQAv2, a question without an answer, an answer without a question, or an id that is
                not a number; nothing is written.
        """
        self._check_submission()
        absent = [question.id for question in self.questions if question.id not in answers]
        if absent:
            raise DataError(
                f"{len(absent)} of the {len(self.questions)} questions have no answer, the first is "
                f"{absent[0]}; a submission answers all of them, so nothing is written"
            )
        foreign = answers.keys() - {question.id for question in self.questions}
        if foreign:
            raise DataError(
                f"{len(foreign)} answers are for other questions, such as {min(foreign)}; nothing is written"
            )
        wrong = next((question.id for question in self.questions if not question.id.isdecimal()), None)
        if wrong is not None:
            raise DataError(f"question id {wrong!r} is no number; these are not VQAv2's questions")
        rows = [{"question_id": int(one.id), "answer": m4c(answers[one.id])} for one in self.questions]
        write_text(path, json.dumps(rows) + "\n")

    def _check_submission(self) -> None:
        if self.task != "vqav2":
            raise DataError(
                f"{self.task} takes no EvalAI submission here; only vqav2 does, and {self.name} needs files "
                f"that hold the right answers"
            )
        if self.num_left_out:
            raise DataError(
                f"a submission answers all {self.num_questions} questions, and the limit left "
                f"{len(self.questions)}; leave the limit out"
            )

    def info(self) -> DatasetInfo:
        """Return the benchmark's row in the report."""
        return DatasetInfo(
            role="questions",
            name=self.name,
            fingerprint=self.fingerprint,
            count=len(self.questions),
            num_classes=0,
        )


def commonest(answers: Iterable[str]) -> str:
    """Return the most common answer, the first of equally common ones."""
    return Counter(answers).most_common(1)[0][0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """The score of each answer, in the order of the questions."""

    values: tuple[float, ...]  # 0 to 1; a question without a prediction has 0
    images: tuple[str, ...]  # of each question: questions about one image are resampled together
    groups: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]  # ids of the questions without a prediction
    positive: tuple[bool, ...] = ()  # POPE: whether the right answer is yes; other benchmarks have no F1

    def metrics(self, seed: int = 0) -> dict[str, Metric]:
        """Compute `accuracy` in percent, overall and per group (`answer_type_yes_no`), and any `unanswered`.

        POPE has `f1`, `precision`, `recall` and `yes_ratio` too; these and its accuracy are means over its
        files, which differ in length.

        Intervals are 95 % bootstraps over images.
        """
        values = np.array(self.values)
        masks = {"accuracy": np.ones(len(values), dtype=bool)}
        for name, labels in self.groups.items():
            for label in sorted(set(labels)) if name not in _TABLE_ONLY else ():
                key = f"{name}_{re.sub(r'[^a-z0-9]+', '_', label.lower()).strip('_')}"
                while key in masks:  # another label has the same key
                    key += "_"
                masks[key] = np.array(labels) == label
        names, images = np.unique(self.images, return_inverse=True)
        columns = [(images, values * mask, mask) for mask in masks.values()]
        resampled = _resampled_means(columns, len(names), seed)
        metrics = {}
        for (name, mask), means in zip(masks.items(), resampled.T, strict=True):
            metrics[name] = _percent(float(values[mask].mean()), means)
        if self.positive:
            metrics |= detection_metrics(self, images, seed)
        if self.missing:
            share = 100 * len(self.missing) / len(values)
            metrics["unanswered"] = Metric(value=share, higher_is_better=False)
        return metrics

    def tables(self, task: str) -> list[Table]:
        """Build a table for each grouping: group, number of questions, accuracy in percent."""
        values = np.array(self.values)
        tables = []
        for name, labels in self.groups.items():
            masks = {label: np.array(labels) == label for label in sorted(set(labels))}
            rows = tuple(
                (label, int(mask.sum()), 100 * float(values[mask].mean())) for label, mask in masks.items()
            )
            column = name.replace("_", " ")
            tables.append(
                Table(
                    title=f"{task} by {column}",
                    columns=(column, "questions", "accuracy"),
                    rows=rows,
                    compared="accuracy",
                    shared="questions",
                )
            )
        return tables


def detection_metrics(scores: Scores, images: NDArray[np.intp], seed: int) -> dict[str, Metric]:
    """Compute POPE's measures in percent, with `yes` as positive: means over its files, and each file's F1.

    Precision, recall and F1 are 0 where they would divide by 0. Intervals are bootstraps over images.

    Args:
        scores: of yes-or-no questions, whose group `sampling` is the file; one without a prediction counts as
            answered wrongly.
        images: index [Q] of each question's image.
        seed: of the bootstrap.
    """
    right, positive = np.array(scores.values) == 1, np.array(scores.positive)
    files = sorted(set(scores.groups["sampling"]))
    of_file = np.array([files.index(label) for label in scores.groups["sampling"]])
    cell = np.where(positive, np.where(right, 0, 1), np.where(right, 2, 3))  # TP, FN, TN, FP
    counts = np.zeros((images.max() + 1, len(files), 4))
    np.add.at(counts, (images, of_file, cell), 1)
    measured, resampled = _rates(counts.sum(axis=0)), _rates(resampled_sums(counts, seed=seed))
    metrics = {
        name: _percent(float(values.mean()), mean_present(resampled[name]))
        for name, values in measured.items()
    }
    metrics["yes_ratio"] = replace(metrics["yes_ratio"], higher_is_better=None)
    for place, file in enumerate(files):
        metrics[f"f1_{file}"] = _percent(float(measured["f1"][place]), resampled["f1"][:, place])
    return metrics


def _rates(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute rates [...] from counts [..., 4] of TP, FN, TN and FP; NaN where all are 0."""
    tp, fn, tn, fp = (counts[..., place] for place in range(4))
    absent = counts.sum(axis=-1) == 0  # a resample without a question of a file

    def share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(absent, np.nan, part / np.where(whole > 0, whole, 1))

    return {
        "f1": share(2 * tp, 2 * tp + fp + fn),
        "precision": share(tp, tp + fp),
        "recall": share(tp, tp + fn),
        "accuracy": share(tp + tn, tp + fn + tn + fp),
        "yes_ratio": share(tp + fp, tp + fn + tn + fp),
    }


def mean_accuracy(benchmarks: Sequence[Scores], seed: int = 0) -> Metric:
    """Compute the mean of the benchmarks' accuracies in percent; shared images are resampled together.

    Each is the mean over all questions, of POPE's files too, so that it follows from the records.
    """
    names, images = np.unique([name for one in benchmarks for name in one.images], return_inverse=True)
    parts = np.split(images, np.cumsum([len(one.images) for one in benchmarks])[:-1])
    columns = [
        (of, np.array(one.values), np.ones(len(of))) for of, one in zip(parts, benchmarks, strict=True)
    ]
    mean = np.mean([np.mean(one.values) for one in benchmarks])
    return _percent(float(mean), mean_present(_resampled_means(columns, len(names), seed)))


def _percent(mean: float, resampled: NDArray[np.float64]) -> Metric:
    low, high = interval(resampled)
    return Metric(value=100 * mean, low=100 * low, high=100 * high)


def _resampled_means(
    columns: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]], num_images: int, seed: int
) -> NDArray[np.float64]:
    """Compute bootstrap means [R, K] over P images, of K columns of (image indices, values, weights)."""
    sums = np.stack([np.bincount(images, values, num_images) for images, values, _ in columns], axis=1)
    counts = np.stack([np.bincount(images, held, num_images) for images, _, held in columns], axis=1)
    resampled = resampled_sums(np.stack([sums, counts], axis=1), seed=seed)  # [R, 2, K]
    with np.errstate(invalid="ignore"):  # NaN of a resample without a question of a group: ignored
        means: NDArray[np.float64] = resampled[:, 0] / resampled[:, 1]
    return means
