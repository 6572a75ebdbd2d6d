from __future__ import annotations

import numpy as np
import pytest

from evals.core.stats import interval, resamples
from evals.vqa import scoring
from evals.vqa.scoring import Grouping, Scores, mean_accuracy


def made(values: list[float], images: list[str], **groups: Grouping) -> Scores:
    ids = tuple(str(place) for place in range(len(values)))
    return Scores(ids=ids, values=tuple(values), images=tuple(images), groups=groups, missing=())


FOUR = made(
    [1.0, 0.0, 0.3, 1.0],
    ["b", "a", "b", "c"],
    answer_type=Grouping(("yes/no", "number", "number", "yes/no")),
    topic=Grouping(("x", "x", "y", "y"), as_metrics=False),
)


def test_means_and_groups_by_hand() -> None:
    metrics = FOUR.metrics()
    assert list(metrics) == ["accuracy", "answer_type_number", "answer_type_yes_no"]
    assert metrics["accuracy"].value == pytest.approx(57.5)
    assert metrics["answer_type_number"].value == pytest.approx(15.0)
    assert metrics["answer_type_yes_no"].value == 100.0
    assert (metrics["answer_type_yes_no"].low, metrics["answer_type_yes_no"].high) == (100.0, 100.0)


def test_tables() -> None:
    tables = FOUR.tables()
    assert tables["answer_type"].columns == ("answer type", "questions", "accuracy")
    assert tables["answer_type"].rows == (("number", 2, pytest.approx(15.0)), ("yes/no", 2, 100.0))
    assert tables["topic"].rows == (("x", 2, 50.0), ("y", 2, pytest.approx(65.0)))


def test_questions_about_one_image_are_drawn_together() -> None:
    source = np.random.default_rng(1)
    images = source.integers(0, 40, 300)
    values = (source.random(300) < 0.2 + 0.6 * (images % 2)).astype(float)
    metric = made(values.tolist(), [f"p{number:02d}" for number in images]).metrics(seed=5)["accuracy"]
    drawn = []
    names = np.unique(images)
    for counts in resamples(len(names), seed=5):  # the oracle: every resample's questions, one by one
        chosen = [
            value
            for name, times in zip(names, counts, strict=True)
            for value in np.repeat(values[images == name], int(times))
        ]
        drawn.append(np.mean(chosen))
    low, high = interval(np.array(drawn))
    assert metric.low == pytest.approx(100 * low)
    assert metric.high == pytest.approx(100 * high)
    alone = made(values.tolist(), [str(place) for place in range(300)]).metrics(seed=5)["accuracy"]
    assert alone.low is not None and alone.high is not None and metric.low is not None
    assert metric.high - metric.low > alone.high - alone.low  # what goes together is worth less


def test_many_images_are_resampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(2)
    values = source.random(50).tolist()
    whole = made(values, [str(place) for place in range(50)]).metrics()["accuracy"]
    monkeypatch.setattr(scoring, "_CELLS", 50 * 130)
    parts = made(values, [str(place) for place in range(50)]).metrics()["accuracy"]
    assert parts.value == whole.value
    assert parts.low == pytest.approx(whole.low, abs=1.5) and parts.low != whole.low
    assert parts.high == pytest.approx(whole.high, abs=1.5)


def test_unanswered_questions_are_told() -> None:
    told = Scores(ids=("1", "2"), values=(0.0, 1.0), images=("a", "b"), groups={}, missing=("1",))
    metric = told.metrics()["unanswered"]
    assert (metric.value, metric.higher_is_better) == (50.0, False)


def test_the_mean_of_benchmarks_draws_a_image_for_all_of_them() -> None:
    source = np.random.default_rng(3)
    images = [np.arange(60) % 20, np.arange(30) % 30]  # the last ten are of the second alone
    values = [source.integers(0, 2, len(of)).astype(float) for of in images]
    benchmarks = [made(v.tolist(), [f"p{n:02d}" for n in of]) for v, of in zip(values, images, strict=True)]
    metric = mean_accuracy(benchmarks, seed=5)
    drawn = [
        np.mean([np.average(v, weights=counts[of]) for v, of in zip(values, images, strict=True)])
        for counts in resamples(30, seed=5)
    ]
    low, high = interval(np.array(drawn))
    assert metric.value == pytest.approx(50 * (values[0].mean() + values[1].mean()))
    assert (metric.low, metric.high) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert mean_accuracy(benchmarks[:1], seed=5) == benchmarks[0].metrics(seed=5)["accuracy"]


def test_labels_that_are_spelled_alike_are_scores_of_their_own() -> None:
    scores = Scores(
        ids=("1", "2", "3"),
        values=(1.0, 0.0, 0.5),
        images=("a", "b", "c"),
        groups={"kind": Grouping(("Yes/No", "yes no", "?"))},
        missing=(),
    )
    found = {name: metric.value for name, metric in scores.metrics().items()}
    assert found == {"accuracy": 50.0, "kind_": 50.0, "kind_yes_no": 100.0, "kind_yes_no_": 0.0}
