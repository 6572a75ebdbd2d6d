"""All pictures, chunk by chunk: loaded ahead, shared among ranks, each chunk's records kept as one file.

A chunk is so many pictures in a row, the same ones whatever the number of ranks and wherever a run was
stopped; a run that is repeated does the chunks that are missing. So the numbers are equal bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch
from pydantic import TypeAdapter
from torch import Tensor

from evals.core.chunks import (
    Damage,
    DamagedError,
    TensorSpec,
    check_all_there,
    chunk_path,
    find_missing,
    read_records,
    read_tensors,
    write_records,
    write_tensors,
)
from evals.core.dist import Group
from evals.core.evaluator import Watch
from evals.core.memory import check_memory
from evals.core.provenance import fast_products, has_tf32
from radio.errors import RadioError
from radio.io import check_writable

from .annotations import Picture
from .clicks import next_clicks
from .decoding import Clock, Drawn, Loaded, Prompts, box_prompts, draw, masks_by_picture, owners
from .encoder import DropIn
from .frame import make_frame, place
from .settings import SamSettings

# Letters: B pictures of a chunk, P prompts of a chunk, C h w embedding.

_FORMAT = "sam-dropin/2"
_ENDING = "jsonl"  # of a chunk's records
_THREADS = 2  # that load pictures and masks while the encoder works
_AHEAD = 3  # chunks


class Done(NamedTuple):
    """A finished chunk."""

    pictures: int
    encoder: float | None  # seconds; None where the embeddings were known
    decoder: float
    records: tuple[tuple[Any, ...], ...]


_DONE = TypeAdapter(Done)


class Annotated(Protocol):
    """Pictures with objects to draw: ground truth, or what a detector found."""

    @property
    def name(self) -> str:
        """For progress bars and errors."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """In a fixed order."""

    @property
    def content(self) -> str:
        """A hash of the pictures' bytes."""

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is read."""

    def read(self, picture: Picture) -> Tensor:
        """The pixels, uint8 [3, H, W]."""

    def masks(self, picture: Picture) -> Tensor:
        """The ground truth of its objects, bool [N, H, W]; empty where there is none."""


Judge = Callable[[list[Loaded], Drawn], Sequence[tuple[Any, ...]]]
"""What is kept of a chunk's masks."""


