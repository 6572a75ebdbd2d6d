"""Benchmarks from published files, and the user's own questions. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal, NotRequired, get_args

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from radio.errors import DataError, did_you_mean, shown
from radio.io import MAX_DATA_BYTES, parse_json, read_text, validate

from .records import Records, Row, read_list
from .scoring import (
    LETTERS,
    NUM_ANSWERS,
    Benchmark,
    BenchmarkQuestion,
    ScoreFn,
    commonest,
    exact_or_soft,
    score_exact,
    score_letter,
    score_yes_no,
    vqa_accuracy,
)
from .settings import RULED, Rule, Task, TaskFiles

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


_NEEDLESS: dict[Task, tuple[str, ...]] = {
    "gqa": ("annotations", "splits", "ocr", "ocr_file"),
    "vqav2": ("splits", "ocr", "ocr_file"),
    "textvqa": ("annotations", "splits"),
    "scienceqa": ("annotations", "ocr", "ocr_file"),
    "pope": ("annotations", "splits", "ocr", "ocr_file"),
    "custom": ("annotations", "splits", "ocr", "ocr_file"),
}


def open_benchmark(
    task: Task, files: TaskFiles, *, rule: Rule | None = None, limit: int | None = None
) -> Benchmark:
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
    if task not in RULED and rule is not None:
        raise DataError(f"{task} has one rule, and got {rule!r}; leave that out")
    if rule is not None and rule not in get_args(Rule):
        raise DataError(f"no rule {rule!r}; there are {', '.join(get_args(Rule))}")
    if task == "vqav2":
        benchmark = read_vqav2(files, rule or "official")
    elif task == "textvqa":
        benchmark = read_textvqa(files, rule or "m4c")
    else:
        readers = {"gqa": read_gqa, "scienceqa": read_scienceqa, "pope": read_pope, "custom": read_custom}
        benchmark = readers[task](files)
    digest = hashlib.sha256(benchmark.split.encode())
    questions = pope_files(files.questions).values() if task == "pope" else (files.questions,)
    for path in (*questions, files.annotations, files.splits, files.ocr_file):
        if path is not None:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return replace(benchmark, images=files.images, fingerprint=digest.hexdigest()).limited(limit)


def short(question: str) -> str:
    """Format the prompt of GQA and VQAv2."""
    return f"{question}\n{SHORT_ANSWER}"


def short_with_ocr(question: str, tokens: Sequence[str] | None) -> str:
    """Format the prompt of TextVQA: the question with a capital, then the OCR tokens (None: no such line).

    The data set has questions in lower case; LLaVA capitalises them, and writes the line of the tokens even
    if the list is empty.
    """
    read = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
    return short(f"{question[:1].upper()}{question[1:]}{read}")


def choose(question: str, choices: Sequence[str], context: str) -> str:
    """Format the prompt of ScienceQA: context (if not empty), question, lettered choices."""
    before = f"Context: {context}\n" if context else ""
    lettered = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)
    )
    return f"{before}{question}\n{lettered}\n{LETTER_ANSWER}"


_GQA_SPLITS = ("testdev", "val", "train", "challenge", "test")  # in this order: `testdev` contains `test`


def read_gqa(files: TaskFiles) -> Benchmark:
    """Read GQA (D. A. Hudson and C. D. Manning 2019): one right answer each, exact match.

    Only balanced questions are scored; the ids of others are accepted in predictions.

    Raises:
        DataError: no such file, not a GQA file, or an unknown split.
    """
    records = Records(files.questions, "GQA's questions", "{id: {question, imageId, isBalanced, answer}}")
    rows = records.rows()
    balanced = [row for row in rows if records.get(row, "isBalanced", bool)]
    if not balanced:
        raise DataError(
            f"{files.questions}: none of its {len(rows)} questions is balanced; nothing is scored"
        )
    has_answers = any("answer" in row.data for row in balanced)
    questions = []
    for row in balanced:
        text, image = records.get(row, "question", str), f"{records.identity(row, 'imageId')}.jpg"
        answer = records.get(row, "answer", str) if has_answers else ""
        score = partial(score_exact, truth=answer) if has_answers else None
        types = row.data.get("types")
        groups = gqa_groups(types if isinstance(types, dict) else {})
        questions.append(BenchmarkQuestion(row.key, image, text, short(text), score, answer, groups))
    # The split labels the scores, as val and testdev differ.
    words = re.split(r"[^a-z]+", files.questions.name.lower())
    split = _split(files, next((split for split in _GQA_SPLITS if split in words), None), "its name")
    known = frozenset(row.key for row in rows)
    return Benchmark(task="gqa", split=split, questions=tuple(questions), known=known)


def _split(files: TaskFiles, named: str | None, source: str) -> str:
    """Return the split that the questions are named by their `source`, or else by the user."""
    if named is None and files.split is None:
        raise DataError(f"{files.questions}: {source} does not say which split it is; give it, such as val")
    if named is not None and files.split not in (None, named):
        raise DataError(
            f"{files.questions}: is {named} by {source}, and the split asked for is {files.split}"
        )
    return named or str(files.split)


def gqa_groups(types: Mapping[str, Any]) -> dict[str, str]:
    """Return a question's structural and semantic type, and whether it is open or binary."""
    groups = {name: str(types[name]) for name in ("structural", "semantic") if types.get(name)}
    if "structural" in groups:
        groups["form"] = "open" if groups["structural"] == "query" else "binary"
    return groups


