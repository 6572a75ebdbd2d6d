"""What processes on one machine share: locks on folders, and memory."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .errors import DataError, RadioError, SizeError, shown
from .io import read_json
from .types import Backbone

NAME = ".lock"

_ATTEMPTS = 100  # to open the lock while other processes remove and make the folder
_UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


class _Holder(TypedDict):
    host: str
    pid: Annotated[int, Interval(ge=1, lt=2**31)]
    since: str


_HOLDER = TypeAdapter(_Holder)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder (made if absent) against every other process that locks it with this function.

    The operating system releases the lock when the process ends, however it ends: no lock is ever stale. A
    folder that was made for it and is empty at the end is removed.

    Args:
        folder: the folder to lock.
        doing: what is done in it, for the error message of other processes: `trained`.

    Raises:
        RadioError: another process holds the lock (the message names its host and process id), or something
            other than a file is in the lock's place.
        OSError: the lock cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    handle = _take(path, doing)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is still held
        os.close(handle)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _take(path: Path, doing: str) -> int:
    while True:
        if _is_foreign(path):
            raise RadioError(f"{shown(path)}: is no regular file, and the lock goes there; move it away")
        handle = _open(path)
        try:
            # lockf's lock belongs to the process, not to the file: children that outlive it do not keep it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN)
            if held or error.errno not in _UNLOCKABLE or _may_live(_holder(path)):
                os.close(handle)
                if not held and error.errno not in _UNLOCKABLE:
                    raise
                ended = "" if held else f". Where that one has ended, remove {shown(path)}"
                raise RadioError(_refusal(path, doing) + ended) from error
        if _is(path, handle):
            break
        os.close(handle)  # its previous holder has removed it in the meantime
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(holder).encode())
    except OSError as error:  # a full disk
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        error.filename = str(path)
        raise
    return handle


def _open(path: Path) -> int:
    """Open the lock file; retry while the previous holder removes the file or its folder."""
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _is_foreign(path: Path) -> bool:
    """Check whether a folder, link, pipe or device is in the lock file's place."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> _Holder | None:
    """Read who holds the folder from the lock file; None if the holder has not written its name yet."""
    try:
        return read_json(path, _HOLDER, limit=4096)
    except DataError:
        return None


def _may_live(holder: _Holder | None) -> bool:
    """Check whether the holder may still run, on a file system without locks (on another host it may)."""
    if holder is None or holder["host"] != socket.gethostname():
        return holder is not None
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return holder["pid"] != os.getpid()


def _refusal(path: Path, doing: str) -> str:
    holder = _holder(path)
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {shown(holder['host'])}, since {shown(holder['since'])}"
    return f"{path.parent}: is being {doing} already, by {who}; wait for it, stop it, or give another --out"


_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # limit of a container or a job


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or each local rank's share of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, _allowed(whole)) // _local_ranks()


def collect() -> None:
    """Run the garbage collector; defer an interruption (Ctrl-C) until it is done.

    Python would raise it in the running finalizer, where errors are printed and dropped.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        gc.collect()  # only the main thread receives signals
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _allowed(whole: int) -> int:
    try:
        text = _CONTROL_GROUP.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return whole
    return int(text) if text.isdecimal() else whole


def _local_ranks() -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(text), 1) if text.isdecimal() else 1


_LEAST_PATCH = 8  # pixels, for a backbone that accepts any size


def check_memory(
    model: Backbone, batch: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that the images of a batch and their tokens fit into memory; activations are not counted.

    Raises:
        SizeError: they do not; the message has the sizes.
    """
    height, width = size
    patch = max(model.patch_size, _LEAST_PATCH)
    rows, columns = max(height // patch, 1), max(width // patch, 1)
    need = batch * dtype.itemsize * (3 * height * width + rows * columns * model.token_dim)
    there = memory_of(device)
    if need > there:
        raise SizeError(
            f"{batch} images of {height}x{width} px and their tokens take {need / 1e9:,.1f} GB, and {device} "
            f"has {there / 1e9:,.1f}; make the images or the batch smaller"
        )
