"""A folder is held by one process at a time, and by none that has ended."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from radio.errors import RadioError
from radio.lock import NAME, locked

HOLD = """
import os, sys, time
from pathlib import Path
from radio.lock import locked
with locked(Path(sys.argv[1]), "trained"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(folder: Path, how: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):  # its children too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_second_process_is_refused_with_host_and_number_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as process:
        wanted = (
            rf"run: is being trained already, by process {process.pid} on {socket.gethostname()}, since 20"
        )
        with pytest.raises(RadioError, match=wanted), locked(folder, "trained"):
            pass
        assert (folder / NAME).exists()


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_lock_goes_with_its_process_even_where_its_children_live_on(tmp_path: Path, how: str) -> None:
    with holder(tmp_path, how) as process:
        process.kill()
        process.wait()
        assert (tmp_path / NAME).exists()
        with locked(tmp_path, "trained"):
            pass


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "run", "trained"):
        assert (tmp_path / "deep" / "run" / NAME).is_file()
    assert not (tmp_path / "deep").exists()
    with locked(tmp_path / "deep" / "run", "trained"):
        (tmp_path / "deep" / "run" / "work").touch()
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["work"]


def test_what_a_dead_process_left_in_the_file_does_not_matter(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe", b'{"host": "elsewhere", "pid": 1, "since": "ever"}', b"[" * 10_000):
        (tmp_path / NAME).write_bytes(content)
        with locked(tmp_path, "trained"):
            pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere")])
def test_something_else_where_the_lock_goes_is_told_and_left(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / NAME)
    with pytest.raises(RadioError, match=r"\.lock: is no regular file"), locked(tmp_path, "trained"):
        pass
    assert os.path.lexists(tmp_path / NAME)


def test_a_lock_that_does_not_fit_the_disk_names_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with (
            pytest.raises(OSError, match=r"No space left on device: '.*\.lock'"),
            locked(tmp_path, "trained"),
        ):
            pass
    with locked(tmp_path, "trained"):  # nothing holds it on
        pass
