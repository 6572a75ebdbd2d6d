"""A backbone with words: its text vectors are fixed random numbers for each word, summed over a text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor


class Words:
    """A text tower in the space of the first `width` summary numbers; long texts give long vectors."""

    def __init__(self, width: int = 24) -> None:
        self.width = width
        self.texts = 0
        self.largest = 0

    @property
    def fingerprint(self) -> str:
        return f"words {self.width}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        self.texts += len(texts)
        self.largest = max(self.largest, len(texts))
        return torch.stack(
            [sum((self._word(word) for word in text.split()), torch.zeros(1)) for text in texts]
        )

    def project(self, summaries: Tensor) -> Tensor:
        return summaries[:, : self.width]

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def words() -> Words:
    return Words()
