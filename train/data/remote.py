"""Shards that are not local files: read from web servers or from a program's output.

No URL ever reaches a shell: it must have plain characters only, and is one argument of a fixed program. Only
`pipe:COMMAND` runs in a shell, as the user typed it.
"""

from __future__ import annotations

import io
import os
import re
import select
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from typing import IO, Any, TypeVar, cast

from radio.errors import ConfigError, shown

T = TypeVar("T")

_WAITS = (1.0, 5.0, 30.0)  # seconds before each retry of a request
_TIMEOUT = 60.0  # seconds without an answer
_SILENCE = 300.0  # seconds without output of a program that reads a URL: it retries itself
_COMMAND_SILENCE = 3600.0  # the same for pipe:COMMAND
_PARTIAL, _NO_SUCH_RANGE, _GONE = 206, 416, (401, 403, 404, 410)
_SIGPIPE = 128 + signal.SIGPIPE  # a shell's exit status for a command whose output was not read to the end
_READ_AHEAD = 1 << 18
_SKIPPED_AT_ONCE = 1 << 20

_CURL = ("curl", "--globoff", "-fsS", "--connect-timeout", "30", "--retry", "3")
_PROGRAMS: dict[str, tuple[str, ...]] = {  # the URL comes after these
    "ais": ("ais", "get"),
    "ftps": _CURL,
    "gs": ("gsutil", "-o", "Boto:num_retries=3", "-o", "Boto:http_socket_timeout=60", "cat"),
    "scp": _CURL,
    "sftp": _CURL,
}
_AFTER: dict[str, tuple[str, ...]] = {"ais": ("-",)}
SCHEMES = ("file", "hf", "http", "https", "pipe", *_PROGRAMS)

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII | re.IGNORECASE)
_HOST = r"[A-Za-z0-9._~%@:\[\]-]+"
_WEB = re.compile(rf"https?://{_HOST}([/?][A-Za-z0-9._~%@:!*(),+=&/?-]*)?", re.IGNORECASE)
_PLAIN = re.compile(rf"[a-z]+://{_HOST}/[A-Za-z0-9._~%@:+=,/-]+", re.IGNORECASE)
_HF = re.compile(
    r"hf://(?:(dataset|space|model)s/)?([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?/([\w./+=,@~-]+)",
    re.ASCII | re.IGNORECASE,
)


def scheme_of(name: str) -> str:
    """Return the scheme of a shard's name, before the first colon, in lower case; empty for a path."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else ""


def check_url(name: str, pattern: str) -> None:
    """Check the URL of a shard, whose name was expanded from a pattern.

    Raises:
        ConfigError: the scheme is unknown, or the URL has characters that are not plain.
    """
    scheme = scheme_of(name)
    if scheme == "s3":
        pattern = shown(pattern)
        raise ConfigError(f"{pattern}: read S3 through a pipe, as in 'pipe:aws s3 cp {pattern} -'")
    if scheme not in SCHEMES:
        raise ConfigError(
            f"{shown(name)}: the scheme {scheme}: is not one of {', '.join(sorted(SCHEMES))}; "
            f"give a file (./{shown(name)}), or pipe:COMMAND"
        )
    if scheme in ("file", "pipe"):
        return
    plain = {"hf": _HF, "http": _WEB, "https": _WEB}.get(scheme, _PLAIN)
    if not plain.fullmatch(name):
        form = {"hf": "hf://datasets/OWNER/NAME@REVISION/FILE.tar"}.get(scheme, f"{scheme}://HOST/FILE.tar")
        raise ConfigError(f"{shown(name)}: is no plain URL; wanted {form}, other characters written as %20")


def check_installed(scheme: str) -> None:
    """Check that the program which reads the URLs of a scheme is installed.

    Raises:
        ConfigError: it is not.
    """
    program = _PROGRAMS.get(scheme, ("",))[0]
    if program and shutil.which(program) is None:
        raise ConfigError(f"{scheme}:// is read by the program {program}, which is not installed")


def open_remote(name: str, position: int) -> IO[bytes]:
    """Open a shard of a scheme other than `file` from a byte position on.

    Raises:
        FileNotFoundError: the server does not have it.
        EOFError: the program's output ends before the position.
        OSError: it cannot be opened.
    """
    scheme = scheme_of(name)
    if scheme != "pipe" and scheme not in _PROGRAMS:
        url, headers = _on_the_hub(name) if scheme == "hf" else (name, {})
        return io.BufferedReader(Served(url, position, headers), _READ_AHEAD)
    if scheme == "pipe":
        piped = Piped(name[len("pipe:") :], _COMMAND_SILENCE)
    else:
        piped = Piped((*_PROGRAMS[scheme], name, *_AFTER.get(scheme, ())), _SILENCE)
    stream = io.BufferedReader(piped, _READ_AHEAD)
    try:
        if missing := _skip(stream, position):
            raise EOFError(f"ends {missing} bytes before where it was left")
    except BaseException:
        stream.close()
        raise
    return stream


def _on_the_hub(name: str) -> tuple[str, dict[str, str]]:
    """Return the URL of a file on the Hugging Face hub and the headers with the user's token."""
    from huggingface_hub import get_token, hf_hub_url

    match = _HF.fullmatch(name)
    assert match is not None, "checked before"
    kind, owner, revision, path = match.groups()
    url = hf_hub_url(owner, path, repo_type=(kind or "model").lower(), revision=revision)
    token = get_token()
    return url, {"Authorization": f"Bearer {token}"} if token else {}


