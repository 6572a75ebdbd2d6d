"""States for an exact resume, in one folder per save, and the metadata of checkpoints.

`state/step-000200/` holds weights, optimizer and averages in safetensors files, one per rank (by
torch.distributed.checkpoint), and `run.json`: numbers, settings, and a sha256 of every file. Nothing in it is
pickled, so reading it runs no code. A folder gets its final name when it is complete; until then its name
ends in `.tmp`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

from annotated_types import Ge, MinLen
from pydantic import StringConstraints, TypeAdapter
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from typing_extensions import TypedDict

from radio.config import difference, to_plain
from radio.dist import Ranks
from radio.errors import CheckpointError, RadioError
from radio.io import read_json, validate, write_text
from radio.resources import commit, versions

from .config import TrainConfig, run_name
from .data.streams import Source
from .monitor import first_bad
from .setup import TeacherFacts, student_resolutions

_METADATA = "run.json"
_ALONE = "torch.distributed is disabled"  # torch's warning to a single process
_NAME = re.compile(r"step-([0-9]{1,12})")
# Settings that a resumed run may change: logging, saving, and how the work is distributed.
RESUME_IGNORED = (
    "recipe",
    "out",
    "device",
    "log_every",
    "save_every",
    "keep_last",
    "keep_every",
    "max_nonfinite_steps",
    "eval_every",
    "eval_tasks",
    "score",
    "data_root",
    "tasks",
    "teacher_placement",
    "ranks_per_group",
    "parallel",
    "grad_accum_steps",
    "compile",
    "prefetch_teachers",
    "peak_tflops",
    "loggers",
)
_Sha = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Metadata(TypedDict):
    step: Annotated[int, Ge(1)]
    settings: dict[str, Any]
    notes: dict[str, Any]
    files: Annotated[dict[str, _Sha], MinLen(1)]  # all safetensors files in the folder, by name


_METADATA_SCHEMA = TypeAdapter(_Metadata)
# What torch and safetensors raise for a file that is damaged or of another origin.
_READ_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    SafetensorError,
)
_ANYTHING = TypeAdapter(dict[str, Any])


class SavedState(NamedTuple):
    """A state to resume from."""

    path: Path
    step: int
    notes: dict[str, Any]  # the notes saved with it


def make_metadata(config: TrainConfig, teachers: Mapping[str, TeacherFacts], data: Source) -> dict[str, Any]:
    """Build the checkpoint's metadata: teachers, data and settings."""
    return {
        "name": run_name(config),
        "resolution": config.resolution,
        "teachers": describe_teachers(config, teachers),
        "data": {"fingerprint": data.fingerprint, "count": data.count, "sources": data.sources},
        "settings": to_plain(config),
    }


def describe_teachers(config: TrainConfig, teachers: Mapping[str, TeacherFacts]) -> list[dict[str, Any]]:
    """Describe the teachers as a checkpoint's metadata has them: an entry for every adaptor.

    Of several resolutions and weights it has the largest; the settings have all, of the run's first stage.
    """
    seen = student_resolutions(config)
    described = []
    for t in config.teachers:
        if t.adaptor is None:
            sharing = [each for each in config.teachers if each.adaptor_name == t.name]
            names = [each.name for each in sharing]
            described.append(
                {
                    "name": t.name,
                    "model": t.model,
                    "resolution": list(max(size for name in names for size in teachers[name].sizes.values())),
                    "student_resolution": max(side for name in names for side in seen[name]),
                    "fingerprint": teachers[t.name].fingerprint,
                    "summary_weight": max(each.summary_weight for each in sharing),
                }
            )
    return described


def resume_signature(
    config: TrainConfig,
    teachers: Mapping[str, TeacherFacts],
    data: Source,
    *,
    init: str | None = None,
    before: Sequence[TrainConfig] = (),
) -> dict[str, Any]:
    """Collect all that affects the weights, by name; only a run with an equal signature may resume.

    `init` is the fingerprint of the run's first weights, whose file may move; None = random ones. `before`
    are the settings of the stages before this one.
    """
    plain = {**_settings_to_resume(config), "init": init}
    for name, facts in teachers.items():
        plain[f"teacher {name}'s weights"] = facts.fingerprint
    for index, stage in enumerate(before, start=1):
        plain[f"stage {index}"] = _settings_to_resume(stage)
    return {**plain, "images": data.fingerprint}


