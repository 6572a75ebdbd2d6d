"""What a run needs to go on exactly where it was: weights, optimiser, meters, in one folder a save.

`state/step-000200/` holds safetensors files, one a rank (by torch.distributed.checkpoint),
and `run.json`: numbers, settings, and a sha256 of every file. Nothing in it is pickled, so reading it runs no
code. A folder gets its name when it is whole; until then it ends in `.tmp`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from evals.core.dist import Group
from radio.errors import CheckpointError, RadioError
from radio.io import write_text

_NOTES = "run.json"
_ALONE = "torch.distributed is disabled"  # torch's warning to a single process


class Found(NamedTuple):
    """A state to go on from."""

    path: Path
    step: int
    notes: dict[str, Any]  # what was given with it


@final
class States:
    """The states of one run. Every rank calls every method; the first one names, prunes and tells.

    Args:
        folder: where they lie: `state` in the run folder, which all ranks see.
        group: the ranks.
        settings: everything that decides the weights, by name.
        keep_last: how many of the newest to keep.
        keep_every: keep those of steps that this divides for good; 0 = none.
        tell: called with a line on what could not be read or written.
    """

    def __init__(
        self,
        folder: Path,
        group: Group,
        settings: Mapping[str, Any],
        *,
        keep_last: int,
        keep_every: int,
        tell: Callable[[str], None],
    ) -> None:
        self.folder, self.group, self.settings, self.tell = folder, group, dict(settings), tell
        self.keep_last, self.keep_every = keep_last, keep_every
        self._channel = group.channel()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._coming: Future[None] | None = None
        self._coming_step, self.stands = 0, 0  # the step of the newest whole state
        warnings.filterwarnings("ignore", _ALONE)

    def newest(self) -> Found | None:
        """The newest state that is whole; None where there is none yet.

        Raises:
            CheckpointError: there are states and none is whole, or they are of a run with other settings.
        """
        answer: Found | str | None = None
        if self.group.leads:
            try:
                answer = self._search()
            except CheckpointError as error:
                answer = str(error)
        (answer, *_) = self.group.gather_objects(answer)
        if isinstance(answer, str):
            raise CheckpointError(answer)
        self.stands = 0 if answer is None else answer.step
        return answer

    def clear(self) -> None:
        """Remove every state, and what is left of half-written ones."""
        if self.group.leads:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.group.barrier()

    def read(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors of these names, whole or spread over the ranks, from a state."""
        reader = HuggingFaceStorageReader(str(found.path))
        load(
            dict(tensors),
            storage_reader=reader,
            process_group=self._channel,
            no_dist=self.group.world == 1,
        )

    def write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, Any],
        publish: Callable[[], None],
    ) -> None:
        """Begin to write a state; it is written in a thread, from copies that are made here and now.

        Args:
            step: how many steps are done.
            tensors: by name; those that other ranks have too are written once.
            notes: plain data for the first rank to keep.
            publish: called on the first rank when the state is on disk and before it gets its name.
        """
        self.wait()
        self._coming_step = step
        half = self.folder / f"step-{step:06d}.tmp"
        writer = HuggingFaceStorageWriter(str(half), save_distributed=True)
        written = async_save(
            dict(tensors),
            storage_writer=writer,
            process_group=self._channel,
            no_dist=self.group.world == 1,
        )
        assert isinstance(written, Future)  # another type only with a stager of one's own
        kept = {"step": step, "settings": self.settings, "notes": dict(notes)}
        self._coming = self._writer.submit(self._finish, half, written, kept, publish)

    def wait(self, *, last: bool = False) -> None:
        """None, when what was begun is written; where that failed, `tell` says so and what was before stands.

        Raises:
            RadioError: it failed, and it was the `last`.
        """
        if self._coming is None:
            return
        coming, self._coming = self._coming, None
        try:
            coming.result()
        except (OSError, CheckpointException) as error:
            stands = f"that of step {self.stands} stands" if self.stands else "there is none before it"
            line = f"the state of step {self._coming_step} could not be written ({_reason(error)}); {stands}"
            if last:
                raise RadioError(f"{line}. Make room and give the same command again") from error
            self.tell(line)
        else:
            self.stands = self._coming_step

    def _finish(
        self, half: Path, written: Future[Any], kept: dict[str, Any], publish: Callable[[], None]
    ) -> None:
        try:
            written.result()
            if self.group.leads:
                publish()
                files = {path.name: _sha256(path) for path in sorted(half.glob("*.safetensors"))}
                write_text(half / _NOTES, json.dumps({**kept, "files": files}))
                half.rename(half.with_suffix(""))
                _sync(self.folder)
                self._prune()
        except BaseException:
            if self.group.leads:
                shutil.rmtree(half, ignore_errors=True)
            raise

    def _prune(self) -> None:
        for path in _states(self.folder)[self.keep_last :]:
            if not self.keep_every or _step(path) % self.keep_every:
                doomed = path.rename(
                    path.with_suffix(".tmp")
                )  # so that no half of it is ever taken for a state
                shutil.rmtree(doomed)

    def _search(self) -> Found | None:
        for half in self.folder.glob("*.tmp"):
            shutil.rmtree(half)
        states = _states(self.folder)
        for path in states:
            try:
                data = _read_notes(path)
            except (OSError, ValueError, LookupError, TypeError):
                self.tell(f"{path}: damaged, and left aside")
                continue
            if changed := _difference(data["settings"], self.settings):
                raise CheckpointError(
                    f"{self.folder.parent}: holds a run with other settings ({changed}); give another --out, "
                    f"or --restart to begin anew"
                )
            return Found(path, int(data["step"]), data["notes"])
        if states:
            raise CheckpointError(f"{self.folder}: not a whole training state; start again with --restart")
        return None


def _states(folder: Path) -> list[Path]:
    """The whole ones, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.suffix != ".tmp"), key=_step, reverse=True)


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def _read_notes(path: Path) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is damaged, or a file is not what it says.
    """
    data: dict[str, Any] = json.loads((path / _NOTES).read_text(encoding="utf-8"))
    int(data["step"]), data["settings"].items(), data["notes"].items()
    for name, sha in data["files"].items():
        if _sha256(path / name) != sha:
            raise ValueError(f"{name} was altered")
    return data


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> str:
    """The first setting that differs, with both values; nothing where none does."""
    for name in dict.fromkeys((*old, *new)):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            if found := _difference(before, now, f"{where}{name}."):
                return found
        elif before != now:
            return f"{where}{name} was {_short(before)} and is {_short(now)}"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """The renaming itself on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The first rank's own words."""
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            return " ".join(str(failure).split())
    return str(error)
