"""Correspondence: points of an object are found in another image by the highest cosine of tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evals.core.blocks import Block, Table
from evals.core.evaluator import EvalRun, Result
from evals.core.features import View, check_finite, place, read_batches
from evals.core.report import DatasetInfo, Metric, Skipped
from evals.core.stats import Values, interval, mean_present, resampled_sums
from radio.chunks import TensorSpec, cached_chunks, chunk_path, read_tensors, write_tensors
from radio.errors import DataError
from radio.resources import check_memory, fast_products
from radio.types import Backbone

from . import SPAIR_SIZE, CorrespondenceSettings, input_size
from .data import Pair, Pairs, make_scenes, open_spair
from .matching import THRESHOLD, Matches, match

# Letters: M images, T tokens, D width, Q points, P pairs, C classes, R resamples.

_FORMAT = "correspondence/1"
_THRESHOLDS = (THRESHOLD, 0.05, 0.2)  # in units of the longer side of the object's box
_SPECS = {
    **{name: TensorSpec(torch.float64, (None,)) for name in Matches._fields},
    "pair": TensorSpec(torch.int64, (None,)),  # [Q] its number in the block
    "images": TensorSpec(torch.int64, (None,)),  # that were read
}


class Scored(NamedTuple):
    """All pairs whose images could be read, and how their points were matched."""

    pairs: list[Pair]
    matches: Matches
    pair: Tensor  # [Q] the pair of each point


def evaluate(model: Backbone, settings: CorrespondenceSettings, run: EvalRun) -> Result:
    """Score a model by the share of points that are found, PCK, as a mean over the classes.

    Raises:
        DataError: data that are absent or contradict themselves, or no pair can be read.
        SizeError: a batch of images is larger than the memory.
        RadioError: tokens that are not finite.
    """
    data = _open(settings, run)
    run.note_source(data.images)
    size, upsample = input_size(model, settings), settings.upsample or (4 if settings.data is None else 1)
    scored, count, skipped = _match_all(model, data, size, upsample, run)
    matched = [scored.pairs[number] for number in scored.pair.unique().tolist()]
    primary = [pair for pair in matched if "" in pair.parts]
    if not primary:
        raise DataError(
            f"{data.images.name}: only pairs that count in a difference of view alone can be read; give more "
            f"--pairs-per-class or --limit"
        )
    metrics = {f"pck_{threshold}": _pck(scored, threshold, "", run) for threshold in _THRESHOLDS}
    for part in sorted({part for pair in matched for part in pair.parts} - {""}):
        metrics[f"pck_{THRESHOLD}{part}"] = _pck(scored, THRESHOLD, part, run)
    info = DatasetInfo(
        role="images",
        name=data.images.name,
        fingerprint=data.images.fingerprint,
        count=count,
        num_classes=len({pair.category for pair in primary}),
        skipped=skipped,
    )
    return Result(
        metrics=metrics,
        baselines={"chance": float(_class_mean(_sums(scored, scored.matches.chance, "").sum(axis=0)))},
        data=[info],
        records=_records(scored),
        blocks=[_table(scored)],
        notes=[*data.images.notes, *_notes(model, settings, size, scored)],
        resolved={"size": list(size), "upsample": upsample, "pairs": len(primary)},
    )


def _open(settings: CorrespondenceSettings, run: EvalRun) -> Pairs:
    limit = run.settings.limit
    if limit == 0:
        raise DataError("--limit 0 leaves no pairs; give 1 or more, or leave it out")
    if settings.data is None:
        return make_scenes(min(settings.scenes, limit or settings.scenes), seed=run.settings.seed)
    most = min(settings.pairs_per_class, limit or settings.pairs_per_class)
    return open_spair(settings.data, pairs_per_class=most, memo=run.fingerprints, watch=run.progress)


def _match_all(
    model: Backbone, data: Pairs, size: tuple[int, int], upsample: int, run: EvalRun
) -> tuple[Scored, int, tuple[Skipped, ...]]:
    """Match the points of all pairs, block by block; return the number of images and those left out, too."""
    batch = run.batch_size(16)
    check_memory(model, batch, size, run.device, run.dtype)
    points = hashlib.sha256()
    for pair in (pair for block in data.blocks for pair in block):
        points.update(f"{pair.images} {pair.reach} {pair.points.shape}".encode() + pair.points.tobytes())
    key = [_FORMAT, model.fingerprint, data.images.fingerprint, points.hexdigest(), run.precision]
    name = hashlib.sha256(json.dumps([*key, size, upsample]).encode()).hexdigest()
    folder = run.cache / "correspondence" / name

    def make(missing: list[int]) -> None:
        placed = place(model, run.device, run.dtype)
        total = sum(len(_images_of(data.blocks[number])) for number in missing)
        with run.progress(f"{model.name} on {data.images.name}", total) as advance:
            for number in missing:
                block = data.blocks[number]
                tokens, grid, images, skipped = _encode(placed, data, _images_of(block), size, batch, run)
                advance(len(images) + len(skipped))
                found = _match_block(block, tokens, grid, images, upsample, run)
                write_tensors(chunk_path(folder, number), found, {"skipped": json.dumps(skipped)})

    read = partial(read_tensors, specs=_SPECS)
    paths = cached_chunks(folder, len(data.blocks), read=read, make=make, ranks=run.ranks, damage=run.damage)
    chunks = [read(path) for path in paths]
    pairs: list[Pair] = []
    place_of: list[Tensor] = []
    for block, chunk in zip(data.blocks, chunks, strict=True):
        place_of.append(chunk.tensors["pair"] + len(pairs))
        pairs += block
    skipped = tuple(Skipped(key=k, reason=r) for c in chunks for k, r in json.loads(c.metadata["skipped"]))
    matches = Matches(*(torch.cat([c.tensors[name] for c in chunks]) for name in Matches._fields))
    if not len(matches.error):
        reason = f"; {skipped[0].key}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{data.images.name}: none of {len(pairs)} pairs can be read{reason}")
    return Scored(pairs, matches, torch.cat(place_of)), sum(len(c.tensors["images"]) for c in chunks), skipped


def _images_of(block: Sequence[Pair]) -> list[int]:
    return sorted({image for pair in block for image in pair.images})


def _encode(
    model: Backbone, data: Pairs, images: list[int], size: tuple[int, int], batch: int, run: EvalRun
) -> tuple[Tensor, tuple[int, int], list[int], list[tuple[str, str]]]:
    """Return the tokens [M, T, D] of images, their grid, the images that were read, and the others."""
    view = View(kind="short-side", size=size, ratio=1.0, nearest_size=model.nearest_size)  # of a square
    batches = [images[start : start + batch] for start in range(0, len(images), batch)]
    tokens: list[Tensor] = []
    grid, kept = (1, 1), list[int]()
    skipped: list[tuple[str, str]] = []
    for read in read_batches(data.images, view, batches, workers=run.workers, device=run.device):
        for pixels in read.images(run.device):
            with fast_products(run.device), torch.inference_mode():
                features = model(pixels.to(run.dtype))
            tokens.append(features.tokens.float())
            grid = features.grid
        kept += [index for index, reason in zip(read.places, read.reasons, strict=True) if not reason]
        skipped += [
            (data.images.keys[index], reason)
            for index, reason in zip(read.places, read.reasons, strict=True)
            if reason
        ]
    joined = torch.cat(tokens) if tokens else torch.empty(0, 1, model.token_dim, device=run.device)
    check_finite(joined, f"{model.name} as {run.precision}")
    return joined, grid, kept, skipped


def _match_block(
    block: Sequence[Pair],
    tokens: Tensor,
    grid: tuple[int, int],
    images: list[int],
    upsample: int,
    run: EvalRun,
) -> dict[str, Tensor]:
    """Match the points of the pairs whose images were both read: a chunk's tensors."""
    row = {image: place for place, image in enumerate(images)}
    there = [n for n, pair in enumerate(block) if all(image in row for image in pair.images)]
    numbers = torch.tensor(there, dtype=torch.int64)
    num_points = torch.tensor([len(block[n].points) for n in there], dtype=torch.int64)
    rows = torch.tensor([[row[image] for image in block[n].images] for n in there], dtype=torch.int64)
    reach = torch.tensor([block[n].reach for n in there], dtype=torch.float64)
    points = np.concatenate([np.empty((0, 2, 2)), *(block[n].points for n in there)])
    matches = Matches(*torch.empty(3, 0, dtype=torch.float64))
    if len(points):
        repeated = (each.repeat_interleave(num_points, dim=0).to(run.device) for each in (rows, reach))
        images_of, reach_of = repeated
        with torch.inference_mode():
            at = torch.from_numpy(points).to(run.device)
            matches = match(tokens, grid, images_of, at, reach_of, upsample=upsample)
    return {
        **{name: values.cpu() for name, values in matches._asdict().items()},
        "pair": numbers.repeat_interleave(num_points),
        "images": torch.tensor(images, dtype=torch.int64),
    }


