from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evals.core.evaluator import EvalRun, RunSettings
from evals.zeroshot import texts as module
from evals.zeroshot.data import read_templates
from evals.zeroshot.texts import class_vectors, classifier, text_vectors
from radio.dist import Ranks
from radio.errors import DataError
from radio.hub import load_teacher
from radio.scenes import CLASSES, TEMPLATES
from radio.types import TextTower

NAMES = tuple(f"red thing {number}" for number in range(23))
SAID = ("a {}", "a photo of a {} here", "{}, it is")


def at(cache: Path, *, device: str = "cpu", group: Ranks | None = None) -> EvalRun:
    run = EvalRun(RunSettings(cache=cache, device="cpu"), base="", folder=cache, ranks=group)
    run.device = torch.device(device)
    return run


def slowly(tower: TextTower, names: tuple[str, ...], templates: tuple[str, ...]) -> torch.Tensor:
    """The protocol one prompt at a time: encode, normalise, mean, normalise."""
    columns = []
    for name in names:
        vectors = [F.normalize(tower.encode([t.replace("{}", name)])[0], dim=0) for t in templates]
        columns.append(F.normalize(torch.stack(vectors).mean(0), dim=0))
    return torch.stack(columns, dim=1)


def test_the_classifier_equals_one_prompt_at_a_time(words: Any) -> None:
    ours = class_vectors(words, NAMES, SAID)
    assert ours.shape == (24, 23)
    torch.testing.assert_close(ours, slowly(words, NAMES, SAID), atol=1e-5, rtol=0)


def test_every_prompt_is_normalised_before_the_mean() -> None:
    class Two:
        fingerprint = "two"

        def encode(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[100.0, 0.0] if text.startswith("x") else [0.0, 1.0] for text in texts])

        def project(self, summaries: torch.Tensor) -> torch.Tensor:
            return summaries

    torch.testing.assert_close(
        class_vectors(Two(), ["n"], ["x {}", "y {}"])[:, 0], torch.tensor([0.5**0.5, 0.5**0.5])
    )


def test_of_the_shipped_clip_too_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = load_teacher("scenes:clip").text
    assert tower is not None
    expected = slowly(tower, CLASSES[:13], TEMPLATES)
    for batch in (1, 4, 100):
        monkeypatch.setattr(module, "_CLASSES_AT_ONCE", batch)
        torch.testing.assert_close(class_vectors(tower, CLASSES[:13], TEMPLATES), expected, atol=1e-5, rtol=0)


def test_an_open_clip_models_own_classifier_is_ours() -> None:
    """open_clip's function on open_clip's model and tokenizer, and ours through the teacher."""
    import open_clip

    from radio.teachers.base import ClipText
    from radio.teachers.openclip import _TextSide

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES[:3], SAID, num_classes_per_batch=2)
    tower = ClipText(_TextSide(model), lambda: tokenizer, "open_clip 77")
    torch.testing.assert_close(class_vectors(tower, NAMES[:3], SAID), theirs, atol=1e-5, rtol=0)


def test_it_is_made_once_and_again_for_other_words(words: Any, tmp_path: Path) -> None:
    first = classifier(words, NAMES, SAID, at(tmp_path))
    assert words.texts == 23 * 3 and words.largest <= 30
    assert torch.equal(classifier(words, NAMES, SAID, at(tmp_path)), first)
    assert words.texts == 23 * 3
    classifier(words, NAMES[:5], SAID, at(tmp_path))
    classifier(words, NAMES, SAID[:1], at(tmp_path))
    assert words.texts == 23 * 3 + 15 + 23
    (file, *_) = sorted((tmp_path / "texts").iterdir(), key=lambda path: path.stat().st_mtime)
    file.write_bytes(b"damaged")
    assert torch.equal(classifier(words, NAMES, SAID, at(tmp_path)), first)


def test_a_tower_of_weights_goes_to_the_device_and_comes_back(tmp_path: Path) -> None:
    """A tensor on the fake device that met one of the CPU would raise."""

    class Tower(nn.Module):
        fingerprint = "tower"

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(3, 8)
            self.moves: list[str] = []

        def to(self, *arguments: Any) -> Any:
            self.moves.append(str(arguments[0]))
            return self

        def encode(self, texts: Any) -> torch.Tensor:
            assert self.moves == ["cuda:1"]
            return self.table(torch.ones(len(texts), 3))

        def project(self, summaries: torch.Tensor) -> torch.Tensor:
            return summaries

    tower = Tower()
    text_vectors(tower, ["a", "b"], at(tmp_path, device="cuda:1"))
    assert tower.moves == ["cuda:1", "cpu"]


def test_one_rank_encodes_and_the_others_read(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "gather_objects", lambda self, value: [value])  # one after the other here
    first = classifier(words, NAMES, SAID, at(tmp_path, group=Ranks(0, 2)))
    assert words.texts == 23 * 3
    second = classifier(words, NAMES, SAID, at(tmp_path, group=Ranks(1, 2)))
    assert words.texts == 23 * 3 and torch.equal(first, second)
    with pytest.raises(DataError, match="a folder that all share"):
        classifier(words, NAMES, SAID, at(tmp_path / "own", group=Ranks(1, 2)))
    assert words.texts == 23 * 3


def test_a_tower_that_fails_goes_back_to_the_cpu(tmp_path: Path) -> None:
    class Failing(nn.Linear):
        fingerprint = "failing"

        def encode(self, texts: list[str]) -> torch.Tensor:
            raise RuntimeError(f"on {self.weight.device}")

        def project(self, summaries: torch.Tensor) -> torch.Tensor:
            return summaries

    tower = Failing(1, 1)
    moved: list[torch.device | str] = []
    tower.to = lambda device: moved.append(device)  # type: ignore[assignment,method-assign]
    with pytest.raises(RuntimeError, match="on cpu"):
        text_vectors(tower, ["a"], at(tmp_path, device="meta"))
    assert moved == [torch.device("meta"), "cpu"]


def test_captions_are_unit_vectors_in_their_order(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TEXTS_AT_ONCE", 4)
    texts = [f"a caption of {number} words" for number in range(11)]
    found = text_vectors(words, texts, at(tmp_path))
    expected = torch.cat([F.normalize(words.encode([text]), dim=1) for text in texts])
    torch.testing.assert_close(found, expected)


def test_templates_of_open_clip_and_of_the_world() -> None:
    import open_clip

    filled = [template.replace("{}", "cat") for template in read_templates(None, scenes=False)]
    assert filled == [template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(filled) == 80
    assert len(read_templates("simple", scenes=True)) == 7
    assert read_templates(None, scenes=True) == TEMPLATES
