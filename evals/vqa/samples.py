"""Records as samples of tokens and labels, and their collation into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .conversations import Piece, Record, Template, pieces
from .language import Language

# Letters: B batch, S tokens of a sample, T tokens of an image, D token width, h w input size.

IGNORED = -100
"""The label of tokens without a loss."""


class VisionInputs(Protocol):
    """The model's input for each image, by name."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of an image."""

    def __getitem__(self, name: str) -> Tensor:
        """Return tokens [T, D], or pixels [3, h, w] in [0, 1]."""


class Sample(NamedTuple):
    """One conversation as input of the model."""

    ids: Tensor  # [S] int64
    labels: Tensor  # [S] int64, IGNORED for tokens without a loss
    image: Tensor | None


def tokenize(parts: Sequence[Piece], language: Language, num_tokens: int) -> tuple[list[int], list[int]]:
    """Tokenize a text as a whole into ids and labels; a token is learned if its text is.

    Every `<image>` becomes `num_tokens` placeholders. The tokenizer's begin token, if it has one, comes
    first.
    """
    tokenizer: Any = language.tokenizer
    text = "".join(part.text for part in parts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = _learned_spans(parts)
    ids: list[int] = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    labels = [IGNORED] * len(ids)
    for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if token == language.image_token:
            ids += [token] * num_tokens
            labels += [IGNORED] * num_tokens
            continue
        is_learned = stop > start and any(first <= start and stop <= last for first, last in spans)
        ids.append(token)
        labels.append(token if is_learned else IGNORED)
    return ids, labels


def _learned_spans(parts: Sequence[Piece]) -> list[tuple[int, int]]:
    spans, place = [], 0
    for part in parts:
        if part.learned:
            spans.append((place, place + len(part.text)))
        place += len(part.text)
    return spans


@final
class Conversations(Dataset[Sample]):
    """Records as samples.

    Args:
        shown: the images; None if no record has any.
        longest: maximum tokens of a sample; longer ones are truncated.
    """

    def __init__(
        self,
        records: Sequence[Record],
        template: Template,
        language: Language,
        shown: VisionInputs | None,
        longest: int,
    ) -> None:
        self._records, self._template, self._language = records, template, language
        self._shown, self._longest = shown, longest
        self._num_tokens = shown.num_tokens if shown is not None else 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, place: int) -> Sample:
        record = self._records[place]
        parts = pieces(record, self._template, self._language.end)
        ids, labels = tokenize(parts, self._language, self._num_tokens)
        image = None
        if record.image is not None:
            assert self._shown is not None
            image = self._shown[record.image]
        return Sample(torch.tensor(ids[: self._longest]), torch.tensor(labels[: self._longest]), image)

    def lengths(self) -> list[int]:
        """Estimate the length of each sample: its words, and the tokens of its image."""
        return [
            sum(len(text.split()) for turn in record.turns for text in turn)
            + (self._num_tokens if record.image is not None else 0)
            for record in self._records
        ]

    def modalities(self) -> list[bool]:
        """Return for each sample whether it has an image."""
        return [record.image is not None for record in self._records]


@final
class Batch:
    """Collates samples into a batch, padded on the right."""

    def __init__(self, pad_token: int) -> None:
        self._pad_token = pad_token

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Collate into `input_ids`, `attention_mask`, `labels` [B, S]; `pixel_values` if there are images."""
        batch = {
            **pad_right([sample.ids for sample in samples], self._pad_token),
            "labels": _stack([sample.labels for sample in samples], IGNORED, left=False),
        }
        images = [sample.image for sample in samples if sample.image is not None]
        if images:
            batch["pixel_values"] = torch.stack(images).float()
        return batch


def pad_right(ids: Sequence[Tensor], pad_token: int) -> dict[str, Tensor]:
    """Pad on the right, for training: `input_ids` and `attention_mask` [B, S]."""
    return _padded(ids, pad_token, left=False)


def pad_left(ids: Sequence[Tensor], pad_token: int) -> dict[str, Tensor]:
    """Pad on the left, for generation: `input_ids` and `attention_mask` [B, S] end in the last column."""
    return _padded(ids, pad_token, left=True)


def _padded(ids: Sequence[Tensor], pad_token: int, *, left: bool) -> dict[str, Tensor]:
    ones = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": _stack(ids, pad_token, left=left),
        "attention_mask": _stack(ones, 0, left=left),
    }


def _stack(rows: Sequence[Tensor], fill: int, *, left: bool) -> Tensor:
    longest = max(len(row) for row in rows)
    stacked = torch.full((len(rows), longest), fill, dtype=torch.int64)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        stacked[place, where] = row
    return stacked


@final
class ShuffledImages:
    """Images under the names of other images: the control of whether training uses the images."""

    def __init__(self, shown: VisionInputs, swaps: Mapping[str, str]) -> None:
        self._shown, self._swaps = shown, swaps

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of an image."""
        return self._shown.num_tokens

    def __getitem__(self, name: str) -> Tensor:
        return self._shown[self._swaps[name]]
