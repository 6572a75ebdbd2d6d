"""Prompts of the language model: LLaVA's two conversation templates, and the benchmarks' prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from radio.errors import DataError, did_you_mean

IMAGE = "<image>"
SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER_ANSWER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """A conversation template: `{system} {user}: {question} {assistant}: {answer}{end}{user}: …`."""

    name: str
    system: str
    user: str
    assistant: str
    separators: tuple[str, str]  # after the system text and each question, and after each answer


PLAIN = Template(name="plain", system="", user="", assistant="", separators=("", "\n"))
"""Stage 1: the image, its caption, a newline."""

VICUNA_V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    user="USER",
    assistant="ASSISTANT",
    separators=(" ", "</s>"),
)
"""Stage 2 and every evaluation of LLaVA-1.5."""

_TEMPLATES = {"plain": PLAIN, "v1": VICUNA_V1, "vicuna_v1": VICUNA_V1}


def template(name: str) -> Template:
    """Return the template `plain`, or `v1` (also `vicuna_v1`).

    Raises:
        DataError: an unknown name.
    """
    if name not in _TEMPLATES:
        raise DataError(
            f"no conversation is called {name!r}; there are {', '.join(_TEMPLATES)}"
            f"{did_you_mean(name, _TEMPLATES)}"
        )
    return _TEMPLATES[name]


def ask(conversation: Template, question: str, image: bool) -> str:
    """Format the prompt up to the model's answer; with an image, `<image>` marks its position.

    Args:
        conversation: the template.
        question: the user's whole text; empty for `plain`, which has no question.
        image: whether the prompt has an image; without one, it is that of a blind baseline.

    Raises:
        DataError: a question in a `plain` conversation, or one that contains `<image>` itself.
    """
    if IMAGE in question:
        raise DataError(f"a question holds the mark {IMAGE} itself: {question[:80]!r}; take it out")
    if not conversation.user:
        if question:
            raise DataError(
                f"a plain conversation holds an image and its caption, no question, and got "
                f"{question[:80]!r}; use v1"
            )
        return IMAGE if image else ""
    between = conversation.separators[0]
    asked = f"{conversation.user}: {IMAGE}\n{question}" if image else f"{conversation.user}: {question}"
    return f"{conversation.system}{between}{asked}{between}{conversation.assistant}:"


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
