"""Shards from files, pipes and servers are the same, from the beginning and from a byte on."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, strategies
from hypothesis import settings as effort

from radio.errors import ConfigError
from train.config import DataConfig
from train.data import remote as module
from train.data.errors import ShardError
from train.data.remote import scheme_of
from train.data.shards import LeftOut, expand, index_shard, is_image, open_shard, runs_program

from .conftest import follow, pack, pack_images, settings

FILES = [(f"{n}.jpg", bytes([n]) * 3000) for n in range(40)]


class Handler(BaseHTTPRequestHandler):
    """A server of one folder that can be told to be bad at it."""

    def __init__(
        self,
        folder: Path,
        asked: list[str | None],
        ranges: bool,
        stops: tuple[int, ...],
        said: dict[str, str],
        *rest: object,
    ) -> None:
        self.folder, self.asked, self.ranges, self.stops, self.said = folder, asked, ranges, stops, said
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, status, first = path.read_bytes(), 200, 0
        stop = self.stops[len(self.asked) - 1] if len(self.asked) <= len(self.stops) else len(data)
        if wanted and self.ranges:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                self.send_error(416)
                return
            data, status = data[first:], 206
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | self.said).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: max(stop - first, 0)])

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serving(
    folder: Path,
    *,
    ranges: bool = True,
    stops: tuple[int, ...] = (),
    said: dict[str, str] | None = None,
) -> Iterator[tuple[str, list[str | None]]]:
    """The address of a server of the folder, and the ranges it was asked for; answers may stop at a byte."""
    asked: list[str | None] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folder, asked, ranges, stops, said or {}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITS", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def contents(name: str, position: int = 0) -> list[bytes]:
    tar = open_shard(name, position)
    found = []
    while (member := tar.next()) is not None:
        found.append(tar.read(member))
    tar.close()
    return found


def half_way(name: str) -> int:
    tar = open_shard(name)
    for _ in range(20):
        member = tar.next()
    tar.close()
    assert member is not None
    return member.end


@pytest.mark.parametrize("ranges", [True, False])
def test_all_ways_give_the_same(tmp_path: Path, ranges: bool) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    wanted = [data for _, data in FILES]
    middle = half_way(str(path))
    with serving(tmp_path, ranges=ranges) as (address, asked):
        for name in (str(path), f"file:{path}", f"pipe:cat {path}", f"{address}/a.tar"):
            assert contents(name) == wanted
            assert contents(name, middle) == wanted[20:]
    assert asked == [None, f"bytes={middle}-"]


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", FILES)
    with serving(tmp_path, stops=(30_000, 70_000)) as (address, asked):
        assert contents(f"{address}/a.tar") == [data for _, data in FILES]
    assert asked[0] is None
    assert len(asked) == 3
    assert all(text is not None and text.startswith("bytes=") for text in asked[1:])
    with serving(tmp_path, stops=(30_000,) * 9) as (address, asked):
        tar = open_shard(f"{address}/a.tar")
        assert tar.next() is not None
        with pytest.raises(OSError, match="the connection ended at byte"):  # noqa: PT012
            while (member := tar.next()) is not None:
                tar.read(member)
        tar.close()


def test_a_whole_file_that_breaks_before_the_place_is_a_cause(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", FILES)
    # A server without ranges, whose chunks are none: http.client has an error of its own for that.
    place, said = half_way(str(tmp_path / "a.tar")), {"Transfer-Encoding": "chunked"}
    with (
        serving(tmp_path, ranges=False, said=said) as (url, asked),
        pytest.raises(ShardError, match="IncompleteRead") as caught,
    ):
        open_shard(f"{url}/a.tar", place)
    assert caught.value.cause == "unreadable" and len(asked) == 3


def test_what_is_missing_or_fails_has_a_cause(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    with serving(tmp_path) as (address, _):
        for name in (str(tmp_path / "b.tar"), f"{address}/b.tar"):
            with pytest.raises(ShardError, match="no such shard") as caught:
                open_shard(name)
            assert caught.value.cause == "missing"
        with pytest.raises(ShardError) as caught:
            open_shard(f"{address}/a.tar", path.stat().st_size + 512).next()
        assert caught.value.cause == "truncated"
    with pytest.raises(ShardError) as caught:
        open_shard(address)  # nobody there any more
    assert caught.value.cause == "unreadable"
    with pytest.raises(ShardError) as caught:
        open_shard(f"pipe:cat {path}", path.stat().st_size + 512)
    assert caught.value.cause == "truncated"


def test_a_command_that_fails_is_found_out_after_what_it_gave(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    tar = open_shard(f"pipe:head -c 60000 {path}; exit 3")
    found = 0
    with pytest.raises(OSError, match="exit 3"):  # noqa: PT012
        while (member := tar.next()) is not None:
            tar.read(member)
            found += 1
    assert found == 60000 // (512 + 3072)
    tar.close()


def test_a_command_that_is_not_needed_any_more_is_stopped(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    tar = open_shard(f"pipe:cat {path}; exec sleep 98765")
    assert tar.next() is not None
    tar.close()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 98765" not in running.splitlines()


def test_a_run_may_read_through_pipes(tmp_path: Path) -> None:
    for number in range(3):
        pack_images(tmp_path / f"{number}.tar", 10 * number, 5)
    local = settings(DataConfig(shards=(f"{tmp_path}/{{0..2}}.tar",), num_streams=4))
    piped = settings(DataConfig(shards=(f"pipe:cat {tmp_path}/{{0..2}}.tar",), num_streams=4))
    wanted = [step[0].keys for step in follow(local, range(6))]
    first = list(follow(piped, range(3)))
    assert [step[0].keys for step in first] == wanted[:3]
    rest = follow(piped, range(3, 6), cursors=[first[-1][0].cursors], workers=1)
    assert [step[0].keys for step in rest] == wanted[3:]


def test_patterns_are_spelled_out(tmp_path: Path) -> None:
    names = ["x/{00..02}.tar", "pipe:curl -s https://a/{0..1}.tar", "https://b/c.tar"]
    assert expand(names) == (
        "x/00.tar",
        "x/01.tar",
        "x/02.tar",
        "pipe:curl -s https://a/0.tar",
        "pipe:curl -s https://a/1.tar",
        "https://b/c.tar",
    )
    pack(tmp_path / "b.tar", [])
    pack(tmp_path / "a.tar", [])
    assert expand([str(tmp_path)]) == (f"{tmp_path}/a.tar", f"{tmp_path}/b.tar")


def test_names_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wanted a pattern such as photos-\{000000\.\.000003\}\.tar"):
        expand(["a{0..1.tar"])
    with pytest.raises(ConfigError, match="a folder without tar files"):
        expand([str(tmp_path)])
    with pytest.raises(ConfigError, match=r"'pipe:aws s3 cp s3://b/\{0\.\.9\}\.tar -'"):
        expand(["s3://b/{0..9}.tar"])
    with pytest.raises(ConfigError, match=r"the scheme foo: is not one of .*https"):
        expand(["foo://b/0.tar"])


@pytest.mark.parametrize(
    "name",
    [
        "gs://x'; touch FILE; '",
        "gs://x/$(touch FILE)",
        "gs://bucket/*.tar",
        "gs://bucket/a.tar\n",
        "sftp://host/`touch FILE`",
        "scp://host/a;touch FILE",
        "ais://x'; touch FILE; '",
        "hf://x'; touch FILE; '",
        "hf://datasets/a/b/$(touch FILE).tar",
        "https://host/a b.tar",
        "http://host/a\r\nHost: other",
        "http://host/\ud83d.tar",
        "http:///a.tar",
    ],
)
def test_only_plain_urls_go_further(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is no plain URL; wanted [a-z]+://") as caught:
        expand([name])
    assert str(caught.value).isprintable()


def test_a_url_is_one_argument_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    program = tmp_path / "gsutil"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" > {tmp_path}/last\ncat {path}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (name,) = expand(["gs://bucket/a%20b.tar"])
    assert contents(name) == [data for _, data in FILES]
    assert (tmp_path / "last").read_text() == f"{name}\n"
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="gs:// is read by the program gsutil, which is not installed"):
        expand([name])


def test_a_command_that_gives_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMAND_SILENCE", 0.05)
    path = pack(tmp_path / "a.tar", FILES)
    tar = open_shard(f"pipe:head -c 512 {path}; sleep 98764; true")
    member = tar.next()
    assert member is not None
    with pytest.raises(OSError, match="has given nothing for 0 s"):
        tar.read(member)
    tar.close()
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 98764" not in running.splitlines()  # what the shell has started is stopped with it


def test_a_server_that_gives_another_place_is_found_out(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", FILES)
    middle = half_way(str(path))
    with serving(tmp_path, said={"Content-Range": f"bytes 512-{middle}/{2 * middle}"}) as (address, _):
        with pytest.raises(ShardError, match=f"was to send from byte {middle} and gave 512") as caught:
            open_shard(f"{address}/a.tar", middle)
        assert caught.value.cause == "unreadable"
    with serving(tmp_path, said={"Content-Length": "9" * 5000}) as (address, _):
        assert contents(f"{address}/a.tar") == [data for _, data in FILES]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    for name in ("a.tar", "b.tar"):
        with pytest.raises(ShardError, match="is no regular file"):
            open_shard(str(tmp_path / name))


@pytest.mark.parametrize(
    ("pattern", "command"),
    [
        ("pipe:touch a", "touch a"),
        ("PIPE:touch a", "touch a"),
        ("{pipe,file}:touch a", "touch a"),
        ("{a.tar,pi{p,q}e:touch {0..3}}", "touch 0"),
        ("\\pipe:touch a", "touch a"),
        ("a/b.tar", None),
        ("a/pipe:b.tar", None),
        (" pipe:touch a", None),  # a file of that name
        ("gs://bucket/a.tar", None),
        ("https://host/pipe:a.tar", None),
    ],
)
def test_a_pattern_that_runs_a_command_is_known(pattern: str, command: str | None) -> None:
    assert runs_program(pattern) == command


def test_a_file_that_is_called_like_a_command_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pack(tmp_path / "pipe:touch ran; cat none.tar", FILES)
    assert runs_program(".") is None
    (name,) = expand(["."])
    assert contents(name) == [data for _, data in FILES]
    (tmp_path / "pipe:touch ran").mkdir()
    pack(tmp_path / "pipe:touch ran" / "a.tar", FILES)
    assert runs_program("pipe:touch ran") == "touch ran"  # a scheme goes before a folder, everywhere
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a{0..999999999}.tar", "stands for 1,000,000,000 names"),
        ("pipe:cat {a,b}" + "{0..9}" * 99, "names, and the limit is"),
        ("}{", "unbalanced braces"),
        ("", "names a shard without a name"),
        ("{,a.tar}", "names a shard without a name"),
        ("a\0.tar", "names a shard without a name"),
    ],
)
def test_patterns_have_limits(pattern: str, said: str) -> None:
    for read in (runs_program, lambda pattern: expand([pattern])):
        with pytest.raises(ConfigError, match=re.escape(said)) as caught:
            read(pattern)
        assert len(str(caught.value)) < 400


def test_there_are_not_more_shards_than_anybody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.shards.MAX_NAMES", 10)
    assert len(expand(["a{0..9}.tar"])) == 10
    with pytest.raises(ConfigError, match="more than 10 shards"):
        expand(["a{0..9}.tar", "b.tar"])
    monkeypatch.setattr("train.data.shards.MAX_NAMES_LETTERS", 20)
    with pytest.raises(ConfigError, match="or 20 letters in their names"):
        expand(["a{0..1}.tar", "b{0..1}.tar"])


PIECES = strategies.sampled_from(
    ["pipe:", "PIPE:", "file:", "gs://", "https://", "a.tar", "{", "}", ",", "..", "0", "9", "\\\\", " ", "/"]
)


@effort(max_examples=300, deadline=None)
@given(pattern=strategies.lists(PIECES | strategies.text(max_size=3), max_size=9).map("".join))
def test_any_pattern_is_names_or_an_error(pattern: str) -> None:
    """And whatever is asked for as a command is known beforehand."""
    with suppress(ConfigError):
        names, command = expand([pattern]), runs_program(pattern)
        assert any(scheme_of(name) == "pipe" for name in names) == (command is not None)


def test_images_are_known_by_their_ending() -> None:
    assert all(map(is_image, ("0.jpg", "a/0.JPEG", "a.b/0.png", "0.webp")))
    assert not any(map(is_image, ("0.txt", "0.seg.png", "._0.jpg", "a/._0.jpg", "jpg", "0")))


@pytest.mark.parametrize(
    ("names", "samples", "left_out", "first"),
    [
        (["0.jpg", "0.seg.png", "1.mask.png", "1.png"], 2, 0, ""),  # masks beside their images
        ([f"img.v1.{n:04d}.jpg" for n in range(8)], 0, 8, "img.v1.0000.jpg"),
        (["a.jpg", "img.v1.0.JPG", "img.v1.1.jpg", "b.jpg", "c.d.png"], 2, 3, "img.v1.0.JPG"),
        (["x.v1/0.jpg", "x.v1/1.jpg"], 2, 0, ""),  # the dots of folders are none
        (["._0.jpg", ".0.jpg", "a/._0.jpg", "0.txt", "0.a.txt", "jpg"], 0, 0, ""),
    ],
)
def test_images_that_are_not_samples_are_counted(
    names: list[str], samples: int, left_out: int, first: str
) -> None:
    seen = LeftOut()
    assert sum(map(seen.see, names)) == samples
    seen.end()
    assert (seen.count, seen.first) == (left_out, first)


def test_an_image_may_lie_before_the_place_to_go_on_from() -> None:
    seen = LeftOut(whole=False)
    assert not any(map(seen.see, ["0.seg.png", "0.mask.png", "1.seg.png"]))
    seen.end()
    assert (seen.count, seen.first) == (1, "1.seg.png")


def test_an_outline_leads_to_every_image(tmp_path: Path) -> None:
    files = [
        (f"{'long-' * 30 if n == 3 else ''}{n}.{ending}", b"x" * n)
        for n in range(9)
        for ending in ("jpg", "txt")
    ]
    path = pack(tmp_path / "a.tar", files)
    found = index_shard(str(path))
    tar = open_shard(str(path))
    for (name, data), at in zip(files[::2], found.images, strict=True):
        tar.jump(at)
        member = tar.next()
        assert member is not None
        assert (member.name, tar.read(member)) == (name, data)
    tar.jump(found.end)
    assert tar.next() is None
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[: found.images[5] + 100])
    assert index_shard(str(cut)) == (found.images[:5], found.images[5], "")
    with pytest.raises(ShardError, match="no such shard"):
        index_shard(str(tmp_path / "b.tar"))
    tar.close()
