"""The depth probe: a linear map from frozen tokens to every pixel's depth, trained and tested."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from evals.core.blocks import Block, ImageGrid, ImageRow
from evals.core.evaluator import EvalRun, Result
from evals.core.last_blocks import LastBlocks
from evals.core.report import DatasetInfo, Metric
from evals.core.states import resume_state, save_state
from evals.core.stats import Values, interval, resampled_sums
from radio.config import to_plain
from radio.errors import ConfigError, DataError, RadioError, shown
from radio.image_files import spread
from radio.types import Backbone

from . import DepthSettings, default_layers
from .data import NYU_SIZE, SCENE_SIZE, TRAIN_CROP, DepthSplit, Size, nyu_split, scene_split
from .feeds import Feed, NyuFeed, SceneFeed, Training
from .head import MAX_DEPTH, MEASURES, DepthHead, measure, one_cycle, resize_depth, sig_loss

# Letters: N images, E examples, h w pixels of a depth map, M measures.

_FORMAT = "am-radio-depth-head/1"
_BETAS, _MAX_NORM = (0.9, 0.99), 35.0
_MEAN_SAMPLE = 200  # training depth maps that the baseline's mean is taken over
_SHOWN_SIDE = 112  # of an image on the page in pixels
_TITLE = "image, true depth and prediction (near is bright, black is not scored)"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadState:
    """The state of a training; iteration 0 means not started."""

    iteration: int = 0
    head: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def choose_training(settings: DepthSettings) -> Training:
    """Return the protocol's values, with those of the settings."""
    scenes = settings.data is None
    steps, warmup, loss_warmup = (300, 100, 10) if scenes else (38_400, 12_800, 100)
    iterations = settings.iterations or steps
    return Training(
        iterations=iterations,
        warmup=max(1, round(warmup * iterations / steps)),
        loss_warmup=round(loss_warmup * iterations / steps),
        batch_size=settings.train_batch_size,
        lr=settings.lr or (3e-3 if scenes else 3e-4),
        weight_decay=settings.weight_decay,
    )


def train_size(model: Backbone, settings: DepthSettings) -> Size:
    """Return the size (height, width) of the encoder's input in training."""
    return model.nearest_size(*_wanted_size(settings))


def _wanted_size(settings: DepthSettings, whole: Size | None = None) -> Size:
    """Return the size of the training images, or of a whole image, before the encoder rounds it."""
    crop = SCENE_SIZE if settings.data is None else TRAIN_CROP
    factor = 1.0 if settings.size is None else settings.size / crop[0]
    height, width = whole or crop
    return round(factor * height), round(factor * width)


def choose_layers(model: Backbone, settings: DepthSettings) -> tuple[int, list[str]]:
    """Return the number of layers that the head reads, and a note where it is not the protocol's."""
    wanted = default_layers(settings)
    if settings.layers is not None:
        return settings.layers, []
    if wanted == 1 or model.num_blocks >= wanted:
        return wanted, []
    has = f"has {model.num_blocks} blocks" if model.num_blocks else "is no sequence of equal blocks"
    return 1, [f"the head reads the last layer, not the protocol's last {wanted}: {model.name} {has}"]


