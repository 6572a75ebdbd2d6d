"""The memory of labelled patches: drawn from the training images, cached, and searched with FAISS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from evals.core.evaluator import EvalRun
from evals.core.features import check_finite, to_unit
from evals.knn.index import Index, Neighbours, load_faiss
from evals.seg_probe.areas import CHUNK
from evals.seg_probe.data import VOID, Dataset
from evals.seg_probe.reading import read_pairs
from radio.chunks import (
    TensorSpec,
    cached_chunks,
    chunk_path,
    load_tensors,
    read_tensors,
    write_tensors,
)
from radio.errors import SizeError
from radio.resources import fast_products, memory_of
from radio.types import Backbone, Features

# Letters: M patches of the memory, D token width, C classes, B batch, T tokens, H W their grid, Q queries,
# k neighbours.

_FORMAT = f"patches/1 in chunks of {CHUNK}"
_SPECS = {
    "tokens": TensorSpec(torch.float32, (None, None)),  # [M, D]
    "labels": TensorSpec(torch.int16, (None, None)),  # [M, C], pixels of each class
}
_ROWS_PER_LIST = 39  # of k-means: FAISS warns below it
_TRAINING_ROWS = 64  # per list (ours)
_PROBES = 64  # lists that a query is compared with (ours)
_CPU = torch.device("cpu")


class SearchIndex(Protocol):
    """Finds the nearest patches of the memory."""

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """Find the k nearest patches to each of the queries [Q, D], of any length."""


@final
class Encoder:
    """Computes the tokens of images of one size (height, width), with the model on its device."""

    def __init__(self, model: Backbone, size: tuple[int, int], run: EvalRun) -> None:
        self.model, self.size, self.run = model, size, run

    @cached_property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the tokens, from a forward pass of a grey image."""
        return self._encode(torch.full((1, 3, *self.size), 0.5)).grid

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, h, w] as tokens [B, T, D] float32 on the CPU.

        Raises:
            RadioError: some are not finite.
        """
        tokens = self._encode(images).tokens.float().cpu()
        check_finite(tokens, self.model.name)
        return tokens

    def _encode(self, images: Tensor) -> Features:
        pixels = images.to(self.run.device, self.run.dtype, non_blocking=True)
        with fast_products(self.run.device), torch.no_grad():
            return self.model(pixels)


@final
class Memory:
    """The drawn patches of all training images, on disk; what is read of it stays in memory.

    Args:
        paths: the chunks.
        key: hash of everything that determines them.
        limit: number of patches that they have at most.
        device: where `exact` searches.
    """

    def __init__(self, paths: Sequence[Path], key: str, *, limit: int, device: torch.device) -> None:
        self.key = key
        self._paths, self._limit, self._device = paths, limit, device

    @cached_property
    def labels(self) -> Tensor:
        """Pixels of each class, [M, C] int16."""
        return _join(self._read("labels"), self._limit)

    @cached_property
    def exact(self) -> SearchIndex:
        """The index that compares a query with every patch."""
        tokens = _join(self._read("tokens"), self._limit)
        return Index(tokens, torch.arange(len(tokens)), self._device)

    @cached_property
    def compressed(self) -> SearchIndex:
        """The index that compares a query with the patches of the nearest lists, at 8 bits a number."""
        return CompressedIndex(len(self.labels), partial(self._read, "tokens"))

    def _read(self, name: str) -> Iterator[Tensor]:
        for path in self._paths:
            yield load_tensors(path, [name]).tensors[name]


def _join(parts: Iterable[Tensor], limit: int) -> Tensor:
    """Join parts [m, D] of at most `limit` rows in all, one by one, so that nothing is in memory twice."""
    joined, end = torch.empty(0, 0), 0
    for part in parts:
        joined = joined if end else part.new_empty(limit, part.shape[1])
        joined[end : end + len(part)] = part
        end += len(part)
    return joined[:end]


@final
class CompressedIndex:
    """An inverted file of FAISS with a scalar quantiser.

    Args:
        count: M.
        read: yields the tokens [m, D], part by part; called twice.
    """

    def __init__(self, count: int, read: Callable[[], Iterable[Tensor]]) -> None:
        faiss = load_faiss()
        lists = num_lists(count)
        every = max(1, count // (_TRAINING_ROWS * lists))
        sample, start = [], 0
        for part in read():
            sample.append(part[-start % every :: every].clone())  # a view would keep the part in memory
            start += len(part)
        training = to_unit(torch.cat(sample)).numpy()
        del sample
        made = faiss.index_factory(training.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        made.train(training)
        del training
        for part in read():
            made.add(to_unit(part).numpy())
        made.nprobe = min(lists, _PROBES)
        self._index = made

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """Find the k nearest patches to each query; padded by -inf and -1 where the lists have fewer."""
        similarities, ids = map(torch.from_numpy, self._index.search(to_unit(queries).numpy(), k))
        return Neighbours(similarities.masked_fill_(ids < 0, -torch.inf), ids)


def num_lists(count: int) -> int:
    """Return the number of lists for M patches: four times the root (as FAISS's wiki advises), or fewer."""
    return max(1, min(int(4 * count**0.5), count // _ROWS_PER_LIST))


def count_patches(images: int, memory: int, tokens: int) -> list[int]:
    """Return how many patches are drawn of each image: `memory` over all, spread evenly; at most `tokens`."""
    ends = [index * memory // images for index in range(images + 1)]
    return [min(end - start, tokens) for start, end in pairwise(ends)]


def check_fits(count: int, width: int, num_classes: int, *, compressed: bool) -> None:
    """Check that M patches of width D with labels of C classes fit into the machine's memory.

    Raises:
        SizeError: they do not; says what would.
    """
    rows = count * (width + 8) + 4 * width * min(count, _TRAINING_ROWS * num_lists(count))
    need = 2 * count * num_classes + (rows if compressed else count * width * 4 * 9 // 8)
    there = memory_of(_CPU)
    if need > there:
        hint = "" if compressed else ", or --index compressed"
        raise SizeError(
            f"{count:,} patches of width {width:,} take {need / 1e9:,.1f} GB, and this machine has "
            f"{there / 1e9:,.1f} for each rank; give a smaller --memory{hint}"
        )


def fill(
    encode: Encoder, data: Dataset, counts: Sequence[int], *, key: Sequence[object], batch: int
) -> Memory:
    """Encode the training images, and keep the drawn patches of each; cached, and divided among the ranks.

    Args:
        counts: patches of each image.
        key: everything else that determines the tokens.

    Raises:
        DataError: ranks do not share the cache folder.
        RadioError: as `encode` says.
    """
    run, split, labelling, seed = encode.run, data.train, data.labelling, encode.run.settings.seed
    text = json.dumps([_FORMAT, *key, split.fingerprint, labelling.to_json(), sum(counts), seed])
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder, num_classes = run.cache / "patches" / digest, len(labelling.classes)
    spans = [range(start, min(start + CHUNK, len(counts))) for start in range(0, len(counts), CHUNK)]

    def make(missing: list[int]) -> None:
        drawn = [[index for index in spans[number] if counts[index]] for number in missing]
        with run.progress(f"{encode.model.name} on {split.name}", sum(map(len, drawn))) as advance:
            for number, indices in zip(missing, drawn, strict=True):
                tokens = [torch.empty(0, encode.model.token_dim)]
                labels = [torch.empty(0, num_classes, dtype=torch.int16)]
                for pairs in read_pairs(
                    split, labelling, indices, lambda *_: encode.size, batch=batch, run=run
                ):
                    pixels = count_pixels(pairs.labels, encode.grid, encode.model.patch_size, num_classes)
                    rows = draw(pixels, pairs.indices, [counts[index] for index in pairs.indices], seed)
                    tokens.append(encode(pairs.images).flatten(0, 1)[rows])
                    labels.append(pixels.flatten(0, 1)[rows])
                    advance(len(pairs.indices))
                tensors = {"tokens": torch.cat(tokens), "labels": torch.cat(labels)}
                write_tensors(chunk_path(folder, number), tensors)

    read = partial(read_tensors, specs=_SPECS)
    paths = cached_chunks(folder, len(spans), read=read, make=make, ranks=run.ranks, damage=run.damage)
    return Memory(paths, digest, limit=sum(counts), device=run.device)


def count_pixels(
    labels: Sequence[NDArray[np.uint8]], grid: tuple[int, int], patch: int, num_classes: int
) -> Tensor:
    """Count the pixels of each class in each patch of B images, without void: [B, T, C] int16.

    Args:
        labels: [h, w] each, resized (nearest) to `patch` by `patch` pixels for each place of the grid.
    """
    height, width = grid
    resized = [
        F.interpolate(
            torch.from_numpy(each)[None, None], (height * patch, width * patch), mode="nearest-exact"
        )
        for each in labels
    ]
    cells = torch.cat(resized).view(len(labels), height, patch, width, patch).transpose(2, 3)
    classes = cells.reshape(len(labels) * height * width, patch * patch).long()
    scored = classes != VOID
    numbers = torch.arange(len(classes)).unsqueeze(1) * num_classes + classes
    counts = numbers[scored].bincount(minlength=len(classes) * num_classes)
    return counts.view(len(labels), height * width, num_classes).short()


def draw(pixels: Tensor, indices: Sequence[int], counts: Sequence[int], seed: int) -> Tensor:
    """Draw patches with a labelled pixel of each image: rows of [B*T], ascending.

    Args:
        pixels: [B, T, C] of each class.
        indices: of the images, which with the seed determine what is drawn.
        counts: patches to draw of each image; all, if it has fewer.
    """
    labelled, rows = pixels.any(dim=2).numpy(), []
    for place, (index, count) in enumerate(zip(indices, counts, strict=True)):
        order = np.random.default_rng([seed, index]).permutation(labelled.shape[1])
        kept = np.sort(order[labelled[place, order]][:count])
        rows.append(torch.from_numpy(kept + place * labelled.shape[1]))
    return torch.cat(rows)
