"""Answers: greedy, in batches of like length, each chunk of questions written down as it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from evals.core.chunks import (
    Damage,
    DamagedError,
    check_all_there,
    chunk_path,
    find_missing,
    read_records,
    write_records,
)
from evals.core.dist import Group
from evals.core.evaluator import Watch
from evals.core.provenance import fast_products

from .conversations import Piece
from .language import Language
from .library import fitting_threads
from .prompts import VICUNA_V1, ask
from .samples import Shown, pad_left, tokenize
from .tasks import Question

# Letters: B batch, S tokens of a prompt, T tokens of a picture.

CHUNK = 128  # questions a file: what a killed run loses at most


class _Answer(TypedDict):
    question_id: str
    answer: str


_ANSWER = TypeAdapter(_Answer)


class Asked(NamedTuple):
    """A question, ready for the language model."""

    id: str
    prompt: str  # holds the mark of the picture, or does not
    image: str | None


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Speaker:
    """A trained LLaVA, and how it is asked."""

    model: Any
    language: Language
    shown: Shown | None  # None where no question has a picture
    device: torch.device
    new_tokens: int
    batch: int
    bf16: bool = False

    def answer(self, questions: Sequence[Asked]) -> list[str]:
        """The answers, in order; batches are of like length, and of one modality."""
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

    def _ids(self, question: Asked) -> Tensor:
        ids, _ = tokenize(
            [Piece(question.prompt, False)], self.language, self.shown.num_tokens if self.shown else 0
        )
        return torch.tensor(ids)

    def _speak(self, prompts: Sequence[Tensor], images: Sequence[str | None]) -> list[str]:
        batch = {
            name: value.to(self.device) for name, value in pad_left(prompts, self.language.pad_token).items()
        }
        shown = self.shown
        pictures = [shown[image] for image in images if image is not None and shown is not None]
        if pictures:
            batch["pixel_values"] = torch.stack(pictures).float().to(self.device)
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
    questions: Sequence[Asked],
    speaker: Speaker,
    folder: Path,
    *,
    title: str,
    group: Group,
    watch: Watch,
    damage: Damage | None = None,
) -> dict[str, str]:
    """Every question's answer by its id, from the folder as far as they are there; the same on every rank.

    Rank r answers chunks r, r + world, ...

    Args:
        damage: learns of damaged files in the folder, which are made again.

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


def prepare(question: Question, *, blind: bool = False) -> Asked:
    """A benchmark's question as LLaVA-1.5 is asked; blind, without the picture."""
    image = None if blind else question.image
    return Asked(question.id, ask(VICUNA_V1, question.prompt, image is not None), image)
