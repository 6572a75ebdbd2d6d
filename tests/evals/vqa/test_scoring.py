"""The rules of the benchmarks: normalisation, soft accuracy, scores and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from evals.core.stats import interval, resamples
from evals.vqa.scoring import (
    CONTRACTIONS,
    Rule,
    Scores,
    clean,
    commonest,
    leave_one_out,
    m4c,
    mean_accuracy,
    official,
    vqa_accuracy,
)

BOTH = [
    ("Yes", "yes"),
    ("the cat", "cat"),
    ("An apple and a pear", "apple and pear"),
    ("another", "another"),  # an article only as a word
    ("two", "2"),
    ("none", "0"),
    ("Ten dogs", "10 dogs"),
    ("eleven", "eleven"),
    ("a  b\tc\nd", "b c d"),
    ("3.", "3"),
    ("3.5", "3.5"),
    (".5", ".5"),
    ("mr. smith", "mr smith"),
    ("u.s.a.", "usa"),
    ("v1.0.", "v1.0"),
    ("red/blue", "red blue"),  # between letters, a mark is a blank
    ("red / blue", "red blue"),  # beside a blank, it goes
    ("red- blue-green", "red bluegreen"),  # once beside a blank, it goes everywhere
    ("t-shirt", "t shirt"),
    ("(left)", "left"),
    ('"stop"', "stop"),
    ("wow!", "wow"),
    ("dont", "don't"),
    ("Wont", "won't"),
    ("don't", "don't"),
    ("youre not", "you're not"),
    ("oclock", "o'clock"),
    ("somebody'd", "somebodyd"),
    ("id", "id"),
    ("shed", "shed"),
    ("its", "its"),
    ("", ""),
    ("the", ""),
]


@pytest.mark.parametrize(("answer", "wanted"), BOTH)
def test_both_conventions(answer: str, wanted: str) -> None:
    assert official(answer) == wanted
    assert m4c(answer) == wanted


@pytest.mark.parametrize(
    ("answer", "as_official", "as_m4c"),
    [
        ("1,000", "1000", "1000"),
        ("1,000/2-3", "100023", "1000 2 3"),  # the comma is gone before m4c looks for it
        ("red,blue", "red blue", "redblue"),
        ("red, blue", "red blue", "red blue"),
        ("what?", "what", "what"),
        ("why?not", "why not", "whynot"),
        ("mcdonald's", "mcdonald's", "mcdonald 's"),
        ("wheres 's", "where's 's", "where's 's"),
    ],
)
def test_where_they_differ(answer: str, as_official: str, as_m4c: str) -> None:
    assert official(answer) == as_official
    assert m4c(answer) == as_m4c


def test_the_table_of_contractions() -> None:
    assert len(CONTRACTIONS) == 114  # the public table's 120, without 4 in capitals and 2 that change nothing
    for short, full in CONTRACTIONS.items():
        assert short != full
        assert short == short.lower()
        assert short.replace("'", "") == full.replace("'", "")
    some = {
        "aint": "ain't",
        "cant": "can't",
        "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've",
        "hed": "he'd",
        "shed've": "she'd've",
        "itll": "it'll",
        "mightve": "might've",
        "notve": "not've",
        "shant": "shan't",
        "therere": "there're",
        "twas": "'twas",
        "whens": "when's",
        "y'alld've": "y'all'd've",
        "'ows'at": "'ow's'at",
    }
    assert some.items() <= CONTRACTIONS.items()


def test_words_and_gaps_of_the_table() -> None:
    absent = "shed wed shell well ill its were id im shes let's somebodyd wheredve"
    assert not CONTRACTIONS.keys() & set(absent.split())


def test_clean_keeps_all_but_white_space() -> None:
    assert clean(" The\tA-team,\nNo. 1 ") == "The A-team, No. 1"


def by_loop(answer: str, truths: list[str]) -> float:
    """The rule as it is written: leave each person out, count the others that agree."""
    marks = []
    for left_out in range(len(truths)):
        others = [truth for person, truth in enumerate(truths) if person != left_out]
        marks.append(min(1.0, sum(other == answer for other in others) / 3))
    return sum(marks) / len(marks)


@pytest.mark.parametrize(
    ("matches", "worth"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)]
)
def test_ten_people(matches: int, worth: float) -> None:
    assert leave_one_out(matches) == pytest.approx(worth)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_it_is_the_mean_over_the_sets_of_others(count: int) -> None:
    for matches in range(count + 1):
        truths = ["x"] * matches + ["y"] * (count - matches)
        assert leave_one_out(matches, count) == pytest.approx(by_loop("x", truths))


UNANIMOUS = ["yes"] * 10
SPLIT = ["Two."] * 3 + ["2"] * 2 + ["the 3"] + ["three"] + ["many"] * 3


@pytest.mark.parametrize(
    ("answer", "truths", "official", "m4c", "llava"),
    [
        ("yes", UNANIMOUS, 1, 1, 1),
        ("Yes.", UNANIMOUS, 0, 1, 1),  # the official evaluation leaves unanimous answers alone
        ("\tyes\n", UNANIMOUS, 1, 1, 1),
        ("no", UNANIMOUS, 0, 0, 0),
        ("Yes", ["Yes"] * 10, 1, 1, 0),  # what LLaVA lowers no longer matches
        ("two", SPLIT, 1, 1, 1),  # five people, after all are normalised
        ("The 3!", SPLIT, 0.6, 0.6, 0.6),
        ("Many", SPLIT, 0.9, 0.9, 0.9),
        ("joe's", ["joe's"] * 9 + ["joe"], 1, 1, 0),  # nor does what it sets apart
        ("", SPLIT, 0, 0, 0),
    ],
)
def test_rules(answer: str, truths: list[str], official: float, m4c: float, llava: float) -> None:
    wanted: dict[Rule, float] = {"official": official, "m4c": m4c, "llava": llava}
    for rule, worth in wanted.items():
        assert vqa_accuracy(answer, truths, rule) == pytest.approx(worth), rule


def test_a_line_break_does_not_make_answers_differ() -> None:
    truths = ["yes"] * 9 + ["yes\n"]
    assert vqa_accuracy("Yes", truths, "official") == 0.0


def made(values: list[float], images: list[str], **groups: tuple[str, ...]) -> Scores:
    return Scores(values=tuple(values), images=tuple(images), groups=groups, missing=())


FOUR = made(
    [1.0, 0.0, 0.3, 1.0],
    ["b", "a", "b", "c"],
    answer_type=("yes/no", "number", "number", "yes/no"),
    topic=("x", "x", "y", "y"),
)


def test_means_and_groups_by_hand() -> None:
    metrics = FOUR.metrics()
    assert list(metrics) == ["accuracy", "answer_type_number", "answer_type_yes_no"]
    assert metrics["accuracy"].value == pytest.approx(57.5)
    assert metrics["answer_type_number"].value == pytest.approx(15.0)
    assert metrics["answer_type_yes_no"].value == 100.0
    assert (metrics["answer_type_yes_no"].low, metrics["answer_type_yes_no"].high) == (100.0, 100.0)


def test_tables() -> None:
    tables = {table.title: table for table in FOUR.tables("vqav2")}
    assert tables["vqav2 by answer type"].columns == ("answer type", "questions", "accuracy")
    assert tables["vqav2 by answer type"].rows == (("number", 2, pytest.approx(15.0)), ("yes/no", 2, 100.0))
    assert tables["vqav2 by topic"].rows == (("x", 2, 50.0), ("y", 2, pytest.approx(65.0)))


def test_questions_about_one_image_are_drawn_together() -> None:
    source = np.random.default_rng(1)
    images = source.integers(0, 40, 300)
    values = (source.random(300) < 0.2 + 0.6 * (images % 2)).astype(float)
    metric = made(values.tolist(), [f"p{number:02d}" for number in images]).metrics(seed=5)["accuracy"]
    drawn = []
    names = np.unique(images)
    for counts in np.concatenate(
        list(resamples(len(names), seed=5))
    ):  # the oracle: every resample's questions, one by one
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


def test_unanswered_questions_are_told() -> None:
    told = Scores(values=(0.0, 1.0), images=("a", "b"), groups={}, missing=("1",))
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
        for counts in np.concatenate(list(resamples(30, seed=5)))
    ]
    low, high = interval(np.array(drawn))
    assert metric.value == pytest.approx(50 * (values[0].mean() + values[1].mean()))
    assert (metric.low, metric.high) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert mean_accuracy(benchmarks[:1], seed=5) == benchmarks[0].metrics(seed=5)["accuracy"]


def test_a_benchmark_that_a_resample_lacks_is_left_out_of_its_mean() -> None:
    """The second has questions on one image of eight alone."""
    right = np.array([1.0, 0, 1, 0, 0, 1, 0, 1])
    names = [f"p{n}" for n in range(8)]
    metric = mean_accuracy([made(right.tolist(), names), made([1.0], ["p3"])], seed=5)
    drawn = [
        np.average(right, weights=w) if not w[3] else (np.average(right, weights=w) + 1) / 2
        for w in np.concatenate(list(resamples(8, seed=5)))
    ]
    assert (metric.low, metric.high) == pytest.approx(tuple(100 * np.percentile(drawn, [2.5, 97.5])))


def test_labels_that_are_spelled_alike_are_scores_of_their_own() -> None:
    scores = Scores(
        values=(1.0, 0.0, 0.5),
        images=("a", "b", "c"),
        groups={"kind": ("Yes/No", "yes no", "?")},
        missing=(),
    )
    found = {name: metric.value for name, metric in scores.metrics().items()}
    assert found == {"accuracy": 50.0, "kind_": 50.0, "kind_yes_no": 100.0, "kind_yes_no_": 0.0}


def test_the_commonest_answer_is_the_first_of_equals() -> None:
    assert commonest(["a", "b", "b", "c", "c"]) == "b"
