from __future__ import annotations

from evals.vqa.scoring import commonest


def test_the_commonest_answer_is_the_first_of_equals() -> None:
    assert commonest(["a", "b", "b", "c", "c"]) == "b"