def read_vqav2(files: TaskFiles, rule: Rule = "official") -> Benchmark:
    """Read VQAv2 (Y. Goyal et al. 2017): questions about COCO's images, each with ten people's answers.

    Without a file of annotations the answers cannot be scored, only submitted.

    Raises:
        DataError: no such file, not a VQAv2 file, or questions without annotations.
    """
    layout = "{data_subtype, questions: [{question_id, image_id, question}]}"
    records = Records(files.questions, "VQAv2's questions", layout)
    rows = records.rows("questions")
    subtype = records.top("data_subtype")
    if subtype is None:
        raise records.refuse("the file", "has no 'data_subtype', which names the images")
    questions = []
    for row in rows:
        text, image = records.get(row, "question", str), _coco_name(records, row, subtype)
        questions.append(
            BenchmarkQuestion(str(records.get(row, "question_id", int)), image, text, short(text))
        )
    known = records.unique([question.id for question in questions])
    split = _split(files, re.sub(r"\d+$", "", subtype), "its 'data_subtype'")
    if files.annotations is not None:
        questions = _annotated(files.annotations, questions, subtype, rule)
    return Benchmark(task="vqav2", split=split, questions=tuple(questions), known=known)


def _coco_name(records: Records, row: Row, subtype: str) -> str:
    folder = subtype.replace("-dev", "")  # test-dev uses some of the test images
    return f"COCO_{folder}_{records.get(row, 'image_id', int):012d}.jpg"


def _annotated(
    path: Path, questions: Sequence[BenchmarkQuestion], subtype: str, rule: Rule
) -> list[BenchmarkQuestion]:
    """Add the answer type and the ten answers to each question."""
    layout = "{data_subtype, annotations: [{question_id, answer_type, answers: [ten of {answer}]}]}"
    records = Records(path, "VQAv2's annotations", layout)
    rows = records.rows("annotations")
    annotated = records.top("data_subtype")
    if annotated not in (None, subtype):
        raise DataError(
            f"{path}: holds the annotations of {annotated}, and the questions are those of {subtype}"
        )
    ids = [str(records.get(row, "question_id", int)) for row in rows]
    records.unique(ids)
    by_id = dict(zip(ids, rows, strict=True))
    absent = [question.id for question in questions if question.id not in by_id]
    if absent:
        raise DataError(
            f"{path}: {len(absent)} of the {len(questions)} questions have no annotation, the first is "
            f"{absent[0]}; give the annotations of these questions"
        )
    annotated_questions = []
    for question in questions:
        row = by_id[question.id]
        if "image_id" in row.data and _coco_name(records, row, subtype) != question.image:
            raise DataError(
                f"{path}: the annotation of question {question.id} is of image {row.data['image_id']}, and "
                f"the question is about {question.image}; give the annotations of these questions"
            )
        given = records.get(row, "answers", list)
        answers = [entry.get("answer") for entry in given if isinstance(entry, dict)]
        texts = tuple(answer for answer in answers if isinstance(answer, str))
        if len(texts) != NUM_ANSWERS or len(given) != NUM_ANSWERS:
            raise records.refuse(row.name, f"its 'answers' hold {len(texts)} answers, not {NUM_ANSWERS}")
        groups = {"answer_type": records.get(row, "answer_type", str)}
        annotated_questions.append(replace(_answered_by(question, texts, rule), groups=groups))
    return annotated_questions


