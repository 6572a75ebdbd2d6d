"""Tokens and labels, by hand; batches; swapped images."""

from __future__ import annotations

import pytest
import torch

from evals.vqa.data import IGNORED, Conversations, Piece, Record, Sample, Turn, collate, pad, pieces, tokenize
from evals.vqa.language import LanguageModel
from evals.vqa.llava import ShuffledImages


def spoken(tiny: LanguageModel, ids: list[int]) -> list[str]:
    return [tiny.tokenizer.convert_ids_to_tokens(number) for number in ids]


def test_two_turns_token_by_token(tiny: LanguageModel) -> None:
    record = Record("1", "red.png", (Turn("What colour is it?", "red"), Turn("And grass?", "green blue")))
    ids, labels = tokenize(pieces(record, "v1", tiny.tokenizer.eos_token), tiny.tokenizer, 3)
    words = spoken(tiny, ids)
    system = words[1]
    assert system.startswith("A chat between") and system.endswith("user's questions.")  # one token
    assert words == [
        *("<s>", system, "USER", ":", "<image>", "<image>", "<image>", "\n"),
        *("What colour is it?", "ASSISTANT", ":", "red", "</s>"),
        *("USER", ":", "And", "grass", "?", "ASSISTANT", ":", "green", "blue", "</s>"),
    ]
    learned = ["" if label == IGNORED else word for word, label in zip(words, labels, strict=True)]
    assert learned == [*[""] * 11, "red", "</s>", *[""] * 7, "green", "blue", "</s>"]
    kept = [(number, label) for number, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert all(number == label for number, label in kept)


def test_of_a_plain_record_the_caption_alone_is_learned(tiny: LanguageModel) -> None:
    record = Record("1", "red.png", (Turn("", "red is blue"),))
    ids, labels = tokenize(pieces(record, "plain", tiny.tokenizer.eos_token), tiny.tokenizer, 2)
    assert spoken(tiny, ids) == ["<s>", "<image>", "<image>", "red", "is", "blue", "\n"]
    assert labels == [IGNORED, IGNORED, IGNORED, *ids[3:]]


def test_a_token_across_the_border_is_not_learned(tiny: LanguageModel) -> None:
    parts = [Piece("What colour ", False), Piece("is it?", True)]  # one token of the tiny tokenizer
    assert tokenize(parts, tiny.tokenizer, 0)[1] == [IGNORED, IGNORED]


def test_samples_carry_their_image_and_are_cut(
    tiny: LanguageModel, records: list[Record], shown: object
) -> None:
    data = Conversations(records, "v1", tiny.tokenizer, shown, longest=9)  # type: ignore[arg-type]
    assert len(data) == 5
    assert data.modalities() == [True] * 4 + [False]
    assert data.lengths() == [9, 9, 9, 9, 8]  # words, and four tokens of an image
    assert data[0].image is not None and data[0].image.shape == (4, 3)
    assert data[4].image is None
    assert [len(data[place].ids) for place in (0, 4)] == [9, 9]
    assert torch.equal(data[4].ids, Conversations(records, "v1", tiny.tokenizer, None, 99)[4].ids[:9])


def test_batches_are_filled_up(tiny: LanguageModel) -> None:
    image = torch.ones(4, 3)
    short = Sample(torch.tensor([5, 6]), torch.tensor([IGNORED, 6]), image)
    long = Sample(torch.tensor([7, 8, 9]), torch.tensor([IGNORED, 8, 9]), None)
    batch = collate([short, long], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]
    assert batch["pixel_values"].shape == (1, 4, 3)
    assert "pixel_values" not in collate([long], 0)
    left = pad([short.ids, long.ids], 0, left=True)
    assert left["input_ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert left["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_swapped_images(shown: object) -> None:
    swapped = ShuffledImages(shown, {"red.png": "blue.png"})  # type: ignore[arg-type]
    assert swapped.num_tokens == 4
    assert torch.equal(swapped["red.png"], shown["blue.png"])  # type: ignore[index]
    with pytest.raises(KeyError):
        swapped["blue.png"]
