"""Everything that is decided before the first iteration: data, protocol, sizes, kept tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch

from evals.core.chunks import Damage, DamagedError
from evals.core.dist import Group
from evals.core.evaluator import Watch, place
from evals.core.features import default_cache
from evals.core.memory import check_memory
from evals.core.provenance import choose_device, has_tf32
from radio.config import to_plain
from radio.errors import ConfigError
from radio.scenes.layouts import CARD_VERSION, ScenesSettings, write_cached
from radio.types import Backbone

from .datasets import Dataset, Split, open_dataset
from .maps import MapWriter
from .pixels import Checked, check_split
from .presets import Plan, resolve
from .settings import SegSettings
from .sizes import check_sizes

if TYPE_CHECKING:
    from .pictures import Pictures, TokenMaps
    from .training import Outcome

_FORMAT = "seg-probe/1"
_TEST_BATCH = 32  # kept tokens; pictures of several sizes go one by one


class Source(NamedTuple):
    """What is asked of a data set when it is compared with what the model was trained on."""

    name: str
    location: str
    fingerprint: str


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A probe that is ready to be trained."""

    model: Backbone
    fingerprint: str  # of the model, as it was loaded
    settings: SegSettings
    plan: Plan
    data: Dataset
    train: Checked
    val: Checked
    train_samples: Pictures | TokenMaps
    val_samples: Pictures | TokenMaps
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
        """What the backbone computes in: `torch.float32`, `torch.bfloat16`, or `TF32` on a GPU with it."""
        return "TF32" if self.dtype == torch.float32 and has_tf32(self.device) else str(self.dtype)

    def run(self, seed: int, label: str, watch: Watch, writer: MapWriter | None) -> Outcome:
        """One head, trained and tested."""
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
                plan=self.plan,
                group=self.group,
                pixels=not self.keeps_tokens,
            ),
            train=self.train_samples,
            val=self.val_samples,
            plan=self.plan,
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
        """A hash of everything that decides the head."""
        parts = [_FORMAT, self.fingerprint, self.train.fingerprint, to_plain(self.plan), self.numbers]
        return hashlib.sha256(json.dumps([*parts, self.keeps_tokens, seed]).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the settings came to, for the report."""
        return {
            **self.plan.describe(),
            "labels": self.data.labelling.describe(),
            "dtype": self.numbers.removeprefix("torch."),
            "tokens": "kept, float16" if self.keeps_tokens else "computed in every iteration",
            "workers": self.workers,
            "ranks": self.group.world,
        }

    def sources(self) -> tuple[Source, ...]:
        """The two splits, for notes on what the model was trained on."""
        both = ((self.data.train, self.train), (self.data.val, self.val))
        return tuple(Source(split.name, split.location, found.fingerprint) for split, found in both)


def make_probe(model: Backbone, settings: SegSettings, group: Group, watch: Watch) -> Probe:
    """Open and check the data, fit the protocol to the backbone, and compute the tokens that are kept.

    Raises:
        DataError: see `open_dataset` and `check_split`.
        ConfigError: an unknown device, or a batch that the ranks cannot share.
        SizeError: see `resolve` and `check_sizes`.
    """
    from .pictures import Pictures
    from .plugin import KNOWN_CLASSES

    cache = settings.cache or default_cache()
    device = choose_device(settings.device)
    plan, notes = resolve(settings, model)
    if plan.batch % group.world:
        raise ConfigError(
            f"a batch of {plan.batch} does not divide among {group.world} ranks; choose another --batch"
        )
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    check_memory(model, plan.batch // group.world, plan.crop, device, dtype)
    damage = Damage()
    data = _open(settings, cache, group, KNOWN_CLASSES, damage)
    checked = [_check(split, data, cache, group, watch, damage) for split in (data.train, data.val)]
    check_sizes([size for found in checked for size in found.sizes], plan, model)

    fingerprint = model.fingerprint
    model = place(model, device, dtype)
    samples: list[Any] = [
        Pictures(split, data.labelling, plan, model, training=training)
        for split, training in ((data.train, True), (data.val, False))
    ]
    workers = settings.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)
    keeps, why = _keeps_tokens(model, settings, plan, data, device, dtype)
    probe = Probe(
        model=model,
        fingerprint=fingerprint,
        settings=settings,
        plan=plan,
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


def _check(split: Split, data: Dataset, cache: Path, group: Group, watch: Watch, damage: Damage) -> Checked:
    """The leader reads the files; the others find its note, or read them where the folder is not shared."""
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
        f"{found.rotated:,} of {len(split.pairs):,} pictures of {split.name} have an EXIF orientation, which "
        f"is not applied: their annotations are taken to lie as the pixels are stored"
        for split, found in zip((data.train, data.val), checked, strict=True)
        if found.rotated
    )


def _keeps_tokens(
    model: Backbone,
    settings: SegSettings,
    plan: Plan,
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[bool, tuple[str, ...]]:
    from .tokens import size_in_gb

    if plan.augment or not settings.keep_tokens:
        return False, ()
    count = len(data.train.pairs) + len(data.val.pairs)
    size = size_in_gb(model, plan.crop, count, device, dtype)
    if size > settings.keep_tokens_gb:
        note = (
            f"the tokens of {count:,} pictures would take {size:.1f} GB, so they were not kept "
            f"(--keep-tokens-gb {settings.keep_tokens_gb:g})"
        )
        return False, (note,)
    return True, ()


def _with_tokens(probe: Probe, watch: Watch) -> Probe:
    """The same probe on kept tokens."""
    from .pictures import Pictures, TokenMaps
    from .tokens import token_maps

    samples = []
    data, sides = probe.data, ((probe.data.train, probe.train, True), (probe.data.val, probe.val, False))
    for split, checked, training in sides:
        maps = token_maps(
            probe.model,
            Pictures(split, data.labelling, probe.plan, probe.model, training=training),
            key=json.dumps([probe.fingerprint, checked.fingerprint, probe.plan.crop, probe.numbers]),
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
        samples.append(TokenMaps(maps, split, data.labelling, probe.plan, training=training))
    return replace(probe, train_samples=samples[0], val_samples=samples[1])
