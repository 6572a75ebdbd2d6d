"""Write the world atomically to a folder in the layout of a known data set."""

import hashlib
import json
import multiprocessing
import secrets
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from radio.errors import DataError, RadioError
from radio.io import make_folder, read_json, read_text, write_text

from .formats import LAYOUTS, Job
from .world import CLASSES, COLOURS, MAX_SIZE, MIN_SIZE, SHAPES, SceneError, Split

__all__ = ["CARD_VERSION", "LAYOUTS", "METADATA_FILE", "ScenesSettings", "write", "write_cached"]

METADATA_FILE = "scenes.json"
CARD_VERSION = 2
_CARDS = TypeAdapter(dict[str, Any])
_MOST, _MOST_WORKERS = 10_000_000, 1024
_CHUNK = 500  # scenes per job, for any number of workers; also per WebDataset shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ScenesSettings:
    """All settings that determine the bytes of a written world."""

    layout: str
    count: int = 2000
    val_count: int = 200
    seed: int = 0
    size: int = 96


def write(
    out: Path, settings: ScenesSettings, *, workers: int = 1, progress: Callable[[int], None] | None = None
) -> bool:
    """Write the training and validation scenes to the folder `out`, with metadata `scenes.json`.

    The bytes depend only on the settings. The folder appears once it is complete. `progress` is called with
    the number of scenes finished since its last call.

    Returns:
        True if the folder was written; False if it already holds exactly these scenes.

    Raises:
        ConfigError: an unknown layout.
        SceneError: a setting out of range, or an `out` that is a file or has other content.
    """
    _check(settings, workers)
    metadata = _metadata(settings)

    def fill(folder: Path) -> None:
        _fill(folder, settings, workers, progress or (lambda _: None))
        write_text(folder / METADATA_FILE, json.dumps(metadata, indent=2) + "\n")

    # If another process was faster, its folder must hold these scenes too.
    return _free(out, metadata) and (make_folder(out, fill) or _free(out, metadata))


def write_cached(out: Path, settings: ScenesSettings, damaged: Callable[[str], None]) -> None:
    """Write the scenes to a cache folder, unless it already holds them undamaged.

    A file beside the folder holds a hash of its content. A folder that does not match is written again, after
    a call of `damaged` with the reason; one without such a file, from other versions, is accepted unchecked.
    """
    _check(settings, 1)
    note = out.with_name(f"{out.name}.sha256")
    try:
        if not write(out, settings) and note.exists() and read_text(note) != _digest(out):
            raise SceneError(f"{out}: its files are not those that were written there")
    except RadioError as error:
        damaged(str(error))
        doomed = out.with_name(f".{out.name}.damaged-{secrets.token_hex(4)}")
        out.rename(doomed)  # renamed at once: another process may read it meanwhile
        _remove(doomed)
        if note.is_dir():
            _remove(note)
        note.unlink(missing_ok=True)
        write(out, settings)
    if not note.exists():
        write_text(note, _digest(out))


def _digest(root: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        sha.update(f"{path.relative_to(root).as_posix()} ".encode(errors="surrogateescape"))
        sha.update(hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check(settings: ScenesSettings, workers: int) -> None:
    LAYOUTS[settings.layout]
    if max(settings.count, settings.val_count) > _MOST:
        raise SceneError(
            f"--count {settings.count} --val-count {settings.val_count}: give at most {_MOST} of each"
        )
    if settings.count < 1 or settings.val_count < 0:
        raise SceneError(
            f"--count {settings.count} --val-count {settings.val_count}: nothing to write; "
            "give a count of at least 1 and a val-count of at least 0"
        )
    if not MIN_SIZE <= settings.size <= MAX_SIZE:
        raise SceneError(f"--size {settings.size}: choose a side from {MIN_SIZE} to {MAX_SIZE} pixels")
    if not 0 <= settings.seed < 2**63:
        raise SceneError(f"--seed {settings.seed}: choose a whole number from 0 to 2^63 - 1")
    if not 1 <= workers <= _MOST_WORKERS:
        raise SceneError(f"--workers {workers}: choose from 1 to {_MOST_WORKERS}")


def _metadata(settings: ScenesSettings) -> dict[str, Any]:
    names = {"classes": list(CLASSES), "colours": list(COLOURS), "shapes": list(SHAPES)}
    return {"format": "radio-scenes", "version": CARD_VERSION, **asdict(settings), **names}


def _free(out: Path, metadata: dict[str, Any]) -> bool:
    """Check whether `out` must be written; False if it holds the scenes of this metadata already."""
    if out.exists() and not out.is_dir():
        raise SceneError(f"{out} is a file; give the name of a folder")
    if not out.exists() or not any(out.iterdir()):
        return True
    path = out / METADATA_FILE
    if not path.is_file():
        raise SceneError(f"{out} is not empty and was not written by radio-scenes; choose another folder")
    try:
        found = read_json(path, _CARDS)
    except DataError as error:
        raise SceneError(
            f"{path} is not metadata of radio-scenes ({error}); choose another folder"
        ) from error
    if found != metadata:
        raise SceneError(
            f"{out} holds scenes of other settings (see {path}); remove it or choose another folder"
        )
    return False


def _fill(root: Path, settings: ScenesSettings, workers: int, progress: Callable[[int], None]) -> None:
    layout = LAYOUTS[settings.layout]
    counts: tuple[tuple[Split, int], ...] = (("train", settings.count), ("val", settings.val_count))
    jobs = [job for split, count in counts for job in _jobs(root, settings, split, count)]
    for job in jobs:
        layout.prepare(job)
    results: dict[Job, list[Any]] = {}
    for job, records in _run(jobs, workers):
        results[job] = records
        progress(job.stop - job.start)
    for split, count in counts:
        if count:
            records = [record for job in jobs if job.split == split for record in results[job]]
            layout.finish(root, split, records)


def _jobs(root: Path, settings: ScenesSettings, split: Split, count: int) -> list[Job]:
    return [
        Job(
            layout=settings.layout,
            root=root,
            split=split,
            number=number,
            start=start,
            stop=min(start + _CHUNK, count),
            seed=settings.seed,
            size=settings.size,
        )
        for number, start in enumerate(range(0, count, _CHUNK))
    ]


def _run(jobs: list[Job], workers: int) -> Iterator[tuple[Job, list[Any]]]:
    """Yield each job with its records, in any order."""
    if workers == 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    # spawned, not forked: a fork of a process that runs threads (torch's, BLAS's) may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def run_job(job: Job) -> list[Any]:
    """Write the images of one job; return the records for the split's files."""
    return LAYOUTS[job.layout].write(job)