def _answered_by(question: BenchmarkQuestion, people: Sequence[str], rule: Rule) -> BenchmarkQuestion:
    score = partial(vqa_accuracy, truths=people, rule=rule)
    return replace(question, score=score, expected=commonest(people))


def read_textvqa(files: TaskFiles, rule: Rule = "m4c") -> Benchmark:
    """Read TextVQA (A. Singh et al. 2019): questions about text in an image, with ten people's answers.

    With `files.ocr` the prompts have OCR tokens.

    Raises:
        DataError: no such file, not a TextVQA file, or images without OCR tokens.
    """
    layout = "{data: [{question_id, image_id, question, answers: [ten texts]}]}"
    records = Records(files.questions, "TextVQA's questions", layout)
    rows = records.rows("data")
    images = [records.get(row, "image_id", str) for row in rows]
    has_answers = any("answers" in row.data for row in rows)
    questions = []
    for row, image, tokens in zip(rows, images, _ocr_tokens(files, records, rows, images), strict=True):
        id, text = records.identity(row, "question_id"), records.get(row, "question", str)
        question = BenchmarkQuestion(id, f"{image}.jpg", text, short_with_ocr(text, tokens))
        if has_answers:
            ten = records.texts(row, "answers")
            if len(ten) != NUM_ANSWERS:
                raise records.refuse(row.name, f"its 'answers' hold {len(ten)} answers, not {NUM_ANSWERS}")
            question = _answered_by(question, ten, rule)
        questions.append(question)
    named = records.top("dataset_type") or rows[0].data.get("set_name")
    split = _split(files, named if isinstance(named, str) else None, "its content")
    known = records.unique([question.id for question in questions])
    return Benchmark(task="textvqa", split=split, questions=tuple(questions), known=known)


def _ocr_tokens(
    files: TaskFiles, records: Records, rows: Sequence[Row], images: Sequence[str]
) -> Sequence[Sequence[str] | None]:
    if not files.ocr:
        if files.ocr_file is not None:
            raise DataError(f"{files.ocr_file}: OCR tokens are given and not asked for; turn OCR on as well")
        return [None] * len(rows)
    if files.ocr_file is None:
        if not all("ocr_tokens" in row.data for row in rows):
            raise DataError(
                f"{files.questions}: the questions hold no 'ocr_tokens'; give the file of OCR tokens, or "
                f"turn OCR off"
            )
        return [records.texts(row, "ocr_tokens") for row in rows]
    ocr = Records(files.ocr_file, "OCR tokens", "{data: [{image_id, ocr_tokens}]}")
    by_image: dict[str, tuple[str, ...]] = {}
    for row in ocr.rows("data"):
        image, tokens = ocr.get(row, "image_id", str), ocr.texts(row, "ocr_tokens")
        if by_image.setdefault(image, tokens) != tokens:
            raise ocr.refuse(row.name, f"gives {image} other tokens than an earlier record")
    absent = [image for image in images if image not in by_image]
    if absent:
        raise DataError(
            f"{files.ocr_file}: has no tokens for {len(set(absent))} images of {files.questions.name}, "
            f"the first is {absent[0]}"
        )
    return [by_image[image] for image in images]


_SPLITS = TypeAdapter(dict[str, list[int | str]])
_YOUNG = frozenset(f"grade{number}" for number in range(1, 7))


