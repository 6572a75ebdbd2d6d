"""The images as inputs of LLaVA: cached tokens of the frozen encoder, or pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from evals.core.features import Extraction, extract
from evals.core.views import View
from radio.chunks import Damage
from radio.data import ImageSource
from radio.dist import Group
from radio.errors import DataError
from radio.memory import check_memory
from radio.progress import ProgressFactory
from radio.types import Backbone

from .images import Padded
from .presets import Size
from .presets import View as ViewName
from .samples import VisionInputs
from .token_grid import choose_grid, resample

# Letters: N images, T tokens of an image, D token width, h w input size.

_ENCODED_AT_ONCE = 64


@final
@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A frozen backbone at one size, and where its tokens are cached."""

    model: Backbone
    size: Size
    device: torch.device
    dtype: torch.dtype
    cache: Path
    token_cache_gb: float
    workers: int
    group: Group
    watch: ProgressFactory
    damage: Damage  # collects damaged files of the cache
    image_tokens: int | None = None  # maximum of T

    @cached_property
    def own_grid(self) -> tuple[int, int]:
        """(H, W) of the backbone's tokens at this size."""
        check_memory(self.model, 1, self.size, self.device, torch.float32)
        model = self.model.to(self.device, torch.float32).eval()  # bf16 would round the weights in place
        with torch.inference_mode():
            return model(torch.zeros(1, 3, *self.size, device=self.device)).grid

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the tokens that the language model receives."""
        return choose_grid(self.own_grid, self.image_tokens)

    def show(self, source: ImageSource, view: ViewName) -> VisionInputs:
        """Encode each image of the source once; if all tokens exceed `token_cache_gb`, return pixels instead.

        Raises:
            DataError: an image that cannot be read; names the first.
            RadioError: tokens that are not finite.
        """
        seen: ImageSource = Padded(source, self.size) if view == "pad" else source
        shape = View(kind="center", size=self.size, ratio=1.0, nearest_size=self.model.nearest_size)
        height, width = self.grid
        count = len(source.keys) * height * width * self.model.token_dim
        if 4 * count > self.token_cache_gb * 1e9:
            return Pixels(seen, shape, height * width)
        how = Extraction(
            view=shape,
            device=self.device,
            dtype=self.dtype,
            head="tokens" if self.grid == self.own_grid else f"tokens averaged to {height}x{width}",
            project=lambda features: resample(features.tokens, features.grid, (height, width)),
            batch=_ENCODED_AT_ONCE,
            workers=self.workers,
        )
        stored = extract(
            self.model,
            seen,
            how,
            cache=self.cache,
            group=self.group,
            watch=self.watch,
            damage=self.damage,
        )
        broken = stored.skipped()
        if broken:
            raise DataError(
                f"{source.name}: {len(broken)} of {len(source.keys)} images cannot be read; the first is "
                f"{broken[0].key}: {broken[0].reason}"
            )
        return Tokens(source.keys, stored.load().features)


@final
class Tokens:
    """Tokens by image name."""

    def __init__(self, names: Iterable[str], tokens: Tensor) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._tokens = tokens  # [N, T, D]

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of an image."""
        return self._tokens.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        return self._tokens[self._rows[name]]


@final
class Pixels:
    """Pixels by image name, read on access; the vision tower then encodes them."""

    def __init__(self, source: ImageSource, view: View, num_tokens: int) -> None:
        self._source, self._view, self._num_tokens = source, view, num_tokens
        self._rows = {name: row for row, name in enumerate(source.keys)}

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of an image."""
        return self._num_tokens

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._view(self._source.read(self._rows[name]))
        except DataError as error:
            raise DataError(f"{self._source.name}: {name}: {error}") from error
