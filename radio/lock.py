"""A lock on a folder, so that two processes do not write the same files at the same time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from annotated_types import Interval
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .errors import DataError, RadioError, shown
from .io import read_json

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
    found = _holder(path)
    who = "another process"
    if found is not None:
        who = f"process {found['pid']} on {shown(found['host'])}, since {shown(found['since'])}"
    return f"{path.parent}: is being {doing} already, by {who}; wait for it, stop it, or give another --out"
