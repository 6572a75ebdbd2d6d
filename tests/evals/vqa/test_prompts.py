from __future__ import annotations

import pytest

from evals.vqa.prompts import PLAIN, VICUNA_V1, ask, choose, short, short_with_ocr, template
from radio.errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicunas_conversation_to_the_letter() -> None:
    assert ask(VICUNA_V1, "What is it?", True) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert ask(VICUNA_V1, "What is it?", False) == f"{SYSTEM} USER: What is it? ASSISTANT:"
    assert VICUNA_V1.separators == (" ", "</s>")


def test_the_plain_one_asks_nothing() -> None:
    assert ask(PLAIN, "", True) == "<image>"
    assert ask(PLAIN, "", False) == ""
    assert PLAIN.separators[1] == "\n"
    with pytest.raises(DataError, match="no question, and got 'What"):
        ask(PLAIN, "What is it?", True)


def test_the_mark_is_no_part_of_a_question() -> None:
    with pytest.raises(DataError, match="holds the mark <image> itself"):
        ask(VICUNA_V1, "What is <image>?", True)


def test_templates_by_name() -> None:
    assert (template("plain"), template("v1"), template("vicuna_v1")) == (PLAIN, VICUNA_V1, VICUNA_V1)
    with pytest.raises(DataError, match=r"no conversation is called 'vicuna'; .*did you mean vicuna_v1"):
        template("vicuna")


def test_the_benchmarks_prompts() -> None:
    end = "\nAnswer the question using a single word or phrase."
    assert short("Is it?") == f"Is it?{end}"
    assert short_with_ocr("what is NASA?", None) == f"What is NASA?{end}"
    assert short_with_ocr("what?", ["A", "b c"]) == f"What?\nReference OCR token: A, b c{end}"
    assert short_with_ocr("", []) == f"\nReference OCR token: {end}"
    last = "Answer with the option's letter from the given choices directly."
    assert choose("Which?", ["x", "y"], "") == f"Which?\nA. x\nB. y\n{last}"
    assert choose("Which?", ["x"], "So.") == f"Context: So.\nWhich?\nA. x\n{last}"
