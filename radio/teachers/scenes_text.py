"""The text tower of the tiny scenes CLIP: open_clip's text transformer over the scenes' vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from ..checkpoint import digest
from ..errors import RadioError, did_you_mean, require
from ..io import brief
from ..scenes.language import VOCABULARY

# Letters: B batch, N texts, L context length, C summary width.

CONTEXT = 16
_PAD, _START = 0, 1
_FIRST_WORD = 2
_END = _FIRST_WORD + len(VOCABULARY)  # the highest id: open_clip's transformer pools at it
_NUMBERS = {word: _FIRST_WORD + i for i, word in enumerate(VOCABULARY)}


class TextError(RadioError):
    """A text with words outside the vocabulary, or too many words."""


def tokenize(texts: Sequence[str]) -> Tensor:
    """Convert texts to word ids between a start and an end token, padded with 0: [N, L] int64.

    Case and punctuation are ignored.

    Raises:
        TextError: a word outside the captions' vocabulary, or more words than fit.
    """
    numbers = torch.full((len(texts), CONTEXT), _PAD, dtype=torch.int64)
    for row, text in enumerate(texts):
        words = re.findall(r"[a-z0-9']+", text.lower())
        if len(words) > CONTEXT - 2:
            raise TextError(
                f"{text!r} has {len(words)} words; the scenes text tower reads {CONTEXT - 2} at most"
            )
        line = [_START, *(_number(word, text) for word in words), _END]
        numbers[row, : len(line)] = torch.tensor(line)
    return numbers


def _number(word: str, text: str) -> int:
    if word not in _NUMBERS:
        words = f"; it reads: {' '.join(VOCABULARY)} (its templates are --templates scenes)"
        near = did_you_mean(
            word, (known for known in VOCABULARY if len(known) > 3)
        )  # no suggestion of "a" or "of"
        raise TextError(f"the scenes text tower does not know {brief(word)} in {brief(text)}{near or words}")
    return _NUMBERS[word]


@final
class SceneText(nn.Module):
    """A text encoder from word ids [N, L] to vectors [N, C], and a `TextTower`, which encodes texts."""

    def __init__(self, *, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        library = require("open_clip.transformer", extra="zeroshot")
        self.transformer: Any = library.TextTransformer(
            context_length=CONTEXT,
            vocab_size=_END + 1,
            width=width,
            heads=heads,
            layers=layers,
            output_dim=out,
            pad_id=_PAD,
        )

    @property
    def fingerprint(self) -> str:
        """Hex hash of the weights and of the words in their order."""
        return digest(self.state_dict(), " ".join(VOCABULARY))

    def forward(self, numbers: Tensor) -> Tensor:
        """Map word ids [N, L] from `tokenize` to text vectors [N, C], not normalised."""
        out: Tensor = self.transformer(numbers)
        return out

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Encode texts as [N, C] in the image summary's space, not normalised, without gradients.

        Raises:
            TextError: as `tokenize`.
        """
        device = next(self.parameters()).device
        with torch.no_grad():
            return self.forward(tokenize(texts).to(device))

    def project(self, summaries: Tensor) -> Tensor:
        """Return the summaries [B, C] unchanged: the image tower's projection has already been applied."""
        return summaries
