"""The frame of every evaluator: what it states about its task, what it is given, and what it returns.

An evaluator is an `Evaluator` with a function `evaluate(model, settings, run) -> Result`. All else is common:
the settings of the machine, features that are extracted once, ranks, the report and its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, final, get_type_hints

import torch
from torch import Tensor

from radio.chunks import Damage, default_cache
from radio.config import to_plain
from radio.data import ImageSource, open_source
from radio.datasets import read_data_sets
from radio.dist import Ranks, current
from radio.errors import ConfigError, DataError
from radio.io import staged, write_bytes, write_lines
from radio.model import RadioModel
from radio.progress import ProgressFactory, no_progress
from radio.resources import choose_device, commit, describe_device, has_tf32, peak_memory, versions
from radio.types import Backbone

from . import evaluators
from .blocks import Block, Image, encode_image
from .features import Extraction, Project, StoredFeatures, default_workers, extract, make_view
from .report import (
    DatasetInfo,
    Kind,
    Metric,
    Pairing,
    Record,
    Report,
    file_name,
    record_lines,
    write,
)
from .task import Evaluator, Machine, RunSettings, ViewSettings, missing_data, settings_on

__all__ = [
    "EvalRun",
    "Evaluator",
    "Machine",
    "Result",
    "RunSettings",
    "report_result",
    "run_evaluator",
    "run_predictions",
]

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What an evaluator returns."""

    metrics: Mapping[str, Metric]  # the first is the primary metric
    data: Sequence[DatasetInfo] = ()
    records: Iterable[Record] = ()  # one per sample; only the leading rank reads them
    pairing: Pairing = "mean"  # how the primary metric follows from the records
    blocks: Sequence[Block] = ()  # what the page shows
    baselines: Mapping[str, float] = field(default_factory=dict)  # such as {"chance": 1.0}
    notes: Sequence[str] = ()
    resolved: Mapping[str, Any] = field(default_factory=dict)  # the values that default settings came to
    seconds: Mapping[str, float] = field(default_factory=dict)  # of the parts of the work
    files: Sequence[str] = ()  # that were written into `run.folder`
    device: str = ""  # description, if it was not used as the run has it


@final
class EvalRun:
    """One evaluation of one model: device, cache, ranks, progress, and the files of its report."""

    def __init__(
        self,
        settings: RunSettings,
        *,
        base: str,
        folder: Path,
        ranks: Ranks | None = None,
        progress: ProgressFactory = no_progress,
    ) -> None:
        self.settings, self.base, self.folder = settings, base, folder
        self.ranks, self.progress = ranks or current(), progress
        self.device = choose_device(settings.device)
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.cache = settings.cache or default_cache()
        self.workers = default_workers(self.device) if settings.workers is None else settings.workers
        self.damage = Damage()  # of the cache
        self.notes: list[str] = []
        self.files: list[str] = []
        self.resolved: dict[str, Any] = {"dtype": self.precision, "workers": self.workers}
        self.seconds: dict[str, float] = {}
        self.sources: dict[str, DataIdentity] = {}  # by fingerprint; compared with the model's training data

    @property
    def precision(self) -> str:
        """Precision of the model: `float32`, `bfloat16`, or `TF32` on a GPU that has it."""
        has = self.dtype == torch.float32 and has_tf32(self.device)
        return "TF32" if has else str(self.dtype).removeprefix("torch.")

    @property
    def fingerprints(self) -> Path:
        """Folder that caches the content hashes of unchanged files."""
        return self.cache / "fingerprints"

    def batch_size(self, default: int) -> int:
        """Return the images per forward pass: as set, or the task's default."""
        return self.settings.batch_size or default

    def open_images(self, text: str, *, scenes: int = 1500, most: int | None = None) -> ImageSource:
        """Open labelled images, `scenes` of them where they are generated; see `open_source`.

        `most` is a number that the task takes at most, spread evenly over all; None = as many as there are.

        Raises:
            DataError: nothing exists at the path, it is empty, or its layout is unknown.
        """
        return open_source(
            text,
            limit=min((n for n in (self.settings.limit, most) if n is not None), default=None),
            scenes=scenes,
            seed=self.settings.seed,
            memo=self.fingerprints,
            watch=self.progress,
        )

    def features(
        self,
        model: Backbone,
        source: ImageSource,
        view: ViewSettings | None = None,
        *,
        head: str = "summary",
        project: Project = lambda features: features.summary,
    ) -> StoredFeatures:
        """Extract the summaries of all images, or read them from the cache.

        Args:
            head: the name of other features in the cache's key.
            project: what is kept of a batch's features instead of the summary.

        Raises:
            DataError: no image can be read, or ranks do not share the cache folder.
            SizeError: a view below one pixel or of too many, or a batch larger than the memory.
            RadioError: the model returns values that are not finite.
        """
        started = time.monotonic()
        made, notes = make_view(model, view or ViewSettings())
        how = Extraction(
            view=made,
            device=self.device,
            dtype=self.dtype,
            head=head,
            project=project,
            batch=self.batch_size(64),
            workers=self.workers,
        )
        self.note_source(source)
        stored = extract(
            model,
            source,
            how,
            cache=self.cache,
            group=self.ranks,
            watch=self.progress,
            damage=self.damage,
        )
        self.notes += [note for note in (*notes, *source.notes) if note not in self.notes]
        self.resolved |= {"view": made.describe(), "size": list(made.size)}
        self.seconds["features"] = self.seconds.get("features", 0.0) + time.monotonic() - started
        return stored

    def note_source(self, source: DataIdentity) -> None:
        """Compare a data set with the model's training data, for a note in the report; every rank calls this.

        The leading rank hashes the content meanwhile, which the others then read from the memo.
        """
        self.ranks.on_leader(lambda: source.fingerprint)
        self.sources.setdefault(source.fingerprint, source)

    def save_image(
        self,
        pixels: Tensor,
        alt: str,
        *,
        side: int = 96,
        shown: int | None = None,
        label: str = "",
        good: bool | None = None,
        exact: bool = False,
    ) -> Image:
        """Write an image for the page, uint8 [3, H, W], beside the report.

        Args:
            alt: the alternative text.
            side: the longer side of the file in pixels, at most.
            shown: the longer side on the page in pixels (default: `side`).
            label: text beside it.
            good: whether it shows something right, where that applies.
            exact: keep every pixel (PNG instead of WebP).
        """
        name = f"{self.base}-images/{len(self.files):03d}.{'png' if exact else 'webp'}"
        self.files.append(name)
        if self.ranks.leads:
            write_bytes(self.folder / name, encode_image(pixels, side=side, exact=exact))
        return Image(file=name, alt=alt, label=label, good=good, side=shown or side)