def read_scienceqa(files: TaskFiles) -> Benchmark:
    """Read ScienceQA-IMG (P. Lu et al. 2022): multiple-choice school questions with an image.

    The ids of questions without an image are accepted in predictions, and not scored.

    Raises:
        DataError: no such file, not a ScienceQA file, no such split, or a split without images.
    """
    if files.splits is None:
        raise DataError("ScienceQA's problems need their splits; give pid_splits.json too")
    split = files.split or "test"
    layout = "{id: {question, choices, answer, hint, image}}"
    records = Records(files.questions, "ScienceQA's problems", layout)
    problems = {row.key: row for row in records.rows()}
    ids = _split_ids(files.splits, split)
    absent = [id for id in ids if id not in problems]
    if absent:
        raise DataError(
            f"{files.questions}: has no problem {shown(absent[0][:80])}, which {files.splits.name} lists "
            f"under {split}, nor {len(absent) - 1} others"
        )
    rows = [problems[id] for id in ids if records.get(problems[id], "image", object)]
    if not rows:
        raise DataError(f"{files.questions}: no problem of {split} has an image; nothing is scored")
    questions = []
    for row in rows:
        choices, answer = records.texts(row, "choices"), records.get(row, "answer", int)
        if not 0 <= answer < len(choices) or len(choices) > len(LETTERS):
            problem = f"its 'answer' is {reprlib.repr(answer)}, and it has {len(choices)} choices"
            raise records.refuse(row.name, problem)
        text = records.get(row, "question", str)
        prompt = choose(text, choices, records.get(row, "hint", str).strip())
        folder = str(row.data.get("split") or split.removeprefix("mini"))
        if files.images is not None and not os.path.isdir(files.images / folder):  # noqa: PTH112 (never raises)
            folder = ""  # `images` is the split's own folder
        image = "/".join(part for part in (folder, row.key, records.get(row, "image", str)) if part)
        right, groups = LETTERS[answer], scienceqa_groups(row.data)
        score = partial(score_letter, right=right)
        questions.append(BenchmarkQuestion(row.key, image, text, prompt, score, right, groups))
    known = frozenset(ids)
    return Benchmark(
        task="scienceqa", split=split, questions=tuple(questions), known=known, missing_is_wrong=True
    )


def scienceqa_groups(problem: Mapping[str, Any]) -> dict[str, str]:
    """Return a problem's subject, grade and topic."""
    names = ("subject", "grade", "topic")
    groups = {name: str(problem[name]) for name in names if isinstance(problem.get(name), str)}
    groups = {name: label for name, label in groups.items() if label}
    if "grade" in groups:
        groups["grade"] = "1-6" if groups["grade"] in _YOUNG else "7-12"
    return groups


def _split_ids(path: Path, split: str) -> list[str]:
    data = parse_json(read_text(path, limit=MAX_DATA_BYTES), path)
    splits = validate(_SPLITS, data, f"{shown(path)} (wanted ScienceQA's splits, {{test: [ids], …}})")
    if split not in splits:
        raise DataError(
            f"{shown(path)}: has no split {split!r}; there are "
            f"{', '.join(map(shown, list(splits)[:20]))}{did_you_mean(split, splits)}"
        )
    return list(dict.fromkeys(str(id) for id in splits[split]))


class _Pope(TypedDict):
    """One question of POPE's."""

    question_id: int | str
    image: str
    text: str
    label: Literal["yes", "no"]


_POPE = TypeAdapter(_Pope)
_POPE_FILES = ("random", "popular", "adversarial")  # how the absent objects are sampled
_POPE_NAME = re.compile(rf"(\w+)_pope_({'|'.join(_POPE_FILES)})\.json")


def pope_files(path: Path) -> dict[str, Path]:
    """Return POPE's files by their sampling: the one at a path, or the three in a folder.

    Raises:
        DataError: other names, not all three of them, or those of several data sets.
    """
    names = [path.name]
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir() if _POPE_NAME.fullmatch(child.name))
    matches = [match for match in map(_POPE_NAME.fullmatch, names) if match]
    found = {match[2]: path / match[0] if path.is_dir() else path for match in matches}
    alike = len({match[1] for match in matches}) == 1
    if not alike or (path.is_dir() and len(found) < len(_POPE_FILES)):
        raise DataError(
            f"{shown(path)}: wanted the folder of coco_pope_random.json, coco_pope_popular.json and "
            f"coco_pope_adversarial.json, or one of them; got {shown(', '.join(names[:4])) or 'none of them'}"
        )
    return {name: found[name] for name in _POPE_FILES if name in found}


