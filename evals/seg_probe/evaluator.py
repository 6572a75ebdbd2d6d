"""The segmentation probe: a linear map from frozen tokens to every pixel's class."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import safetensors.torch
import torch

from evals.core.blocks import Table
from evals.core.evaluator import EvalRun, Result
from evals.core.features import place
from evals.core.last_blocks import LastBlocks
from evals.core.report import Metric
from evals.core.stats import score
from radio.config import to_plain
from radio.errors import ConfigError, MissingExtraError, require
from radio.image_files import spread
from radio.io import write_bytes
from radio.resources import check_memory
from radio.types import Backbone

from .areas import Areas, MapWriter, area_records, bootstrapped, class_table, overlays
from .protocol import SegSettings, check_sizes, choose_attention, resolve
from .reading import describe_splits, open_checked

# Letters: N images, C classes.


def load_plugin() -> ModuleType:
    """Import the module `plugin`, which registers our parts in MMSegmentation, without warnings and output.

    Raises:
        MissingExtraError: the extra `seg` is not installed, or a system library that OpenCV needs.
    """
    # The import warns of compiled operators that are not used here, and prints 'Could not import OneDL'.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        _require_opencv()
        for module in ("mmengine", "mmcv", "mmseg"):
            require(module, extra="seg")
        from . import plugin
    return plugin


def _require_opencv() -> None:
    try:
        require("cv2", extra="seg")
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a shared library that the wheel does not contain
        name = str(error).split(":")[0]
        package = "libgl1" if "libGL" in name else "libglib2.0-0"
        raise MissingExtraError(
            f"OpenCV cannot be loaded, {error}; on Debian and Ubuntu install {package}: "
            f"apt-get install {package}"
        ) from error


def evaluate(model: Backbone, settings: SegSettings, run: EvalRun) -> Result:
    """Score a backbone with a linear head on its tokens, trained and tested by MMSegmentation.

    The records have one line per image with its areas for the first head, which is saved too. An interrupted
    run resumes from the last saved iteration; a finished head is only tested.

    Raises:
        DataError: data in an unknown layout, or with an invalid file; names the first.
        ConfigError: a batch that does not divide among the ranks, or a backbone without so many layers.
        SizeError: a crop or stride that does not fit the backbone.
        MissingExtraError: MMSegmentation, or a system library that OpenCV needs, is not installed.
        RadioError: values that are not finite.
    """
    load_plugin()  # fail early
    from .plugin import Images, TokenMaps, map_size, token_maps
    from .training import Probe, train_head

    started = time.monotonic()
    model, attention_notes = choose_attention(settings, model)
    if settings.layers > 1:
        model = LastBlocks(model, settings.layers)
    config, notes = resolve(settings, model)
    notes = (*attention_notes, *notes)
    if config.train_batch_size % run.ranks.world:
        raise ConfigError(
            f"a batch of {config.train_batch_size} does not divide among {run.ranks.world} ranks; choose "
            f"another --train-batch-size"
        )
    check_memory(model, config.train_batch_size // run.ranks.world, config.crop, run.device, run.dtype)
    data, checked = open_checked(settings.data, run, voc_split=settings.voc_split, scenes=settings.scenes)
    check_sizes([size for split in checked for size in split.sizes], config, model)
    key = [model.fingerprint, run.precision]
    placed = place(model, run.device, run.dtype)
    splits = ((data.train, True), (data.val, False))
    samples: list[Any] = [
        Images(split, data.labelling, config, placed, training=training) for split, training in splits
    ]
    if not config.augment and settings.keep_tokens:
        count = sum(map(len, samples))
        size = map_size(placed, config.crop, run) * count / 1e9
        if size <= settings.token_cache_gb:
            for index, (split, training) in enumerate(splits):
                maps = token_maps(
                    placed,
                    samples[index],
                    run,
                    key=[*key, split.fingerprint, config.crop],
                    label=f"{model.name} on {split.name}",
                )
                samples[index] = TokenMaps(maps, split, data.labelling, config, training=training)
        else:
            note = (
                f"the tokens of {count:,} images would take {size:.1f} GB, so they were not kept "
                f"(--token-cache-gb {settings.token_cache_gb:g})"
            )
            notes = (*notes, note)
    probe = Probe(
        model=placed,
        config=config,
        num_classes=len(data.labelling.classes),
        train=samples[0],
        val=samples[1],
        key=[*key, data.train.fingerprint, to_plain(config)],
        save_every=settings.save_every,
    )
    prepared = time.monotonic()

    writer = MapWriter(
        folder=run.folder / f"{run.base}-maps",
        split=data.val,
        labelling=data.labelling,
        indices=spread(range(len(data.val.pairs)), settings.save_maps) if settings.save_maps else (),
    )
    first = run.settings.seed if settings.head_seed is None else settings.head_seed
    seeds = range(first, first + settings.seeds)
    heads = [
        train_head(
            probe,
            seed,
            run,
            model.name if len(seeds) == 1 else f"{model.name}, seed {seed}",
            writer if seed == first else None,
        )
        for seed in seeds
    ]
    weights = f"{run.base}.safetensors"
    if run.ranks.leads:
        tensors = {name: tensor.contiguous() for name, tensor in heads[0].weights.items()}
        write_bytes(run.folder / weights, safetensors.torch.save(tensors))
    areas = [head.areas for head in heads]
    return Result(
        metrics=bootstrapped(areas[0]) if len(areas) == 1 else repeated(areas),
        pairing="mean_iou",
        data=describe_splits(data),
        records=area_records(areas[0], [pair.key for pair in data.val.pairs]),
        blocks=[
            class_table(areas, data.labelling.classes),
            *([_seed_table(areas, seeds)] if len(seeds) > 1 else []),
            *overlays(writer),
        ],
        resolved={
            **config.describe(),
            "labels": data.labelling.describe(),
            "tokens": "kept, float16" if probe.keeps_tokens else "computed in every iteration",
            **({"attention": "global"} if attention_notes else {}),
        },
        seconds={"preparation": prepared - started, "heads": time.monotonic() - prepared},
        files=[weights, *writer.files()],
        notes=[*notes, *data.notes],
    )


def repeated(heads: Sequence[Areas]) -> dict[str, Metric]:
    """Compute the mean scores of several heads, with their standard deviation (n - 1)."""
    scores = [score(areas) for areas in heads]
    metrics = {}
    for name in ("miou", "macc", "aacc"):
        values = torch.tensor([getattr(each, name) for each in scores]).double()
        metrics[name] = Metric(value=float(values.mean()), std=float(values.std()))
    return metrics


def _seed_table(heads: Sequence[Areas], seeds: Sequence[int]) -> Table:
    scores = [score(areas) for areas in heads]
    rows = tuple((seed, each.miou, each.macc, each.aacc) for seed, each in zip(seeds, scores, strict=True))
    return Table(title="scores of each head", columns=("seed", "miou", "macc", "aacc"), rows=rows)