def evaluate(model: Backbone, settings: DepthSettings, run: EvalRun) -> Result:
    """Score a backbone by a linear head on its tokens, which is trained here.

    The records have one line per image with its RMSE in metres. An interrupted run resumes from the last
    saved step; a finished head is only tested.

    Raises:
        DataError: data in an unknown layout, or with an invalid file; names it.
        ConfigError: a batch that does not divide among the ranks, or a backbone without so many layers.
        SizeError: images that do not fit into memory, or are not square where the generated ones are.
        RadioError: values that are not finite.
    """
    started = time.monotonic()
    layers, notes = choose_layers(model, settings)
    if layers > 1:
        model = LastBlocks(model, layers)
    training, size = choose_training(settings), train_size(model, settings)
    if settings.data is not None and training.batch_size % run.ranks.world:
        raise ConfigError(
            f"a batch of {training.batch_size} does not divide among {run.ranks.world} ranks; choose another "
            f"--train-batch-size"
        )
    splits = _open(settings, run)
    for split in splits:
        run.note_source(split.images)
        run.ranks.on_leader(lambda split=split: split.fingerprint)  # type: ignore[misc]
    train, test = splits
    seed = run.settings.seed if settings.head_seed is None else settings.head_seed
    whole = model.nearest_size(*_wanted_size(settings, NYU_SIZE))
    made = SceneFeed if settings.data is None else partial(NyuFeed, whole=whole)
    feed: Feed = made(model, splits, training, seed, size, run)
    prepared = time.monotonic()
    head = DepthHead(model.token_dim, torch.Generator().manual_seed(seed)).to(run.device)
    key = [model.fingerprint, run.precision, train.fingerprint, to_plain(training), size, seed]
    train_head(head, feed, training, key, settings.save_every, model.name, run)
    examples = spread(range(len(test)), settings.num_shown) if settings.num_shown else ()
    measures, baseline, predicted = test_head(head, feed, splits, examples, run)
    return Result(
        metrics=summarise(measures, run.settings.seed),
        baselines={"mean depth": 100 * float(baseline.mean())},
        data=[_describe(train, "train"), _describe(test, "test")],
        records=(
            {"id": id, "score": score}
            for id, score in zip(test.images.keys, measures[:, 0].tolist(), strict=True)
        ),
        blocks=_show(test, examples, predicted, run),
        notes=[*notes, *_size_notes(model, settings, size), *train.images.notes, *test.images.notes],
        resolved={
            **to_plain(training),
            "size": list(size),
            "layers": layers,
            "optimizer": f"AdamW, betas {_BETAS}, gradients clipped at {_MAX_NORM:g}, one cycle",
            "head": "batch norm, 1x1 convolution, upsampling by 4, 256 bins, linear normalisation",
        },
        seconds={"preparation": prepared - started, "head": time.monotonic() - prepared},
    )


def _open(settings: DepthSettings, run: EvalRun) -> tuple[DepthSplit, DepthSplit]:
    limit = run.settings.limit
    if settings.data is not None:
        opened = partial(nyu_split, settings.data, limit=limit, memo=run.fingerprints, watch=run.progress)
        return opened("train"), opened("test")
    train, test = (count if limit is None else min(count, limit) for count in settings.scenes)
    return scene_split("train", train, run.settings.seed), scene_split("val", test, run.settings.seed)


def _describe(split: DepthSplit, role: str) -> DatasetInfo:
    return DatasetInfo(
        role=role,
        name=split.images.name,
        fingerprint=split.fingerprint,
        count=len(split),
        num_classes=0,
        scored=role == "test",
    )


def _size_notes(model: Backbone, settings: DepthSettings, size: Size) -> list[str]:
    wanted = _wanted_size(settings)
    if size == wanted:
        return []
    return [
        f"{model.name} does not take {wanted[0]}x{wanted[1]} px; images were resized to {size[0]}x{size[1]}"
    ]


def summarise(measures: Values, seed: int = 0) -> dict[str, Metric]:
    """Compute the means over images of the measures [N, M], each with a bootstrap interval."""
    resampled = resampled_sums(measures, seed=seed) / len(measures)
    metrics = {}
    for column, name in enumerate(MEASURES):
        low, high = interval(100 * resampled[:, column])
        metrics[name] = Metric(
            value=100 * float(measures[:, column].mean()),
            low=low,
            high=high,
            higher_is_better=name.startswith("d"),
            unit={"rmse": "cm", "log10": "1/100"}.get(name, "%"),
        )
    return metrics