@final
@dataclass(frozen=True)
class Work:
    """The drawing of all objects, and what `judge` says of each."""

    data: Annotated
    judge: Judge
    drop_in: DropIn
    settings: SamSettings
    device: torch.device
    cache: Path
    box_batch: int
    damage: Damage  # of the cache

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder."""
        return torch.bfloat16 if self.settings.precision == "bf16" else torch.float32

    @property
    def numbers(self) -> str:
        """What the encoder computes in: its type, or `TF32` on a GPU that has it."""
        return "TF32" if self.dtype == torch.float32 and has_tf32(self.device) else str(self.dtype)

    def run(self, group: Group, watch: Watch) -> list[Done]:
        """Every chunk, in order, on every rank.

        Raises:
            SizeError: a batch of images is larger than the memory.
            DataError: a picture or mask that cannot be read, or ranks that do not share the cache folder.
            RadioError: the model or the decoder gives values that are not finite.
        """
        chunks = self._chunks()
        side, batch = self.drop_in.side, max(map(len, chunks))
        check_memory(self.drop_in.model, batch, (side, side), self.device, self.dtype)
        group.on_leader(lambda: self.data.fingerprint)  # hashes the content; the others then find the memo
        folder = self.cache / "sam" / self.key()
        paths = [chunk_path(folder, number, _ENDING) for number in range(len(chunks))]
        mine = range(group.rank, len(chunks), group.world)
        missing = [mine[i] for i in find_missing([paths[n] for n in mine], _read, self.damage)]
        error = None
        try:
            self._make(missing, chunks, paths, watch)
        except RadioError as problem:
            error = problem
        group.agree(error)
        check_all_there(paths)
        return [_read(path) for path in paths]

    def _make(
        self,
        missing: Sequence[int],
        chunks: Sequence[tuple[Picture, ...]],
        paths: Sequence[Path],
        watch: Watch,
    ) -> None:
        if missing:
            check_writable(paths[0].parent, "--cache", utf8=True)
            total = sum(len(chunks[number]) for number in missing)
            with watch(f"{self.drop_in.model.name} on {self.data.name}", total) as advance:
                for number, loaded in ahead(missing, lambda n: self._load(chunks[n]), _THREADS, _AHEAD):
                    write_records(paths[number], [self.finish(loaded)])
                    advance(len(loaded))

    def key(self) -> str:
        """A hash of everything that decides the records."""
        settings = self.settings
        return _hash(
            _FORMAT,
            self._embedding_key,
            self.data.fingerprint,
            settings.prompts,
            settings.clicks,
            settings.union_bias,
            self.box_batch,
            settings.boxes_from is not None,
        )

    def load(self, pictures: tuple[Picture, ...], embeddings: Tensor | None = None) -> list[Loaded]:
        """A chunk's pictures and masks; no pixels where its embeddings [B, C, h, w] are known."""
        side, head = self.drop_in.side, self.drop_in.head
        return [
            Loaded(
                picture,
                make_frame(*picture.size, head.side),
                place(self.data.read(picture), side, head.mean) if embeddings is None else None,
                self.data.masks(picture),
                None if embeddings is None else embeddings[index],
            )
            for index, picture in enumerate(pictures)
        ]

    def _load(self, pictures: tuple[Picture, ...]) -> list[Loaded]:
        """As `load`, with the embeddings that the cache has."""
        return self.load(pictures, self._known_embeddings(pictures))

    def finish(self, loaded: list[Loaded]) -> Done:
        """A chunk's records."""
        clock = Clock(self.device)
        with torch.inference_mode():
            embeddings, encoded = self._embeddings(loaded)
            encoder = clock.lap()
            self._check_finite(embeddings, self.drop_in.model.name)
            if encoded and self.settings.keep_embeddings:
                path = self._embedding_path(tuple(one.picture for one in loaded))
                write_tensors(path, {"embeddings": embeddings.cpu()})
            clock.lap()
            drawn = self.answer(loaded, embeddings)
            decoder = clock.lap()
            for values in drawn:
                self._check_finite(values, f"the decoder of {self.drop_in.head.name}")
            records = tuple(self.judge(loaded, drawn))
        return Done(len(loaded), encoder if encoded else None, decoder, records)

    def embed(self, loaded: list[Loaded]) -> Tensor:
        """[B, C, h, w] of a chunk's pixels."""
        pixels = torch.stack([one.pixels for one in loaded if one.pixels is not None])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        with fast_products(self.device):
            return self._placed.embed(pixels.to(self.device, non_blocking=True), self.dtype)

    def answer(self, loaded: list[Loaded], embeddings: Tensor) -> Drawn:
        """The masks that the prompts give."""
        which, batch = owners(loaded, self.device), self.box_batch
        if self.settings.prompts == "boxes":
            return draw(self._placed.head, embeddings, which, box_prompts(loaded, self.device), batch)
        return self._click(loaded, embeddings, which)

    def _embeddings(self, loaded: list[Loaded]) -> tuple[Tensor, bool]:
        """[B, C, h, w] of a chunk, from the cache or for it, and whether the encoder was asked."""
        known = [one.embedding for one in loaded if one.embedding is not None]
        if known:
            return torch.stack(known).to(self.device), False
        return self.embed(loaded), True

    def _known_embeddings(self, pictures: tuple[Picture, ...]) -> Tensor | None:
        """[B, C, h, w] from the cache; None where they are to be made."""
        path = self._embedding_path(pictures)
        if not self.settings.keep_embeddings or not path.exists():
            return None
        shape = (len(pictures), None, *self.drop_in.head.grid)
        try:
            return read_tensors(path, {"embeddings": TensorSpec(torch.float32, shape)}).tensors["embeddings"]
        except DamagedError as error:
            self.damage.add(error)
            return None

    def _check_finite(self, values: Tensor, who: str) -> None:
        if not bool(torch.isfinite(values).all()):
            remedy = "look at its training"
            if self.dtype != torch.float32:
                remedy = f"try --precision fp32, or {remedy}"
            raise RadioError(f"{who} gives values that are not finite as {self.numbers}; {remedy}")

    def _click(self, loaded: list[Loaded], embeddings: Tensor, which: Tensor) -> Drawn:
        head, batch = self._placed.head, self.box_batch
        clicked = [next_clicks(one.truth, None) for one in loaded]
        prompts = _with_clicks(Prompts(), loaded, clicked, self.device)
        drawn = draw(head, embeddings, which, prompts, batch)
        for _ in range(self.settings.clicks - 1):
            pieces: dict[int, list[Tensor]] = {one.picture.number: [] for one in loaded}
            for one, _piece, masks in masks_by_picture(head, loaded, drawn.logits, batch):
                pieces[one.picture.number].append(masks.cpu())
            clicked = [next_clicks(one.truth, torch.cat(pieces[one.picture.number])) for one in loaded]
            prompts = _with_clicks(prompts, loaded, clicked, self.device)
            drawn = draw(head, embeddings, which, prompts, batch)
        return drawn

    def _chunks(self) -> list[tuple[Picture, ...]]:
        pictures, size = self.data.pictures, self.settings.batch
        return [pictures[start : start + size] for start in range(0, len(pictures), size)]

    @cached_property
    def _placed(self) -> DropIn:
        return self.drop_in.to(self.device, self.dtype)

    @cached_property
    def _embedding_key(self) -> str:
        drop_in = self.drop_in
        return _hash(
            _FORMAT,
            drop_in.model.fingerprint,
            drop_in.adaptor_fingerprint,
            drop_in.head.fingerprint,
            drop_in.side,
            self.numbers,
            self.device.type,
            self.settings.batch,
        )

    def _embedding_path(self, pictures: tuple[Picture, ...]) -> Path:
        names = [picture.name for picture in pictures]
        name = _hash(self._embedding_key, self.data.content, names)
        return self.cache / "sam-embeddings" / f"{name}.safetensors"


def ahead(
    numbers: Iterable[int], load: Callable[[int], list[Loaded]], threads: int, depth: int
) -> Iterator[tuple[int, list[Loaded]]]:
    """Each number with what is loaded for it, in order, the next `depth` being loaded meanwhile."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[int, Future[list[Loaded]]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, pool.submit(load, number)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _read(path: Path) -> Done:
    """A chunk's entry.

    Raises:
        DamagedError: it is not what was written there.
    """
    entries = read_records(path, _DONE)
    if len(entries) != 1:
        raise DamagedError(f"{path}: holds {len(entries)} records, wanted 1")
    return entries[0]


def _with_clicks(
    prompts: Prompts, loaded: list[Loaded], clicked: list[tuple[Tensor, Tensor]], device: torch.device
) -> Prompts:
    """The prompts with one more click each."""
    placed = [one.frame.points(points) for one, (points, _) in zip(loaded, clicked, strict=True)]
    points = torch.cat(placed)[:, None].to(device)
    labels = torch.cat([label for _, label in clicked])[:, None].to(device)
    if prompts.points is not None and prompts.labels is not None:
        points = torch.cat((prompts.points, points), dim=1)
        labels = torch.cat((prompts.labels, labels), dim=1)
    return Prompts(points=points, labels=labels)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()