def _settings_to_resume(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of one stage that affect the weights, except for files that are hashed."""
    plain: dict[str, Any] = to_plain(config)
    for name in (*RESUME_IGNORED, "init", "stages"):
        plain.pop(name)
    for name in ("workers", "max_error_fraction", "shards", "images"):  # the data may move to other paths
        plain["data"].pop(name)
    plain["data"]["clusters"].pop("folder")
    plain["cache"].pop("confirm")
    for teacher in plain["teachers"]:
        teacher.pop("fingerprint")  # the signature has the actual one
    return plain


def provenance(step: int, samples: int) -> dict[str, Any]:
    """Build a checkpoint's provenance: versions, commit, steps and images seen."""
    return {"versions": versions(), "commit": commit(), "step": step, "samples": samples}


def find_last_step(folder: Path) -> int:
    """Return the step of the newest state in a folder whose files are whole; 0 without one."""
    for path in _list_states(folder):
        with suppress(OSError, RadioError):
            return _read_notes(path, _ANYTHING)["step"]
    return 0


@final
class CheckpointManager:
    """The states of one run. Every rank calls every method; the first one renames, prunes and reports.

    Args:
        folder: `state` in the run folder, which all ranks share.
        ranks: all ranks of the run.
        settings: everything that affects the weights, by name.
        defaults: of settings that saved states may not know yet; see `defaults_of`.
        keep_last: number of newest states to keep.
        keep_every: also keep the states of steps that this divides; 0 = none.
        log: called with a message about what could not be read or written.
        schema: of the notes saved with a state.
        after: states up to this step are of earlier stages, and not resumed from.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        settings: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        keep_last: int,
        keep_every: int,
        log: Callable[[str], None],
        schema: TypeAdapter[Any] = _ANYTHING,
        after: int = 0,
    ) -> None:
        self.schema, self.after = schema, after
        self._aside: dict[Path, str] = {}  # damaged states, with the reasons
        self.folder, self.ranks, self.settings, self.log = folder, ranks, dict(settings), log
        self.defaults = defaults or {}
        self.keep_last, self.keep_every = keep_last, keep_every
        self._channel = ranks.channel()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="state")
        self._pending: Future[None] | None = None
        self._pending_step, self.last_step = 0, 0  # the last: step of the newest complete state
        warnings.filterwarnings("ignore", _ALONE)

    def newest(self) -> SavedState | None:
        """Find the newest complete state; None where there is none yet.

        Raises:
            CheckpointError: states exist but none is complete, or they are of a run with other settings.
        """
        state = self.ranks.on_leader(self._search)
        self.last_step = 0 if state is None else state.step
        return state

    def resume(
        self, tensors: Mapping[str, Tensor], check: Callable[[SavedState], str] = lambda state: ""
    ) -> SavedState | None:
        """Load tensors from the newest complete state and return it; None where there is none yet.

        `check` returns what is wrong with the loaded tensors, or an empty string; every rank calls it.

        Raises:
            CheckpointError: as `newest`.
        """
        while (state := self.newest()) is not None:
            reason = self.read(state, tensors) or self._first_reason(check(state))
            if not reason:
                return state
            self._set_aside(state.path, reason)
        return None

    def clear(self) -> None:
        """Remove every state, including incomplete ones."""
        self.ranks.on_leader(self._clear)

    def read(self, state: SavedState, tensors: Mapping[str, Tensor]) -> str:
        """Load tensors by name, whole or sharded, from a state; return what is wrong with it.

        An empty string is success, on all ranks or on none.
        """
        if reason := self._first_reason(_misfit(state.path, tensors)):
            return reason
        try:
            load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(state.path)),
                process_group=self._channel,
                no_dist=self.ranks.world == 1,
            )
        except (*_READ_ERRORS, CheckpointException) as error:
            if isinstance(error, CheckpointException) and _interrupted(error):
                raise KeyboardInterrupt from error
            return f"it cannot be read: {_reason(error)}"
        bad = first_bad(tensors)
        return self._first_reason(f"{bad} is not finite in it" if bad else "")

    def write(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        notes: Mapping[str, Any],
        on_saved: Callable[[], None],
    ) -> None:
        """Start to write a state in a thread, from copies that are made before this returns.

        Args:
            step: number of steps done.
            tensors: by name; those replicated on several ranks are written once.
            notes: plain data, saved by the first rank.
            on_saved: called on the first rank when the state is on disk, before it gets its final name.
        """
        self.wait()
        self._pending_step = step
        partial = self.folder / f"step-{step:06d}.tmp"
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        written = async_save(
            dict(tensors),
            storage_writer=writer,
            process_group=self._channel,
            no_dist=self.ranks.world == 1,
        )
        assert isinstance(written, Future)  # another type only with a custom stager
        metadata = {"step": step, "settings": self.settings, "notes": dict(notes)}
        self._pending = self._writer.submit(self._finish, partial, written, metadata, on_saved)

    def wait(self, *, last: bool = False) -> None:
        """Wait for the pending write; log a failure, after which the previous state stays the newest.

        Raises:
            RadioError: the write failed, and it was the `last`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except (OSError, CheckpointException) as error:
            stands = f"that of step {self.last_step} stands" if self.last_step else "there is none before it"
            line = f"the state of step {self._pending_step} could not be written ({_reason(error)}); {stands}"
            if last:
                raise RadioError(f"{line}. Make room and give the same command again") from error
            self.log(line)
        else:
            self.last_step = self._pending_step

    def _finish(
        self, partial: Path, written: Future[Any], metadata: dict[str, Any], on_saved: Callable[[], None]
    ) -> None:
        try:
            written.result()
            if self.ranks.leads:
                on_saved()
                files = {path.name: _sha256(path) for path in sorted(partial.glob("*.safetensors"))}
                write_text(partial / _METADATA, json.dumps({**metadata, "files": files}))
                self._name(partial)
                _sync(self.folder)
                self._prune()
        except BaseException:
            if self.ranks.leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _name(self, partial: Path) -> None:
        """Rename a complete state to its final name, which a damaged one may have."""
        path, old = partial.with_suffix(""), partial.with_suffix(".old.tmp")
        if os.path.lexists(path):
            path.rename(old)
        partial.rename(path)
        _remove(old)
        self._aside.pop(path, None)

    def _prune(self) -> None:
        states = _list_states(self.folder)
        newest = next(_step(path) for path in states if path not in self._aside)
        whole = [path for path in states if path not in self._aside]
        useless = [path for path in states if path in self._aside and _step(path) < newest]
        for path in (*whole[self.keep_last :], *useless):
            if not self.keep_every or _step(path) % self.keep_every or path in self._aside:
                # renamed first, so that a partly removed state is never read
                _remove(path.rename(path.with_suffix(".tmp")))

    def _clear(self) -> None:
        for path in (*_list_states(self.folder), *_list_partial(self.folder)):
            _remove(path)
        self._aside = {}
        if self.folder.is_dir() and not self.folder.is_symlink() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _search(self) -> SavedState | None:
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: is no folder, and states go there; move it away")
        for partial in _list_partial(self.folder):
            _remove(partial)
        for path in _list_states(self.folder):
            if path in self._aside or _step(path) <= self.after:
                continue
            try:
                metadata = _read_notes(path, self.schema)
            except (OSError, RadioError) as error:
                self._set_aside(path, _reason(error))
                continue
            if changed := difference(metadata["settings"], self.settings, self.defaults):
                raise CheckpointError(
                    f"{self.folder.parent}: holds a run with other settings ({changed}); give another --out, "
                    f"or --restart to begin anew"
                )
            return SavedState(path, metadata["step"], metadata["notes"])
        if self._aside and not self.after:  # a later stage starts from the one before
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in self._aside.items())
            raise CheckpointError(
                f"{self.folder}: not a whole training state; start again with --restart ({reasons})"
            )
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        self._aside[path] = reason
        if self.ranks.leads:
            self.log(f"{path}: damaged, and left aside ({reason})")

    def _first_reason(self, reason: str) -> str:
        """Return the first non-empty reason of any rank, on all ranks."""
        return next(filter(None, self.ranks.gather_objects(reason)), "")