def train_head(
    head: DepthHead,
    feed: Feed,
    training: Training,
    key: Sequence[object],
    save_every: int,
    label: str,
    run: EvalRun,
) -> None:
    """Train a head in place, resuming an earlier run; all ranks end with the leader's.

    Args:
        key: everything that determines the head.
        label: of the progress bar.

    Raises:
        RadioError: the loss is not finite.
        DataError: a file that cannot be used, or ranks do not share the folder of the states.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()
    path = run.cache / "depth-heads" / f"{digest}.pt"
    state = resume_state(path, _FORMAT, digest, HeadState(), run.ranks, run.damage)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=training.lr, betas=_BETAS, weight_decay=training.weight_decay
    )
    if state.iteration:
        head.load_state_dict(state.head)
        optimizer.load_state_dict(state.optimizer)
    head.train()
    with run.progress(f"training {label}", training.iterations) as advance:
        advance(state.iteration)
        for step, (maps, truth) in enumerate(feed.train_batches(state.iteration), start=state.iteration):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * one_cycle(step, training.warmup, training.iterations)
            depths = resize_depth(head(maps), (truth.shape[1], truth.shape[2]))
            loss = sig_loss(depths, truth, mean_only=step < training.loss_warmup)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(head.parameters(), _MAX_NORM)
            optimizer.step()
            done = step + 1
            if done % save_every == 0 or done == training.iterations:
                _save(
                    HeadState(iteration=done, head=head.state_dict(), optimizer=optimizer.state_dict()),
                    loss,
                    path,
                    digest,
                    run,
                )
            advance(1)
    for tensor in head.state_dict().values():
        tensor.copy_(run.ranks.gather(tensor.cpu())[0])


def _save(state: HeadState, loss: Tensor, path: Path, digest: str, run: EvalRun) -> None:
    if not bool(torch.isfinite(loss.detach())):
        raise RadioError(
            f"iteration {state.iteration}: the loss is {float(loss)}; what was saved last stands. Lower "
            f"--lr, or look for values that are not finite in the backbone's tokens (--precision fp32)"
        )
    if run.ranks.leads:
        save_state(path, _FORMAT, digest, state)


def test_head(
    head: DepthHead, feed: Feed, splits: Sequence[DepthSplit], examples: Sequence[int], run: EvalRun
) -> tuple[Values, Values, Tensor]:
    """Test a head: the measures [N, M], and the RMSE [N] of the training images' mean depth.

    The depths that it predicts for the examples come third, [E, h, w].

    Raises:
        DataError: a file that cannot be used, or an image without a pixel to score.
        RadioError: tokens that are not finite.
    """
    train, test = splits
    mean = _mean_depth(train, run)
    measures = torch.zeros(len(test), len(MEASURES) + 1, dtype=torch.float64)
    predicted = torch.zeros(len(examples), *feed.depth_size)
    head.eval()
    with run.progress("testing the head", len(test)) as advance, torch.no_grad():
        for indices, views, truth in feed.test_batches():
            size = (truth.shape[1], truth.shape[2])
            depths = resize_depth(head(views[0]), size)
            if len(views) > 1:
                depths = (depths + resize_depth(head(views[1]), size).flip(-1)) / 2
            measures[indices, :-1] = measure(depths, truth).cpu()
            measures[indices, -1] = measure(torch.full_like(depths, mean), truth)[:, 0].cpu()
            for row, index in enumerate(indices):
                if index in examples:
                    predicted[examples.index(index)] = depths[row].cpu()
            advance(len(indices) * run.ranks.world)
    measures = run.ranks.sum(measures)
    empty = measures.isnan().any(dim=1).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"{test.images.name}: {shown(test.images.keys[empty[0]])}: no pixel that is scored has a depth "
            f"between 0 and {MAX_DEPTH:g} m; mend or leave out its depth map"
        )
    values = measures.numpy()
    return values[:, :-1], values[:, -1], run.ranks.sum(predicted)


def _mean_depth(split: DepthSplit, run: EvalRun) -> float:
    def mean() -> float:
        depths = [split.read_depth(index) for index in spread(range(len(split)), _MEAN_SAMPLE)]
        known = torch.cat([depth[depth > 0].double() for depth in depths])
        return float(known.mean())

    return run.ranks.on_leader(mean)


def _show(test: DepthSplit, examples: Sequence[int], predicted: Tensor, run: EvalRun) -> list[Block]:
    """Draw the examples: a row of images, one of true and one of predicted depths."""
    if not examples:
        return []
    keys = [test.images.keys[index] for index in examples]
    rows = {
        "images": [test.images.read(index) for index in examples],
        "truth": [_grey(test.read_depth(index)) for index in examples],
        "prediction": [_grey(depths) for depths in predicted],
    }
    save = partial(run.save_image, side=2 * _SHOWN_SIDE, shown=_SHOWN_SIDE)
    return [
        ImageGrid(
            title=_TITLE,
            rows=tuple(
                ImageRow(
                    name=name,
                    images=tuple(
                        save(image, f"{key}: {name}") for key, image in zip(keys, images, strict=True)
                    ),
                )
                for name, images in rows.items()
            ),
        )
    ]


def _grey(depth: Tensor) -> Tensor:
    """Draw a depth map [h, w] as uint8 [3, h, w]; black where it is not known."""
    bright = torch.where(depth > 0, 1 - depth.clamp(0, MAX_DEPTH) / MAX_DEPTH, 0.0)
    return (255 * bright).round().to(torch.uint8).expand(3, -1, -1)
