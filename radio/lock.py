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

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .errors import DataError, RadioError, shown
from .io import read_json

NAME = ".lock"

_UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


class _Holder(TypedDict):
    host: str
    pid: int
    since: str


_HOLDER = TypeAdapter(_Holder)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold a folder, made where there is none, against every other process that asks for it in this way.

    The system drops the lock with the process, however that ends: none is ever stale. A folder that was made
    for it and is empty at the end goes again.

    Args:
        folder: the folder to hold.
        doing: what the others are told is going on in it: `trained`.

    Raises:
        RadioError: another process holds it, and its host and number are named; or something else than a
            file is where the lock goes.
        OSError: the lock cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
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
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            # Of the process, not of the file: children that outlive it do not hold it on.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNLOCKABLE:
                os.close(handle)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise RadioError(_refusal(path, doing)) from error
                raise
        if _is(path, handle):
            break
        os.close(handle)  # who held it has removed it in the meantime
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


def _is_foreign(path: Path) -> bool:
    """Whether a folder, link, pipe or device stands where the lock goes."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _refusal(path: Path, doing: str) -> str:
    try:
        found = read_json(path, _HOLDER, limit=4096)
        who = f"process {found['pid']} on {shown(found['host'])}, since {shown(found['since'])}"
    except DataError:  # it has not written its name yet
        who = "another process"
    return f"{path.parent}: is being {doing} already, by {who}; wait for it, stop it, or give another --out"