def _read_notes(path: Path, schema: TypeAdapter[Any]) -> _Metadata:
    """Read and verify a state's `run.json`.

    Raises:
        OSError, RadioError: it is damaged, or a file differs from it.
    """
    metadata = read_json(path / _METADATA, _METADATA_SCHEMA, error=CheckpointError)
    if metadata["step"] != _step(path):
        raise CheckpointError(f"{_METADATA} is of step {metadata['step']}")
    validate(schema, metadata["notes"], f"{_METADATA}: notes", error=CheckpointError)
    there = {file.name for file in path.iterdir() if file.name.endswith(".safetensors")}
    if there != metadata["files"].keys():
        missing = [*(metadata["files"].keys() - there), *(there - metadata["files"].keys())]
        raise CheckpointError(f"{sorted(missing)[0]} is there or in {_METADATA}, and not in both")
    for name, sha in metadata["files"].items():
        if not stat.S_ISREG((path / name).stat().st_mode):
            raise CheckpointError(f"{name} is no regular file")
        if _sha256(path / name) != sha:
            raise CheckpointError(f"{name} was altered")
    return metadata


def _list_states(folder: Path) -> list[Path]:
    """List the folders with a state's name, newest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_step, reverse=True)


def _list_partial(folder: Path) -> list[Path]:
    """List the states that were incomplete when a run ended."""
    return list(folder.glob("*.tmp"))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None  # as for every path from `_states`
    return int(match[1])


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link of this name, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _misfit(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Return why these tensors cannot be loaded from a state's files; empty if they can."""
    try:
        held = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except _READ_ERRORS as error:
        return f"its files cannot be read: {_reason(error)}"
    for name, tensor in tensors.items():
        entry = held.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            return f"it has no {name}"
        if entry.size != tensor.shape or entry.properties.dtype != tensor.dtype:
            there = f"{list(entry.size)} {entry.properties.dtype}"
            return f"{name} is {there} in it, not {list(tensor.shape)} {tensor.dtype}"
        if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != tensor.numel():
            return f"parts of {name} are missing in it, or there twice"
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Flush a folder's entries, such as a renaming, to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _interrupted(error: CheckpointException) -> bool:
    return any(isinstance(failure, KeyboardInterrupt) for failure, _ in error.failures.values())


def _reason(error: BaseException) -> str:
    """Format an error on one line; of a `CheckpointException` the first rank's failure."""
    if isinstance(error, CheckpointException):
        for failure, _ in error.failures.values():
            return _reason(failure)
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"
