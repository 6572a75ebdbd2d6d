"""A folder is held by one process at a time, and by none that has ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

from radio.errors import RadioError, one_line
from radio.resources import NAME, locked

HERE = socket.gethostname()

HOLD = """
import os, sys, time
from pathlib import Path
from radio.resources import locked
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


RACE = """
import os, sys, time
from pathlib import Path
from radio.errors import RadioError, one_line
from radio.resources import locked
folder, mark = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(150):
    try:
        with locked(folder, "trained"):
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            mark.unlink()
    except RadioError as error:
        assert "is being trained already" in str(error)
"""


def test_who_comes_and_goes_at_the_same_moment_is_alone_or_refused(tmp_path: Path) -> None:
    """The folder too comes and goes with each."""
    command = [sys.executable, "-c", RACE, str(tmp_path / "deep" / "run"), str(tmp_path / "mark")]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in both] == ["", ""]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="run"), locked(tmp_path / "run", "trained"):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: int) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(OSError, match=r"Read-only file system: .*\.lock") as caught,
        locked(tmp_path, "trained"),
    ):
        pass
    assert str(one_line(caught.value)).endswith("choose a folder that can be written")


@pytest.mark.parametrize(
    ("host", "pid", "refused"),
    [
        ("elsewhere", 7, True),
        (HERE, os.getppid(), True),
        (HERE, os.getpid(), False),
        (HERE, 2**31 - 1, False),
    ],
    ids=["elsewhere", "a living process", "this process", "a dead process"],
)
def test_where_the_system_cannot_lock_the_file_says_who_holds_it(
    host: str, pid: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    (tmp_path / NAME).write_text(json.dumps({"host": host, "pid": pid, "since": "2026"}))
    wanted = rf"by process {pid} on {host}, since 2026; wait .* Where that one has ended, remove .*\.lock"
    with pytest.raises(RadioError, match=wanted) if refused else nullcontext(), locked(tmp_path, "trained"):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert (tmp_path / NAME).exists() == refused


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 10_000])
def test_a_holder_whose_file_is_damaged_is_another_process(tmp_path: Path, content: bytes) -> None:
    with holder(tmp_path):
        (tmp_path / NAME).write_bytes(content)
        with (
            pytest.raises(RadioError, match="already, by another process; wait for it"),
            locked(tmp_path, "trained"),
        ):
            pass
