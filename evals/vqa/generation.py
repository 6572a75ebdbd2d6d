"""Greedy answers of a trained LLaVA, in batches of similar length; finished chunks are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from pydantic import TypeAdapter
from torch import Tensor
from typing_extensions import TypedDict

from evals.core.evaluator import EvalRun
from radio.chunks import (
    DamagedError,
    check_all_there,
    chunk_path,
    find_missing,
    read_records,
    write_records,
)
from radio.provenance import fast_products

from .data import Piece, VisionInputs, format_prompt, pad, tokenize
from .language import LanguageModel
from .llava import limit_threads
from .scoring import Question

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


def make_prompt(question: Question, *, blind: bool = False) -> Prompt:
    """Format a benchmark's question as LLaVA-1.5's prompt; without its image if `blind`."""
    image = None if blind else question.image
    return Prompt(question.id, format_prompt(question.prompt, has_image=image is not None), image)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """A trained LLaVA, and its settings of generation."""

    model: Any
    language: LanguageModel
    inputs: VisionInputs | None  # None if no question has an image
    device: torch.device
    new_tokens: int
    batch: int
    bf16: bool = False

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers in order, generated in batches of similar length and one modality."""
        num_tokens = self.inputs.num_tokens if self.inputs else 0
        ids = [
            torch.tensor(tokenize([Piece(prompt.prompt, False)], self.language.tokenizer, num_tokens)[0])
            for prompt in prompts
        ]
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].image is None, len(ids[i]), i))
        answers = [""] * len(prompts)
        for start in range(0, len(order), self.batch):
            for is_blind in (False, True):
                rows = [
                    i for i in order[start : start + self.batch] if (prompts[i].image is None) == is_blind
                ]
                if rows:
                    texts = self._generate([ids[i] for i in rows], [prompts[i].image for i in rows])
                    for row, text in zip(rows, texts, strict=True):
                        answers[row] = text
        return answers

    def _generate(self, ids: Sequence[Tensor], images: Sequence[str | None]) -> list[str]:
        """Continue prompts of one modality."""
        padded = pad(ids, self.language.pad_token, left=True)
        batch = {name: value.to(self.device) for name, value in padded.items()}
        pixels = [self.inputs[image] for image in images if image is not None and self.inputs is not None]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels).float().to(self.device)
        with (
            torch.inference_mode(),
            fast_products(self.device),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16),
        ):
            output = self.model.generate(
                **batch,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.new_tokens,
                use_cache=True,
                eos_token_id=self.language.tokenizer.eos_token_id,
                pad_token_id=self.language.pad_token,
            )
        new = output[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.language.tokenizer.batch_decode(new, skip_special_tokens=True)]


def answer_all(
    prompts: Sequence[Prompt],
    generator: Generator,
    folder: Path,
    *,
    title: str,
    run: EvalRun,
) -> dict[str, str]:
    """Return every question's answer by its id, the same on every rank; chunks in the folder are reused.

    Rank r answers chunks r, r + world, ...

    Raises:
        DataError: an image that cannot be read, or ranks that do not share the folder.
    """
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    paths = [chunk_path(folder, number, "jsonl") for number in range(len(chunks))]

    def read(path: Path) -> dict[str, str]:
        answers = {row["question_id"]: row["answer"] for row in read_records(path, _ANSWER)}
        if list(answers) != [prompt.id for prompt in chunks[int(path.stem)]]:
            raise DamagedError(f"{path}: holds answers to other questions")
        return answers

    local = range(run.ranks.rank, len(chunks), run.ranks.world)
    missing = [local[position] for position in find_missing([paths[n] for n in local], read, run.damage)]
    if missing:
        with run.progress(title, sum(len(chunks[number]) for number in missing)) as advance:
            for number in missing:
                with limit_threads(generator.model, generator.device):
                    answers = generator.answer(chunks[number])
                pairs = zip(chunks[number], answers, strict=True)
                rows = [{"question_id": prompt.id, "answer": text} for prompt, text in pairs]
                write_records(paths[number], rows)
                advance(len(answers))
    run.ranks.barrier()
    check_all_there(paths)
    return {id: answer for path in paths for id, answer in read(path).items()}
