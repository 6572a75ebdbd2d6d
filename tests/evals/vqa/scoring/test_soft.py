from __future__ import annotations

import pytest

from evals.vqa.scoring import Rule, leave_one_out, vqa_accuracy


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
