"""Greedy answers, in batches of similar length; each chunk of questions is saved when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from radio.chunks import (
    Damage,
    DamagedError,
    check_all_there,
    chunk_path,
    find_missing,
    read_records,
    write_records,
)
from radio.dist import Group
from radio.progress import ProgressFactory
from radio.provenance import fast_products

from .conversations import Piece
from .language import Language
from .library import fitting_threads
from .prompts import VICUNA_V1, ask
from .samples import VisionInputs, pad_left, tokenize
from .tasks import Question

# Letters: B batch, S tokens of a prompt, T tokens of an image.

CHUNK = 128  # questions per file: a killed run loses no more than these


class _Answer(TypedDict):
    question_id: str
    answer: str


_ANSWER = TypeAdapter(_Answer)


class Prompt(NamedTuple):
    """A question, ready for the language model."""

    id: str
    prompt: str  # with `<image>` where it has an image
    image: str | None


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """A trained LLaVA, and its settings of generation."""

    model: Any
    language: Language
    shown: VisionInputs | None  # None if no question has an image
    device: torch.device
    new_tokens: int
    batch: int
    bf16: bool = False

    def answer(self, questions: Sequence[Prompt]) -> list[str]:
        """Return the answers in order, generated in batches of similar length and one modality."""
        prompts = [self._ids(question) for question in questions]
        places = sorted(range(len(questions)), key=lambda p: (questions[p].image is None, len(prompts[p]), p))
        answers = [""] * len(questions)
        for start in range(0, len(places), self.batch):
            chosen = places[start : start + self.batch]
            for group in (
                [place for place in chosen if questions[place].image is not None],
                [place for place in chosen if questions[place].image is None],
            ):
                if group:
                    said = self._speak([prompts[p] for p in group], [questions[p].image for p in group])
                    for place, text in zip(group, said, strict=True):
                        answers[place] = text
        return answers

    def _ids(self, question: Prompt) -> Tensor:
        ids, _ = tokenize(
            [Piece(question.prompt, False)], self.language, self.shown.num_tokens if self.shown else 0
        )
        return torch.tensor(ids)

    def _speak(self, prompts: Sequence[Tensor], images: Sequence[str | None]) -> list[str]:
        batch = {
            name: value.to(self.device) for name, value in pad_left(prompts, self.language.pad_token).items()
        }
        shown = self.shown
        pixels = [shown[image] for image in images if image is not None and shown is not None]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels).float().to(self.device)
        with (
            torch.inference_mode(),
            fast_products(self.device),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            spoken = self.model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.new_tokens,
                use_cache=True,
                eos_token_id=self.language.tokenizer.eos_token_id,
                pad_token_id=self.language.pad_token,
            )
        new = spoken[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.language.tokenizer.batch_decode(new, skip_special_tokens=True)]


def answer_all(
    questions: Sequence[Prompt],
    speaker: Generator,
    folder: Path,
    *,
    title: str,
    group: Group,
    watch: ProgressFactory,
    damage: Damage | None = None,
) -> dict[str, str]:
    """Return every question's answer by its id, the same on every rank; chunks in the folder are reused.

    Rank r answers chunks r, r + world, ...

    Args:
        damage: collects damaged files in the folder, which are written again.

    Raises:
        DataError: ranks do not share the folder.
    """
    chunks = [questions[start : start + CHUNK] for start in range(0, len(questions), CHUNK)]
    paths = [chunk_path(folder, number, "jsonl") for number in range(len(chunks))]

    def read(path: Path) -> dict[str, str]:
        answers = {row["question_id"]: row["answer"] for row in read_records(path, _ANSWER)}
        if list(answers) != [question.id for question in chunks[int(path.stem)]]:
            raise DamagedError(f"{path}: holds answers to other questions")
        return answers

    mine = range(group.rank, len(chunks), group.world)
    missing = [
        mine[place] for place in find_missing([paths[number] for number in mine], read, damage or Damage())
    ]
    if missing:
        with watch(title, sum(len(chunks[number]) for number in missing)) as advance:
            for number in missing:
                with fitting_threads(speaker.model, speaker.device):
                    said = speaker.answer(chunks[number])
                write_records(
                    paths[number],
                    (
                        {"question_id": question.id, "answer": text}
                        for question, text in zip(chunks[number], said, strict=True)
                    ),
                )
                advance(len(said))
    group.barrier()
    check_all_there(paths)
    return {question: answer for path in paths for question, answer in read(path).items()}


def prepare(question: Question, *, blind: bool = False) -> Prompt:
    """Format a benchmark's question as LLaVA-1.5's prompt; without its image if `blind`."""
    image = None if blind else question.image
    return Prompt(question.id, ask(VICUNA_V1, question.prompt, image is not None), image)
