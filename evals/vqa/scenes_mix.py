"""The generated world as LLaVA's training data: captions, and conversations that need the image.

The turns of one conversation never reveal an answer: a question that names the main object (about its
position) comes after the one about its colour or shape, and those two are never in one conversation. Some
conversations are without their image, so that the language model learns what can be guessed: a blind
baseline that had never seen such questions would be below chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from radio.images import write_png
from radio.io import write_text
from radio.scenes import CLASSES, COLOURS, SHAPES, Question, Scene, questions, render

from .prompts import IMAGE, choose, short
from .worlds import make_world

if TYPE_CHECKING:
    from radio.chunks import Damage

_HINTS = ("", "", "Look at the big object.")
_NUM_CHOICES = 4
_BLIND_EVERY = 10
_STREAM = 71  # random stream of the choices
PRETRAIN, INSTRUCT, IMAGES, _METADATA = "pretrain.json", "instruct.json", "images", "metadata.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """The parameters that determine the files."""

    count: int
    seed: int = 0
    size: int = 96
    version: int = 5


def write_mix(root: Path, mix: Mix, damage: Damage | None = None) -> None:
    """Write images and both stages' JSON into a folder, unless it exists; a damaged one is written again."""
    make_world(root, _METADATA, asdict(mix), partial(_fill, mix=mix), damage)


def _fill(root: Path, mix: Mix) -> None:
    captions, conversations = [], []
    for index in range(mix.count):
        scene = render(index, split="train", seed=mix.seed, size=mix.size)
        name = f"{index:08d}.png"
        _save(scene, root / IMAGES / name)
        # Only the name: most words of longer captions belong to the template, and would be learned first.
        captions.append(_row(f"{index}", name, [("", f"a {CLASSES[scene.label]}")]))
        talks = conversations_about(scene, index, mix.seed)
        for number, turns in enumerate(talks):
            is_blind = (index + number) % _BLIND_EVERY == 0
            conversations.append(_row(f"{index}-{number}", None if is_blind else name, turns))
    write_text(root / PRETRAIN, json.dumps(captions))
    write_text(root / INSTRUCT, json.dumps(conversations))


def conversations_about(scene: Scene, index: int, seed: int) -> list[list[tuple[str, str]]]:
    """Build the conversations about one scene, as (question, answer) turns."""
    generator = np.random.default_rng([_STREAM, seed, index])
    asked = {question.kind: question for question in questions(scene, index, split="train", seed=seed)}
    # another seed gives other questions about the same scene
    again = {question.kind: question for question in questions(scene, index, split="train", seed=seed + 1)}
    talks = [
        (asked["colour"], asked.get("position")),
        (asked["shape"], asked.get("count")),
        (asked["exists"],),
        (again["exists"],),
        (again.get("position"),),
        (again.get("count"), again["colour"]),
    ]
    found = [[_short(one) for one in talk if one is not None] for talk in talks]
    both = (asked["colour"], asked["shape"])
    found += [[_choice(question, generator)] for question in both]
    return [talk for talk in found if talk]


def _short(question: Question) -> tuple[str, str]:
    return short(question.text), question.answer


def _choice(question: Question, generator: np.random.Generator) -> tuple[str, str]:
    pool: Sequence[str] = COLOURS if question.kind == "colour" else SHAPES
    others = [word for word in pool if word != question.answer]
    chosen = [*generator.permutation(others)[: _NUM_CHOICES - 1].tolist(), question.answer]
    shown = generator.permutation(chosen).tolist()
    hint = _HINTS[int(generator.integers(len(_HINTS)))]
    return choose(question.text, shown, hint), ascii_uppercase[shown.index(question.answer)]


def _row(name: str, image: str | None, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    said = []
    for place, (question, answer) in enumerate(turns):
        mark = f"{IMAGE}\n" if image is not None and place == 0 else ""
        said += [{"from": "human", "value": f"{mark}{question}"}, {"from": "gpt", "value": answer}]
    head = {"id": name} if image is None else {"id": name, "image": image}
    return {**head, "conversations": said}


def _save(scene: Scene, path: Path) -> None:
    write_png(Image.fromarray(np.ascontiguousarray(scene.image.transpose(1, 2, 0))), path)
