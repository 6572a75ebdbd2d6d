from __future__ import annotations

import pytest

from evals.vqa.benchmarks import choose, short, short_with_ocr
from evals.vqa.data import format_prompt
from radio.errors import DataError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicunas_conversation_to_the_letter() -> None:
    assert format_prompt("What is it?", has_image=True) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert format_prompt("What is it?", has_image=False) == f"{SYSTEM} USER: What is it? ASSISTANT:"


def test_the_mark_is_no_part_of_a_question() -> None:
    with pytest.raises(DataError, match="holds the mark <image> itself"):
        format_prompt("What is <image>?", has_image=True)


def test_the_benchmarks_prompts() -> None:
    end = "\nAnswer the question using a single word or phrase."
    assert short("Is it?") == f"Is it?{end}"
    assert short_with_ocr("what is NASA?", None) == f"What is NASA?{end}"
    assert short_with_ocr("what?", ["A", "b c"]) == f"What?\nReference OCR token: A, b c{end}"
    assert short_with_ocr("", []) == f"\nReference OCR token: {end}"
    last = "Answer with the option's letter from the given choices directly."
    assert choose("Which?", ["x", "y"], "") == f"Which?\nA. x\nB. y\n{last}"
    assert choose("Which?", ["x"], "So.") == f"Context: So.\nWhich?\nA. x\n{last}"
