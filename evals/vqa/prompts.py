"""How a question is put to the language model: LLaVA's two conversations, and the protocols' prompts."""

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
    """A kind of conversation: `{system} {user}: {question} {assistant}: {answer}{end}{user}: …`."""

    name: str
    system: str
    user: str
    assistant: str
    separators: tuple[str, str]  # behind the system text and each question, and behind each answer


PLAIN = Template(name="plain", system="", user="", assistant="", separators=("", "\n"))
"""Stage 1: the picture, its caption, a line's end."""

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
    """The conversation called `plain`, or `v1` (also `vicuna_v1`).

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
    """The text up to where the model answers; with a picture, `<image>` marks its place.

    Args:
        conversation: the template.
        question: the user's whole text; empty for `plain`, which asks nothing.
        image: whether there is a picture: without one, the text is that of a blind baseline.

    Raises:
        DataError: a question in a `plain` conversation, or one that holds the mark itself.
    """
    if IMAGE in question:
        raise DataError(f"a question holds the mark {IMAGE} itself: {question[:80]!r}; take it out")
    if not conversation.user:
        if question:
            raise DataError(
                f"a plain conversation holds a picture and its caption, no question, and got "
                f"{question[:80]!r}; use v1"
            )
        return IMAGE if image else ""
    between = conversation.separators[0]
    asked = f"{conversation.user}: {IMAGE}\n{question}" if image else f"{conversation.user}: {question}"
    return f"{conversation.system}{between}{asked}{between}{conversation.assistant}:"


def short(question: str) -> str:
    """The prompt of GQA and VQAv2."""
    return f"{question}\n{SHORT_ANSWER}"


def short_with_ocr(question: str, tokens: Sequence[str] | None) -> str:
    """The prompt of TextVQA: the question with a capital, then the OCR tokens where there is a list of them.

    The data set writes questions in small letters; LLaVA asks them with a capital, and keeps the line of the
    tokens where there are none.
    """
    read = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
    return short(f"{question[:1].upper()}{question[1:]}{read}")


def choose(question: str, choices: Sequence[str], context: str) -> str:
    """The prompt of ScienceQA: context (where there is one), question, lettered choices."""
    before = f"Context: {context}\n" if context else ""
    lettered = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)
    )
    return f"{before}{question}\n{lettered}\n{LETTER_ANSWER}"