def read_pope(files: TaskFiles) -> Benchmark:
    """Read POPE (Y. Li et al. 2023): is this object in the image, yes or no, from one file or all three.

    The ids of the three files repeat; with all of them an id is `random-1`.

    Raises:
        DataError: not POPE's files, a record of another form, or two of one id.
    """
    questions, paths = [], pope_files(files.questions)
    for sampling, path in paths.items():
        for where, data in read_list(path):
            row = validate(_POPE, data, f"{shown(path)}: {where}")
            id, text, label = str(row["question_id"]), row["text"], row["label"]
            questions.append(
                BenchmarkQuestion(
                    id if len(paths) == 1 else f"{sampling}-{id}",
                    row["image"],
                    text,
                    short(text),
                    partial(score_yes_no, right=label),
                    label,
                    {"sampling": sampling},
                )
            )
    if not questions:
        raise DataError(f"{shown(files.questions)}: holds no questions")
    known = Counter(question.id for question in questions)
    twice = [id for id, count in known.items() if count > 1]
    if twice:
        raise DataError(f"{shown(files.questions)}: two questions have the id {shown(twice[0][:80])}")
    split = next(iter(paths.values())).name.partition("_pope_")[0]
    split = split if len(paths) > 1 else f"{split} {next(iter(paths))}"
    return Benchmark(task="pope", split=split, questions=tuple(questions), known=frozenset(known))


class _Custom(TypedDict):
    """One question of the user's own."""

    question: str
    image: NotRequired[str | None]  # a file below the images folder, with its extension
    id: NotRequired[int | str]  # default: the number of the question
    answer: NotRequired[str]
    answers: NotRequired[list[str]]
    choices: NotRequired[list[str]]  # the answer is one of them
    category: NotRequired[str]


_CUSTOM = TypeAdapter(_Custom)
_MAX_CATEGORIES = 200


def read_custom(files: TaskFiles) -> Benchmark:
    """Read the user's own questions: one JSON object per line or a JSON list, with right answers.

    Raises:
        DataError: no such file, an empty file, a question that does not fit the schema or is not answered,
            or two of one id.
    """
    path = files.questions
    rows = [(f"{shown(path)}: {where}", row) for where, row in read_list(path)]
    if not rows:
        raise DataError(f'{shown(path)}: holds no questions; wanted {{"image", "question", "answer"}} a line')
    questions = []
    known: set[str] = set()
    for number, (where, data) in enumerate(rows, start=1):
        row = validate(_CUSTOM, data, where)
        text, choices, id = row["question"], row.get("choices"), str(row.get("id", number))
        score, answer = _custom_score(row, where)
        if id in known:
            raise DataError(f"{shown(path)}: two questions have the id {shown(id[:80])}; each has its own")
        known.add(id)
        prompt = short(text) if choices is None else choose(text, choices, "")
        groups = {"category": row["category"]} if row.get("category") else {}
        questions.append(BenchmarkQuestion(id, row.get("image"), text, prompt, score, answer, groups))
    categories = {question.groups.get("category", "") for question in questions}
    if len(categories) > _MAX_CATEGORIES:
        raise DataError(
            f"{shown(path)}: has {len(categories)} categories; wanted {_MAX_CATEGORIES} at most, each is a "
            f"score of its own"
        )
    split = files.split or path.stem
    return Benchmark(task="custom", split=split, questions=tuple(questions), known=frozenset(known))


def _custom_score(row: _Custom, where: str) -> tuple[ScoreFn, str]:
    """Return the scoring function of a question, and the right or most common answer."""
    answers = [*([row["answer"]] if "answer" in row else []), *row.get("answers", [])]
    if not answers or not all(answer.strip() for answer in answers) or not row["question"].strip():
        raise DataError(f"{where}: wanted a question with one or more answers, none of them empty")
    choices = row.get("choices")
    if choices is None:
        return partial(exact_or_soft, truths=answers), commonest(answers)
    if not 2 <= len(choices) <= len(LETTERS) or len(answers) != 1 or choices.count(answers[0]) != 1:
        raise DataError(
            f"{where}: wanted 2 to {len(LETTERS)} choices, and one answer that is one of them; got "
            f"{len(choices)} choices and {len(answers)} answers"
        )
    right = LETTERS[choices.index(answers[0])]
    return partial(score_letter, right=right), right
