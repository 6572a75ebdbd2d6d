"""POPE: its rule for answers, its files, and its measures against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from evals.core.evaluator import EvalRun, RunSettings, run_predictions
from evals.core.stats import resamples
from evals.core.task import make_evaluator
from evals.vqa.benchmarks import TaskFiles, open_benchmark
from evals.vqa.scenes import benchmarks, describe_questions, load_scenes
from evals.vqa.scoring import TASKS, Scores, detection_metrics, mean_accuracy, says_yes
from evals.vqa.settings import VqaSettings
from radio.errors import DataError

SAMPLINGS = ("random", "popular", "adversarial")


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("yes, there is a dog in the image.", True),
        ("No", False),
        ("no", False),
        ("No, there is not.", False),
        ("There is no dog", False),
        ("There is not, I think", False),
        ("Yes. No dog is there", True),  # the first sentence only
        ("I see nothing", True),  # not a word of its own
        ("NO", True),  # as published
        ("no\nyes", True),  # as published: words are split at blanks
        ("", True),
        (".no", True),
        ("n,o", False),  # commas go
    ],
)
def test_the_published_rule(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def write(folder: Path, count: int = 40, longer: int = 0, **changes: Any) -> dict[str, dict[str, bool]]:
    """Write the three files, each `longer` than the one before; return the right answers by file and id."""
    folder.mkdir(parents=True, exist_ok=True)
    truths: dict[str, dict[str, bool]] = {}
    for place, sampling in enumerate(SAMPLINGS):
        draws = np.random.default_rng(place)
        rows = [
            {
                "question_id": number + 1,
                "image": f"COCO_val2014_{number // 6:012d}.jpg",
                "text": "Is there a snowboard in the image?",
                "label": "yes" if draws.random() < 0.5 else "no",
                **changes,
            }
            for number in range(count + longer * place)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"coco_pope_{sampling}.json").write_text(text)
        truths[sampling] = {str(row["question_id"]): row["label"] == "yes" for row in rows}
    return truths


def answer_of(id: str) -> str:
    return ("Yes", "No", "yes, it is", "There is no such thing.")[hash_of(id) % 4]


def hash_of(id: str) -> int:
    return sum(map(ord, id)) * 7919 >> 3


def test_the_measures_are_scikit_learns_averaged_over_the_files(tmp_path: Path) -> None:
    truths = write(tmp_path / "pope", longer=25)
    benchmark = open_benchmark("pope", TaskFiles(questions=tmp_path / "pope"))
    assert (benchmark.name, len(benchmark.questions)) == ("pope coco", 40 + 65 + 90)
    first = benchmark.questions[0]
    assert (first.id, first.image) == ("random-1", "COCO_val2014_000000000000.jpg")
    assert first.prompt.endswith("image?\nAnswer the question using a single word or phrase.")
    answers = {question.id: answer_of(question.id) for question in benchmark.questions}
    scores = benchmark.score(answers)
    metrics = scores.metrics(seed=3)
    expected: dict[str, list[float]] = {}
    for sampling, right in truths.items():
        predicted = [says_yes(answers[f"{sampling}-{id}"]) for id in right]
        of_file = list(right.values())
        expected.setdefault("f1", []).append(f1_score(of_file, predicted))
        expected.setdefault("precision", []).append(precision_score(of_file, predicted))
        expected.setdefault("recall", []).append(recall_score(of_file, predicted))
        expected.setdefault("accuracy", []).append(accuracy_score(of_file, predicted))
        expected.setdefault("yes_ratio", []).append(float(np.mean(predicted)))
        assert metrics[f"f1_{sampling}"].value == pytest.approx(100 * expected["f1"][-1], abs=1e-6)
        assert metrics[f"sampling_{sampling}"].value == pytest.approx(100 * expected["accuracy"][-1])
    for name, values in expected.items():
        metric = metrics[name]
        assert metric.value == pytest.approx(100 * np.mean(values), abs=1e-6)
        assert metric.low is not None and metric.high is not None
        assert metric.low <= metric.value <= metric.high
    assert metrics["yes_ratio"].higher_is_better is None
    together = 100 * np.mean(scores.values)  # another value, as the files differ in length
    assert abs(metrics["accuracy"].value - together) > 0.1
    assert mean_accuracy([scores]).value == pytest.approx(together)  # as the records give it


def test_one_file_and_rates_that_would_divide_by_zero(tmp_path: Path) -> None:
    write(tmp_path, label="no")
    benchmark = open_benchmark("pope", TaskFiles(questions=tmp_path / "coco_pope_popular.json"))
    assert benchmark.name == "pope coco popular" and benchmark.questions[0].id == "1"
    metrics = benchmark.score({question.id: "No." for question in benchmark.questions}).metrics()
    named = {name: metric.value for name, metric in metrics.items()}
    assert named["accuracy"] == 100
    assert all(named[name] == 0 for name in ("f1", "precision", "recall", "yes_ratio", "f1_popular"))


def test_a_file_that_a_resample_lacks_counts_for_none_of_its_rates() -> None:
    """One file has a question on one image of six; the mean of accuracies against a slow loop."""
    images = np.array([0, 1, 2, 3, 4, 5, 5])
    right = np.array([1.0, 0, 1, 0, 1, 0, 1])
    files = ("random",) * 6 + ("popular",)
    told = Scores(
        values=tuple(right.tolist()),
        images=tuple(map(str, images)),
        groups={"sampling": files},
        missing=(),
        positive=(True,) * 7,
    )
    accuracy = detection_metrics(told, images, seed=2)["accuracy"]
    drawn = []
    for weights in np.concatenate(list(resamples(6, seed=2))):
        means = [np.average(right[:6], weights=weights)] + ([1.0] if weights[5] else [])
        drawn.append(100 * np.mean(means))
    assert (accuracy.low, accuracy.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_a_missing_answer_counts_as_wrong_where_that_is_allowed(tmp_path: Path) -> None:
    truths = write(tmp_path, count=4)["random"]
    benchmark = open_benchmark("pope", TaskFiles(questions=tmp_path / "coco_pope_random.json"))
    metrics = benchmark.score({}, allow_missing=True).metrics()
    assert metrics["f1"].value == 0 and metrics["unanswered"].value == 100
    assert metrics["yes_ratio"].value == 100 * (1 - sum(truths.values()) / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "coco_pope_popular.json").unlink(),
            "wanted the folder of coco_pope_random.json",
        ),
        (
            lambda root: (root / "gqa_pope_random.json").write_text("{}"),
            "got coco_pope_adversarial.json, coco_",
        ),
        (lambda root: (root / "coco_pope_random.json").write_text(""), None),
        (
            lambda root: (root / "coco_pope_random.json").write_text('{"question_id": 1}\n'),
            "coco_pope_random.json: line 1",
        ),
        (
            lambda root: (root / "coco_pope_random.json").write_text(
                '{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}\n'
            ),
            "label",
        ),
        (
            lambda root: (root / "coco_pope_random.json").write_text(
                '{"question_id": 1, "image": "a.jpg", "text": "?", "label": "no"}\n' * 2
            ),
            "two questions have the id random-1",
        ),
    ],
)
def test_files_that_are_not_popes_are_one_error(tmp_path: Path, change: Any, message: str | None) -> None:
    write(tmp_path)
    change(tmp_path)
    if message is None:
        assert len(open_benchmark("pope", TaskFiles(questions=tmp_path)).questions) == 80
        return
    with pytest.raises(DataError, match=message):
        open_benchmark("pope", TaskFiles(questions=tmp_path))


def test_files_that_it_does_not_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="pope does not read splits"):
        open_benchmark("pope", TaskFiles(questions=tmp_path, splits=tmp_path))
    with pytest.raises(DataError, match="pope has one rule, and got 'm4c'"):
        open_benchmark("pope", TaskFiles(questions=tmp_path), rule="m4c")
    with pytest.raises(DataError, match=r"questions\.json: wanted the folder of"):
        open_benchmark("pope", TaskFiles(questions=tmp_path / "questions.json"))


def test_a_report_of_pope_alone_has_the_f1_first(tmp_path: Path) -> None:
    truths = write(tmp_path / "pope", count=12)
    predictions = tmp_path / "answers.jsonl"
    lines = [
        {"question_id": f"{sampling}-{id}", "text": "Yes" if yes or id == "1" else "No"}
        for sampling, right in truths.items()
        for id, yes in right.items()
    ]
    predictions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = VqaSettings(task="pope", questions=tmp_path / "pope", predictions=predictions)
    report = run_predictions(make_evaluator("vqa"), settings, tmp_path / "out", run=RunSettings())
    assert report is not None and report.primary_metric == "pope"
    assert list(report.metrics)[:3] == ["pope", "accuracy", "pope_accuracy"]
    assert {f"pope_f1_{sampling}" for sampling in SAMPLINGS} < set(report.metrics)
    assert report.blocks[0].names == ("pope (F1)",)  # type: ignore[union-attr]


def test_the_generated_world_asks_whether_objects_are_there(tmp_path: Path) -> None:
    run = EvalRun(RunSettings(cache=tmp_path, device="cpu"), base="vqa", folder=tmp_path)
    scenes = load_scenes(run, "val", 30, describe_questions)
    before = benchmarks(scenes, TASKS)
    *same, pope = benchmarks(scenes, (*TASKS, "pope"))
    assert [each.fingerprint for each in same] == [each.fingerprint for each in before]
    vqav2 = {question.id: question for question in before[TASKS.index("vqav2")].questions}
    assert len(pope.questions) >= 30
    for question in pope.questions:
        twin = vqav2[question.id]
        assert (twin.text, twin.expected, twin.image) == (question.text, question.expected, question.image)
    right = pope.score({question.id: question.expected for question in pope.questions}).metrics()
    assert right["f1"].value == right["accuracy"].value == 100
    constant = pope.score({question.id: "yes" for question in pope.questions}).metrics()
    assert constant["yes_ratio"].value == 100 and constant["recall"].value == 100
    share = np.mean([question.expected == "yes" for question in pope.questions])
    assert constant["precision"].value == pytest.approx(100 * share)