class DataIdentity(Protocol):
    """A data set that can be compared with a model's training data."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def location(self) -> str:
        """The resolved path or pattern, or `scenes:train?seed=0`."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content."""


def run_evaluator(
    evaluator: Evaluator[S],
    model: Backbone,
    settings: S | None = None,
    out: Path = Path("reports"),
    *,
    run: RunSettings | None = None,
    name: str | None = None,
    kind: Kind | None = None,
    ranks: Ranks | None = None,
    progress: ProgressFactory = no_progress,
) -> Report:
    """Score a model, and write `TASK-NAME.json` and the files that belong to it into the folder `out`.

    Every rank of a torchrun job calls this and gets the same report; rank 0 writes. Nothing is written if an
    error occurs.

    Args:
        settings: the task's (default: its defaults).
        run: the settings of the machine and of the data's size; settings that name no data take the data set
            of its `data_root`.
        name: the model's name in the report (default: its own).
        kind: of the model (default: a student if it has metadata, else untrained or a teacher).

    Raises:
        ConfigError: the evaluator's result is none, or the data root has none or several of its data sets.
        RadioError: as the evaluator says.
    """
    chosen = evaluator.settings() if settings is None else settings
    if run is not None and run.data_root is not None:
        chosen = _on_data_root(evaluator, chosen, run.data_root)
    return report_result(
        evaluator,
        model,
        chosen,
        out,
        partial(evaluator.evaluate, model, chosen),
        run=run,
        label=(name or model.name) + evaluator.suffix(chosen),
        kind=kind,
        ranks=ranks,
        progress=progress,
    )


def _on_data_root(evaluator: Evaluator[S], settings: S, root: Path) -> S:
    """Return the settings on the only data set of a data root; unchanged where they name their own."""
    placed = settings_on(evaluator, settings, read_data_sets(root))
    if not placed:
        raise ConfigError(f"{evaluator.name}: {missing_data(evaluator, settings, root)}")
    if len(placed) > 1:
        raise ConfigError(
            f"{evaluator.name}: {root} has {' and '.join(placed)}, and a report is of one data set; give the "
            f"settings that settings_on returns for each"
        )
    return next(iter(placed.values()))


def run_predictions(evaluator: Evaluator[S], settings: S, out: Path, *, run: RunSettings) -> Report | None:
    """Score stored predictions without a model, and write the report; None if the settings name none.

    Raises:
        RadioError: as the evaluator says.
    """
    path = evaluator.predictions_of(settings)
    if path is None or evaluator.score_predictions is None:
        return None
    evaluate = partial(evaluator.score_predictions, settings)
    return report_result(evaluator, None, settings, out, evaluate, run=run, label=path.stem)


