"""Small training conversations with images, and a language model made of their words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.vqa.data import Record, Turn
from evals.vqa.language import LanguageModel, TinyShape, load_library, open_language
from evals.vqa.llava import PROJECTOR, learn, make_llava
from evals.vqa.settings import StagePlan

load_library()

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}
SHAPE = TinyShape(width=32, layers=2, heads=2, feed_forward=64)
ALL = (PROJECTOR, "model.language_model.", "lm_head.")
PLAN = StagePlan(
    template="v1",
    view="pad",
    learns=("projector", "language"),
    lr=1e-2,
    weight_decay=0.0,
    batch=4,
    micro_batch=4,
    steps=6,
    warmup=2,
    save_every=2,
)


def row(name: str, image: str | None, *turns: str) -> dict[str, Any]:
    """A record of LLaVA's, its turns alternating between human and gpt."""
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    head = {"id": name} if image is None else {"id": name, "image": image}
    return {**head, "conversations": said}


@pytest.fixture
def records() -> list[Record]:
    """A record a colour, and one without an image."""
    seen = [Record(c, f"{c}.png", (Turn("What colour is it?", c),)) for c in COLOURS]
    return [*seen, Record("text", None, (Turn("What is the sky?", "blue"), Turn("And grass?", "green")))]


@pytest.fixture
def tiny(records: list[Record]) -> LanguageModel:
    """A language model of 32 wide layers."""
    return open_language("tiny", records, SHAPE, 0)


class Shades:
    """Tokens [4, 3] of one colour by an image's name."""

    num_tokens = 4

    def __getitem__(self, name: str) -> torch.Tensor:
        colour = torch.tensor(COLOURS[name.removesuffix(".png")]) / 255
        return colour.expand(4, 3)


@pytest.fixture
def shown() -> Shades:
    """The images of `records`."""
    return Shades()


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes rows into a file `data.json`."""

    def save(rows: Any) -> Path:
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
        return path

    return save


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Makes a record of LLaVA's."""
    return row


@pytest.fixture
def make_model(backbone: Callable[..., Any], tiny: LanguageModel) -> Callable[..., Any]:
    def make(learns: tuple[str, ...] = ALL) -> Any:
        model = make_llava(backbone(), tiny, (32, 32), 4, layer_norm=False, seed=0)
        learn(model, learns)
        return model

    return make
