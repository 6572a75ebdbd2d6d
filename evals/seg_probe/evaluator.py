"""The evaluator of the segmentation probe: a linear map from frozen tokens to every pixel's class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, final

import safetensors.torch

from evals.core.areas import score
from evals.core.evaluator import domain_notes, machine_settings
from evals.core.report import DataUsed, Metric, Report, Table, file_name, write
from radio.config import to_plain
from radio.dist import Group, current
from radio.io import staged, write_bytes
from radio.progress import ProgressFactory, no_progress
from radio.provenance import commit, describe_device, peak_memory, versions
from radio.types import Backbone

from .library import load_plugin
from .maps import MapWriter, spread_places
from .probe import Probe, make_probe
from .scores import area_records, class_table, metrics, repeated
from .settings import SegSettings

if TYPE_CHECKING:
    from .training import Outcome


@final
class SegEvaluator:
    """Scores any backbone with a linear head on its tokens, trained and tested by MMSegmentation."""

    name = "seg"
    settings = SegSettings

    def with_seed(self, settings: SegSettings, number: int) -> SegSettings:
        """Return the settings of the `number`-th repetition, with other seeds of the heads."""
        return replace(settings, head_seed=settings.first_head + number * settings.seeds)

    def run(
        self,
        model: Backbone,
        settings: SegSettings,
        out: Path,
        *,
        name: str | None = None,
        watch: ProgressFactory = no_progress,
        group: Group | None = None,
    ) -> Report:
        """Score `model`; write `seg-NAME.json`, `seg-NAME.jsonl` and the first head's maps into `out`.

        The records have one line per image with its areas for the first head, which is saved too.

        Every rank of a torchrun job calls this and gets the same report; rank 0 writes. An interrupted run
        resumes from the last saved iteration; a finished head is only tested.

        Raises:
            DataError: data in an unknown layout, or with an invalid file; names the first.
            ConfigError: an unknown device, or a batch that does not divide among the ranks.
            SizeError: a crop or stride that does not fit the backbone.
            MissingExtraError: MMSegmentation, or a system library that OpenCV needs, is not installed.
            RadioError: values that are not finite.
        """
        load_plugin()  # fail early
        started = time.monotonic()
        group = group or current()
        probe = make_probe(model, settings, group, watch)
        prepared = time.monotonic()

        label = name or model.name
        base = file_name(self.name, label)
        with staged(out) as fresh:
            writer = MapWriter(
                folder=fresh / f"{base}-maps",
                split=probe.data.val,
                labelling=probe.data.labelling,
                places=spread_places(len(probe.data.val.pairs), settings.save_maps),
            )
            outcomes = [
                probe.run(settings.first_head + number, label, watch, writer if number == 0 else None)
                for number in range(settings.seeds)
            ]
            finished = time.monotonic()

            report = Report(
                task=self.name,
                model=label,
                fingerprint=probe.fingerprint,
                primary_metric="miou",
                metrics=_metrics(outcomes),
                settings={**to_plain(settings), "resolved": probe.describe()},
                data=_data_used(probe),
                device=describe_device(probe.device),
                seconds={
                    "preparation": prepared - started,
                    "heads": finished - prepared,
                    "total": finished - started,
                },
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                machine_settings=machine_settings(settings),
                versions={**versions(), **_library_versions()},
                git=commit(),
                metadata=dict(model.metadata),
                peak_memory=peak_memory(probe.device),
                notes=(*probe.notes, *probe.damage.notes(group), *domain_notes(model, probe.sources())),
                tables=_tables(outcomes, probe, settings),
                files=(f"{base}.jsonl", f"{base}.safetensors", *writer.files()),
            )
            if group.leads:
                keys = [pair.key for pair in probe.data.val.pairs]
                records = area_records(outcomes[0].areas, keys)
                head = {key: tensor.contiguous() for key, tensor in outcomes[0].head.items()}
                write_bytes(fresh / f"{base}.safetensors", safetensors.torch.save(head))
                write(report, fresh / f"{base}.json", {fresh / f"{base}.jsonl": records})
        return report


def _metrics(outcomes: Sequence[Outcome]) -> dict[str, Metric]:
    areas = [outcome.areas for outcome in outcomes]
    return metrics(areas[0]) if len(areas) == 1 else repeated(areas)


def _tables(outcomes: Sequence[Outcome], probe: Probe, settings: SegSettings) -> dict[str, Table]:
    tables = {"classes": class_table([outcome.areas for outcome in outcomes], probe.data.labelling.classes)}
    if len(outcomes) > 1:
        found = [score(outcome.areas) for outcome in outcomes]
        tables["seeds"] = Table(
            columns=("seed", "miou", "macc", "aacc"),
            rows=tuple(
                (settings.first_head + number, one.miou, one.macc, one.aacc)
                for number, one in enumerate(found)
            ),
        )
    return tables


def _data_used(probe: Probe) -> tuple[DataUsed, ...]:
    return tuple(
        DataUsed(
            role=role,
            name=split.name,
            fingerprint=checked.fingerprint,
            count=len(split.pairs),
            num_classes=len(probe.data.labelling.classes),
        )
        for role, split, checked in (
            ("train", probe.data.train, probe.train),
            ("val", probe.data.val, probe.val),
        )
    )


def _library_versions() -> dict[str, str]:
    names = ("onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv", "opencv-python")
    return {name: version(name) for name in names}
