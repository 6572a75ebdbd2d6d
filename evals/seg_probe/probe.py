"""Preparation before the first iteration: data, protocol, sizes, cached tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from evals.core.evaluator import place
from radio.chunks import Damage, DamagedError, default_cache
from radio.config import to_plain
from radio.dist import Group
from radio.errors import ConfigError
from radio.memory import check_memory
from radio.progress import ProgressFactory
from radio.provenance import choose_device, has_tf32
from radio.scenes.layouts import CARD_VERSION, ScenesSettings, write_cached
from radio.types import Backbone

from .datasets import Dataset, Split, open_dataset
from .maps import MapWriter
from .pixels import Checked, check_split
from .presets import ProbeConfig, resolve
from .settings import SegSettings
from .sizes import check_sizes

if TYPE_CHECKING:
    from .images import Images, TokenMaps
    from .training import Outcome

_FORMAT = "seg-probe/1"
_TEST_BATCH = 32  # cached tokens; images of several sizes are tested one by one


class Source(NamedTuple):
    """A data set's identity, for comparison with the model's training data."""

    name: str
    location: str
    fingerprint: str


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A probe that is ready for training."""

    model: Backbone
    fingerprint: str  # of the model as loaded
    settings: SegSettings
    config: ProbeConfig
    data: Dataset
    train: Checked
    val: Checked
    train_samples: Images | TokenMaps
    val_samples: Images | TokenMaps
    keeps_tokens: bool
    device: torch.device
    dtype: torch.dtype
    workers: int
    cache: Path
    group: Group
    notes: tuple[str, ...]
    damage: Damage  # of the cache

    @property
    def numbers(self) -> str:
        """Precision of the backbone: `torch.float32`, `torch.bfloat16`, or `TF32` on a GPU with it."""
        return "TF32" if self.dtype == torch.float32 and has_tf32(self.device) else str(self.dtype)

    def run(self, seed: int, label: str, watch: ProgressFactory, writer: MapWriter | None) -> Outcome:
        """Train and test one head."""
        from .plugin import KeptTokens, RadioBackbone, build_model
        from .training import Job, run

        backbone: dict[str, Any] = {"type": KeptTokens}
        if not self.keeps_tokens:
            backbone = {"type": RadioBackbone, "model": self.model, "dtype": self.dtype}
        key = self.key(seed)
        job = Job(
            make_model=lambda: build_model(
                backbone,
                width=self.model.token_dim,
                num_classes=len(self.data.labelling.classes),
                config=self.config,
                group=self.group,
                pixels=not self.keeps_tokens,
            ),
            train=self.train_samples,
            val=self.val_samples,
            config=self.config,
            seed=seed,
            state=self.cache / "seg-heads" / f"{key}.pt",
            key=key,
            save_every=self.settings.save_every,
            device=self.device,
            workers=0 if self.keeps_tokens else self.workers,
            test_batch=_TEST_BATCH if self.keeps_tokens else 1,
            group=self.group,
            label=label if self.settings.seeds == 1 else f"{label}, seed {seed}",
            damage=self.damage,
        )
        return run(job, watch, writer)

    def key(self, seed: int) -> str:
        """Hash everything that determines the head."""
        parts = [_FORMAT, self.fingerprint, self.train.fingerprint, to_plain(self.config), self.numbers]
        return hashlib.sha256(json.dumps([*parts, self.keeps_tokens, seed]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Describe the resolved settings for the report."""
        return {
            **self.config.describe(),
            "labels": self.data.labelling.describe(),
            "dtype": self.numbers.removeprefix("torch."),
            "tokens": "kept, float16" if self.keeps_tokens else "computed in every iteration",
            "workers": self.workers,
            "ranks": self.group.world,
        }

    def sources(self) -> tuple[Source, ...]:
        """Return the two splits, for notes on overlap with the model's training data."""
        both = ((self.data.train, self.train), (self.data.val, self.val))
        return tuple(Source(split.name, split.location, found.fingerprint) for split, found in both)


def make_probe(model: Backbone, settings: SegSettings, group: Group, watch: ProgressFactory) -> Probe:
    """Open and check the data, adapt the protocol to the backbone, and compute the cached tokens.

    Raises:
        DataError: see `open_dataset` and `check_split`.
        ConfigError: an unknown device, or a batch that does not divide among the ranks.
        SizeError: see `resolve` and `check_sizes`.
    """
    from .images import Images
    from .plugin import KNOWN_CLASSES

    cache = settings.cache or default_cache()
    device = choose_device(settings.device)
    config, notes = resolve(settings, model)
    if config.batch % group.world:
        raise ConfigError(
            f"a batch of {config.batch} does not divide among {group.world} ranks; choose another --batch"
        )
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    check_memory(model, config.batch // group.world, config.crop, device, dtype)
    damage = Damage()
    data = _open(settings, cache, group, KNOWN_CLASSES, damage)
    checked = [_check(split, data, cache, group, watch, damage) for split in (data.train, data.val)]
    check_sizes([size for found in checked for size in found.sizes], config, model)

    fingerprint = model.fingerprint
    model = place(model, device, dtype)
    samples: list[Any] = [
        Images(split, data.labelling, config, model, training=training)
        for split, training in ((data.train, True), (data.val, False))
    ]
    workers = settings.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    keeps, why = _keeps_tokens(model, settings, config, data, device, dtype)
    probe = Probe(
        model=model,
        fingerprint=fingerprint,
        settings=settings,
        config=config,
        data=data,
        train=checked[0],
        val=checked[1],
        train_samples=samples[0],
        val_samples=samples[1],
        keeps_tokens=keeps,
        device=device,
        dtype=dtype,
        workers=workers,
        cache=cache,
        group=group,
        notes=(*notes, *why, *data.notes, *_orientation_notes(data, checked)),
        damage=damage,
    )
    return _with_tokens(probe, watch) if keeps else probe


def _open(settings: SegSettings, cache: Path, group: Group, known: Any, damage: Damage) -> Dataset:
    if settings.data is not None:
        return open_dataset(settings.data, voc_split=settings.voc_split, known=known, limit=settings.limit)
    count, val_count = settings.scenes
    world = ScenesSettings(layout="ade20k", count=count, val_count=val_count, seed=settings.seed)
    root = cache / "scenes" / f"ade20k-v{CARD_VERSION}-{count}-{val_count}-seed{settings.seed}"
    group.on_leader(lambda: write_cached(root, world, lambda reason: damage.add(DamagedError(reason))))
    found = open_dataset(root, voc_split=settings.voc_split, known=known, limit=settings.limit)
    train, val = (
        Split(name=f"scenes:{name}", location=f"scenes:{name}?seed={settings.seed}", pairs=split.pairs)
        for name, split in (("train", found.train), ("val", found.val))
    )
    return Dataset(labelling=found.labelling, train=train, val=val)


def _check(
    split: Split, data: Dataset, cache: Path, group: Group, watch: ProgressFactory, damage: Damage
) -> Checked:
    """Check a split on the leader; other ranks read its memo, or check again if the folder is not shared."""
    memo = cache / "fingerprints"
    if not group.leads:
        group.barrier()
        return check_split(split, data.labelling, memo=memo)
    try:
        return check_split(split, data.labelling, memo=memo, watch=watch, damage=damage)
    finally:
        group.barrier()


def _orientation_notes(data: Dataset, checked: Sequence[Checked]) -> tuple[str, ...]:
    return tuple(
        f"{found.rotated:,} of {len(split.pairs):,} images of {split.name} have an EXIF orientation, which "
        f"is not applied: their annotations are taken to lie as the pixels are stored"
        for split, found in zip((data.train, data.val), checked, strict=True)
        if found.rotated
    )


def _keeps_tokens(
    model: Backbone,
    settings: SegSettings,
    config: ProbeConfig,
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[bool, tuple[str, ...]]:
    from .tokens import size_in_gb

    if config.augment or not settings.keep_tokens:
        return False, ()
    count = len(data.train.pairs) + len(data.val.pairs)
    size = size_in_gb(model, config.crop, count, device, dtype)
    if size > settings.token_cache_gb:
        note = (
            f"the tokens of {count:,} images would take {size:.1f} GB, so they were not kept "
            f"(--token-cache-gb {settings.token_cache_gb:g})"
        )
        return False, (note,)
    return True, ()


def _with_tokens(probe: Probe, watch: ProgressFactory) -> Probe:
    """Compute or load the tokens; return the probe with samples from them."""
    from .images import Images, TokenMaps
    from .tokens import token_maps

    samples = []
    data, sides = probe.data, ((probe.data.train, probe.train, True), (probe.data.val, probe.val, False))
    for split, checked, training in sides:
        maps = token_maps(
            probe.model,
            Images(split, data.labelling, probe.config, probe.model, training=training),
            key=json.dumps([probe.fingerprint, checked.fingerprint, probe.config.crop, probe.numbers]),
            cache=probe.cache,
            device=probe.device,
            dtype=probe.dtype,
            batch=_TEST_BATCH,
            workers=probe.workers,
            group=probe.group,
            watch=watch,
            damage=probe.damage,
            label=f"{probe.model.name} on {split.name}",
        )
        samples.append(TokenMaps(maps, split, data.labelling, probe.config, training=training))
    return replace(probe, train_samples=samples[0], val_samples=samples[1])