def report_result(
    evaluator: Evaluator[S],
    model: Backbone | None,
    settings: S,
    out: Path,
    evaluate: Callable[[EvalRun], Result],
    *,
    label: str,
    run: RunSettings | None = None,
    kind: Kind | None = None,
    ranks: Ranks | None = None,
    progress: ProgressFactory = no_progress,
) -> Report:
    """Write the report of what `evaluate` returns for a model, or for no model; see `run_evaluator`.

    Args:
        label: the model's name in the report, with its suffix.
    """
    fingerprint = "" if model is None else model.fingerprint  # of the weights before anything rounds them
    who = evaluators.plugin(evaluator.name) or evaluator.name
    with staged(out) as folder:
        base = file_name(evaluator.name, label)
        context = EvalRun(run or RunSettings(), base=base, folder=folder, ranks=ranks, progress=progress)
        started = time.monotonic()
        returned: Any = evaluate(context)
        if not isinstance(returned, Result) or not returned.metrics:
            given = "a Result without metrics" if isinstance(returned, Result) else type(returned).__name__
            raise ConfigError(f"{who}: its evaluate gave {given}, wanted a Result with metrics")
        result = returned
        records = "" if result.records == () else f"{base}.jsonl"
        report = Report(
            task=evaluator.name,
            title=evaluator.title,
            model=label,
            fingerprint=fingerprint,
            primary_metric=next(iter(result.metrics)),
            metrics=dict(result.metrics),
            settings={
                **to_plain(context.settings),
                **to_plain(settings),
                "resolved": {**context.resolved, "ranks": context.ranks.world, **result.resolved},
            },
            machine_settings=(*machine_settings(context.settings), *machine_settings(settings)),
            compared_settings=compared_settings(settings),
            data=tuple(result.data),
            baselines=dict(result.baselines),
            blocks=tuple(result.blocks),
            pairing=result.pairing,
            records=records,
            files=(*([records] if records else ()), *context.files, *result.files),
            notes=tuple(dict.fromkeys((*result.notes, *context.notes, *context.damage.notes(context.ranks)))),
            device="none: a file of predictions was scored",
            seconds={**context.seconds, **result.seconds},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            git=commit(),
        )
        if model is not None:
            report = replace(
                report,
                kind=kind or _kind(model),
                metadata=dict(model.metadata),
                notes=(*report.notes, *domain_notes(model, context.sources.values())),
                device=result.device or describe_device(context.device),
                seconds={"total": time.monotonic() - started, **report.seconds},
                peak_memory=peak_memory(context.device),
            )
        if context.ranks.leads:
            try:
                write(report, folder / f"{base}.json")
            except DataError as error:
                raise ConfigError(
                    f"{who}: its evaluate gave a Result that no report can hold: {error}"
                ) from error
            if records:
                is_error = report.metrics[report.primary_metric].higher_is_better is False
                write_lines(folder / records, record_lines(result.records, errors=is_error))
    return report


def _kind(model: Backbone) -> Kind:
    """Tell a student from a teacher by its metadata, which an untrained student does not have."""
    if model.metadata:
        return "student"
    return "untrained" if isinstance(model, RadioModel) else "teacher"


def machine_settings(settings: Any) -> tuple[str, ...]:
    """Return the names of the settings that are no part of the protocol, for a report."""
    return _marked(settings, "machine")


def compared_settings(settings: Any) -> tuple[str, ...]:
    """Return the names of the settings whose resolved values are part of the protocol, for a report."""
    return _marked(settings, "compared")


def _marked(settings: Any, mark: str) -> tuple[str, ...]:
    hints = get_type_hints(type(settings), include_extras=True)
    return tuple(name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ()))


def domain_notes(model: Backbone, sources: Iterable[DataIdentity]) -> tuple[str, ...]:
    """Return notes for a report on evaluation data that was, or lies beside, the model's training data."""
    trained_on = (model.metadata.get("data") or {}).get("sources") or ()
    notes = []
    for source in sources:
        for entry in trained_on:
            relation = _relation(source, entry)
            if relation:
                labels = "with" if entry.get("labels_used") else "without"
                notes.append(
                    f"in-domain: {source.name} {relation} {entry.get('path')}, "
                    f"which the model was trained on ({labels} labels)"
                )
                break
    return tuple(dict.fromkeys(notes))  # two sets of one name, such as queries and database


_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


def _relation(source: DataIdentity, entry: Mapping[str, Any]) -> str:
    if entry.get("fingerprint") == source.fingerprint:
        return "holds the same images as"
    path = str(entry.get("path") or "")
    if not path:
        return ""
    if path.startswith("scenes:") or source.location.startswith("scenes:"):
        both = path.startswith("scenes:") and source.location.startswith("scenes:")
        return "is drawn from the same generated world as" if both else ""
    ours, theirs = Path(source.location).resolve(), Path(path).resolve()
    if ours == theirs:
        return "is the same place as"
    if ours.is_relative_to(theirs) and theirs.is_dir():
        return "lies within"
    if theirs.is_relative_to(ours) and ours.is_dir():
        return "contains"
    if ours.parent == theirs.parent and ours.name in _SPLITS and theirs.name in _SPLITS:
        return "is a split of the same data set as"
    if ours.suffix == theirs.suffix == ".tar" and ours.parent == theirs.parent:
        return "lies beside"
    return ""