class Piped(io.RawIOBase):
    """The output of a command; stopping it early is not an error.

    Args:
        command: a shell command line, or a program and its arguments to run without a shell.
        silence: longest time without output in seconds.
    """

    def __init__(self, command: str | Sequence[str], silence: float) -> None:
        super().__init__()
        self._silence = silence
        try:
            self._process = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                bufsize=0,
                process_group=0,  # so that processes started by the shell can be stopped too
            )
        except (OSError, ValueError) as error:
            raise OSError(f"the command cannot be started ({error})") from error
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end of the output.

        Raises:
            OSError: the command failed (raised after all its output is read), or is silent for too long.
        """
        if not _wait_for(self._output, self._silence):
            raise OSError(f"the command has given nothing for {self._silence:.0f} s")
        count = os.readv(self._output.fileno(), [buffer])
        if not count and len(buffer):
            self._check_status()
        return count

    def close(self) -> None:
        """Stop the command."""
        if not self.closed:
            self._output.close()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # SIGTERM is blocked in a loader's children
            self._process.wait()
        super().close()

    def _check_status(self) -> None:
        try:
            status = self._process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"the command has not ended {_TIMEOUT:.0f} s after its output") from error
        if status not in (0, _SIGPIPE, -signal.SIGPIPE):
            raise OSError(f"the command failed: exit {status}")


def _wait_for(file: IO[bytes], seconds: float) -> bool:
    """Wait until a file is readable; False after `seconds`. By poll: select fails beyond 1024 files."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


class Served(io.RawIOBase):
    """A file on a web server from a position on, requested again where the connection breaks."""

    def __init__(self, url: str, position: int, headers: dict[str, str]) -> None:
        super().__init__()
        self._url, self._position, self._headers = url, position, headers
        self._end: int | None = None
        self._response: HTTPResponse | None = None
        _retry(self._connect)

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; return the number of bytes, 0 at the end of the file.

        Raises:
            OSError: the server does not answer, or no longer has the file.
        """
        return _retry(lambda: self._read(buffer))

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()

    def _read(self, buffer: Any) -> int:
        if self._response is None and self._position != self._end:
            self._connect()
        try:
            count = self._response.readinto(buffer) if self._response is not None else 0
            if not count and self._end is not None and self._position < self._end:
                raise OSError(f"the connection ended at byte {self._position} of {self._end}")
        except (OSError, HTTPException) as error:
            self._disconnect()
            raise OSError(str(error)) from error
        self._position += count
        return count

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def _connect(self) -> None:
        """Request the file from the position on."""
        try:
            request = urllib.request.Request(self._url)
            for name, value in self._headers.items():
                request.add_unredirected_header(name, value)  # not sent to redirect targets
            if self._position:
                request.add_header("Range", f"bytes={self._position}-")
            response = cast(HTTPResponse, urllib.request.urlopen(request, timeout=_TIMEOUT))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == _NO_SUCH_RANGE:
                self._end = self._position
                return
            raise (FileNotFoundError if error.code in _GONE else OSError)(str(error)) from error
        except (HTTPException, ValueError) as error:  # an invalid address or answer
            raise OSError(str(error)) from error
        first = self._first_byte(response)
        length = _number(response.headers.get("Content-Length"))
        self._response, self._end = response, None if length is None else first + length
        if first != self._position:  # the server sends the whole file
            try:
                _skip(response, self._position)
            except HTTPException as error:
                self._disconnect()
                raise OSError(str(error)) from error

    def _first_byte(self, response: HTTPResponse) -> int:
        """Return the byte position at which a response starts."""
        if response.status != _PARTIAL:
            return 0
        content_range = re.match(r"bytes (\d{1,18})-", response.headers.get("Content-Range") or "")
        if content_range and int(content_range[1]) != self._position:
            response.close()
            raise OSError(f"the server was to send from byte {self._position} and gave {content_range[1]}")
        return self._position


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\d{1,18}", text, re.ASCII) else None


def _retry(action: Callable[[], T]) -> T:
    """Run an action and return its result; retry after a wait on network errors."""
    for wait in _WAITS:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(wait)
    return action()


def _skip(stream: IO[bytes] | HTTPResponse, count: int) -> int:
    """Skip so many bytes; return how many were missing at the end."""
    while count and (passed := len(stream.read(min(count, _SKIPPED_AT_ONCE)))):
        count -= passed
    return count
