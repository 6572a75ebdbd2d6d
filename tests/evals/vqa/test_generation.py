"""Answers: the same at any batch, written as they come, taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.core.evaluator import EvalRun, RunSettings
from evals.vqa import evaluator
from evals.vqa.evaluator import answer_all
from evals.vqa.language import LanguageModel
from evals.vqa.llava import Generator, Prompt, make_llava, make_prompt
from evals.vqa.scoring import BenchmarkQuestion
from radio.chunks import write_records

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def make_speaker(backbone: Callable[..., Any], tiny: LanguageModel, shown: Any) -> Callable[[int], Generator]:
    model = make_llava(backbone(), tiny, (32, 32), 4, layer_norm=False, seed=0)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight = torch.nn.Parameter(head)  # a head of its own: tied, it would repeat itself

    def make(batch: int) -> Generator:
        return Generator(
            model=model,
            language=tiny,
            inputs=shown,
            device=torch.device("cpu"),
            new_tokens=6,
            batch=batch,
        )

    return make


@pytest.fixture
def asked() -> list[Prompt]:
    """Prompts of many lengths, some of them without an image."""
    found = []
    for number in range(20):
        text = " ".join(["What is it?", *["And grass?"] * (number % 5)])
        image = f"{COLOURS[number % 4]}.png" if number % 3 else None
        found.append(make_prompt(BenchmarkQuestion(str(number), image, text, text)))
    return found


def test_a_batch_answers_like_one_by_one(
    make_speaker: Callable[[int], Generator], asked: list[Prompt]
) -> None:
    alone = make_speaker(1).answer(asked)
    assert make_speaker(8).answer(asked) == alone
    assert make_speaker(64).answer(asked) == alone
    assert len(set(alone)) > 5


def test_the_prompt_is_vicunas_and_blind_drops_the_image() -> None:
    question = BenchmarkQuestion("7", "a.png", "Q?", "Q?\nAnswer.")
    seen, blind = make_prompt(question), make_prompt(question, blind=True)
    assert seen.prompt.endswith("user's questions. USER: <image>\nQ?\nAnswer. ASSISTANT:")
    assert blind == Prompt("7", seen.prompt.replace("<image>\n", ""), None)


def test_answers_are_written_as_they_come_and_taken_up(
    make_speaker: Callable[[int], Generator],
    asked: list[Prompt],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluator, "CHUNK", 6)
    speaker = make_speaker(4)
    context = EvalRun(RunSettings(), base="", folder=tmp_path)

    def run() -> dict[str, str]:
        return answer_all(asked, speaker, tmp_path, title="gqa", run=context)

    whole = run()
    assert list(whole) == [str(number) for number in range(20)]
    assert list(whole.values()) == speaker.answer(asked)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in files] == [
        7,
        7,
        7,
        3,
    ]  # a checksum, and a line an answer
    files[1].unlink()
    write_records(files[2], [{"question_id": str(n), "answer": "kept"} for n in range(12, 18)])
    again = run()
    assert [again[str(n)] for n in range(6, 12)] == [whole[str(n)] for n in range(6, 12)]  # asked anew
    assert {again[str(n)] for n in range(12, 18)} == {"kept"}  # found


class Parrot:
    """Says one thing to each question, whatever it is."""

    model, device = torch.nn.Linear(2, 2), torch.device("cpu")

    def __init__(self) -> None:
        self.asked = 0

    def answer(self, questions: list[Prompt]) -> list[str]:
        self.asked += len(questions)
        return [
            ["left\u2028right", "a\x85b", "half \ud83d", ""][int(question.id) % 4] for question in questions
        ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"\x80\x04K\x01.",  # a pickle
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"[" * 100_000,
        lambda text: text.replace(b"left", b"gone"),
        lambda text: text.replace(b'"question_id": "1"', b'"question_id": "9"'),
        None,  # a folder
    ],
)
def test_damaged_answers_are_asked_for_again_and_told(
    damage: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    questions = [Prompt(str(number), "what?", None) for number in range(4)]
    parrot, context = Parrot(), EvalRun(RunSettings(), base="", folder=tmp_path)
    seen = context.damage

    def run() -> dict[str, str]:
        return answer_all(
            questions,
            parrot,  # type: ignore[arg-type]
            tmp_path,
            title="",
            run=context,
        )

    fresh = run()
    assert fresh["0"] == "left\u2028right" and fresh["1"] == "a\x85b" and run() == fresh
    assert (parrot.asked, seen.notes()) == (4, ())
    (file,) = tmp_path.iterdir()
    if damage is None:
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(damage(file.read_bytes()))
    assert run() == fresh and parrot.asked == 8
    assert "1 damaged file of the cache was made again; the first: " in seen.notes()[0]