def _sums(scored: Scored, values: Tensor, part: str) -> Values:
    """Sum the points' values and count them, pair by pair and class by class: [P, C, 2] of a part's pairs."""
    categories = sorted({pair.category for pair in scored.pairs})
    sums = np.zeros((len(scored.pairs), len(categories), 2))
    own = np.array([categories.index(pair.category) for pair in scored.pairs])
    pairs, everyone = scored.pair.numpy(), np.arange(len(scored.pairs))
    sums[everyone, own, 0] = np.bincount(pairs, values.double().numpy(), minlength=len(everyone))
    sums[everyone, own, 1] = np.bincount(pairs, minlength=len(everyone))
    kept = [part in pair.parts for pair in scored.pairs]
    chosen: Values = sums[np.array(kept) & (sums[..., 1].sum(axis=1) > 0)]
    return chosen


def _class_mean(sums: Values) -> Values:
    """Average over the classes that have points, in percent: sums and counts [..., C, 2] -> [...]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return mean_present(100 * sums[..., 0] / sums[..., 1])


def _pck(scored: Scored, threshold: float, part: str, run: EvalRun) -> Metric:
    """Compute the mean over the classes of the share of points that are found; a bootstrap over pairs."""
    sums = _sums(scored, scored.matches.error <= threshold, part)
    low, high = interval(_class_mean(resampled_sums(sums, seed=run.settings.seed)))
    return Metric(value=float(_class_mean(sums.sum(axis=0))), low=low, high=high)


def _records(scored: Scored) -> Iterator[dict[str, Any]]:
    """Yield a record for each point of the pairs that the primary metric is of."""
    last, number = -1, 0
    for error, index in zip(scored.matches.error.tolist(), scored.pair.tolist(), strict=True):
        pair, number = scored.pairs[index], number + 1 if index == last else 0
        last = index
        if "" in pair.parts:
            score, id = int(error <= THRESHOLD), f"{pair.id}#{number}"
            yield {"id": id, "part": pair.category, "unit": pair.id, "score": score, "error": round(error, 6)}


def _table(scored: Scored) -> Block:
    categories = sorted({pair.category for pair in scored.pairs})
    sums = _sums(scored, scored.matches.error <= THRESHOLD, "")
    pairs = (sums[..., 1] > 0).sum(axis=0)
    rows = tuple(
        (category, int(count), int(points), 100 * found / points if points else None)
        for category, count, (found, points) in zip(categories, pairs, sums.sum(axis=0).tolist(), strict=True)
    )
    name = f"PCK@{THRESHOLD}"
    return Table(
        title="each class",
        columns=("class", "pairs", "points", name),
        rows=rows,
        compared=name,
        shared="points",
    )


def _notes(
    model: Backbone, settings: CorrespondenceSettings, size: tuple[int, int], scored: Scored
) -> Iterator[str]:
    """Yield what the reader has to know of the size of the images and of the map."""
    asked = settings.size or (None if settings.data is None else SPAIR_SIZE)
    if asked is not None and size != (asked, asked):
        yield f"{asked} px was asked for; {model.name} takes {size[0]}x{size[1]}, which was used"
    within = float(_class_mean(_sums(scored, scored.matches.nearest <= THRESHOLD, "").sum(axis=0)))
    if within < 99.95:
        yield f"only {within:.1f} % of the points have a position of the map near enough; see --upsample"
