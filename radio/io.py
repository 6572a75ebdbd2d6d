"""Write files atomically; read files within limits, and foreign ones through a schema.

Every file that this process did not write is read by this module: size, encoding, nesting and numbers are
checked first (`read_text`, `read_json`, `read_jsonl`), then its structure (a pydantic `TypeAdapter`, through
`validate`). Any problem is one error that names the file, the place in it, and what to do.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import braceexpand
import pydantic_core
from pydantic import TypeAdapter, ValidationError

from .errors import CheckpointError, ConfigError, DataError, RadioError, shown

T = TypeVar("T")

MAX_METADATA_BYTES = 64 << 20  # reports, metadata, logs: far above any real one
MAX_DATA_BYTES = 4 << 30  # annotations: the largest published ones have about 1 GB

_MAX_NAME = 255  # bytes of a file's name: the limit of file systems

MAX_NAMES = 2_000_000  # of a pattern: the largest published sets of shards have 1.4 million
MAX_NAMES_LETTERS = 1 << 29
"""Limit of the characters of all names of a pattern together."""
_MAX_PATTERN, _MAX_DEPTH = 4096, 50  # characters; nested braces
_RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?\n?")

_STRAY_SECONDS = 3600  # age at which an incomplete folder without an owner is removed

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BYTE_ORDER_MARKS = (  # longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; lone surrogates, which it cannot encode, become U+FFFD."""
    write_lines(path, (text,))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file atomically as `write_text` does, from lines with their ends, one after the other."""
    _write(path, (without_surrogates(line).encode() for line in lines))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically, creating its folder: write a temporary sibling, sync it, then rename it."""
    _write(path, (data,))


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    _check_replaceable(path)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as problem:
        if (
            isinstance(problem, OSError) and problem.errno and problem.filename is None
        ):  # a full disk: the error names no file
            problem.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_replaceable(path: Path) -> None:
    """Check that a rename may replace the path: no folder, no device such as /dev/null, and not nameless."""
    mode = _mode(path)
    if stat.S_ISDIR(mode) or not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise ConfigError(f"{shown(path)}: is a device, which no file may replace; name a file")


def _mode(path: Path) -> int:
    """Read the mode of a path, following links; 0 if it does not exist."""
    try:
        return path.stat().st_mode
    except OSError:
        return 0
    except ValueError as problem:  # a NUL in it
        raise ConfigError(f"{shown(path)}: cannot be a path ({problem})") from problem


def check_file(path: Path, option: str) -> None:
    """Check that a file can be written at the path; leave nothing behind.

    Args:
        option: the command-line option that named the file, for the error.

    Raises:
        ConfigError: it is a folder, a pipe or a device, has no name, or its folder is not writable.
    """
    mode = _mode(path)
    if stat.S_ISDIR(mode) or not path.name:
        raise ConfigError(f"{option} {shown(path)}: is a folder; name a file in it")
    if mode and not stat.S_ISREG(mode):
        raise ConfigError(f"{option} {shown(path)}: is no regular file, and would be replaced; name a file")
    if len(os.fsencode(path.name)) > _MAX_NAME:
        raise ConfigError(
            f"{option} {shown(path.name[:60])}…: has over {_MAX_NAME} bytes; choose a shorter name"
        )
    check_writable(path.parent, option)


def make_folder(target: Path, fill: Callable[[Path], None]) -> bool:
    """Make a folder atomically: fill a temporary sibling, then rename it to `target`.

    If another process has made `target` in the meantime, its folder is kept and this one discarded.

    Args:
        target: absent or empty.
        fill: writes the content into the folder that it receives.

    Returns:
        Whether `target` is the folder made here.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target.parent, target.name) as partial:
        try:
            fill(partial)
        except OSError as problem:
            if problem.errno and problem.filename is None:  # a full disk: the error names no file
                problem.filename = str(target)
            raise
        partial.chmod(0o777 & ~_umask())  # mkdtemp's folders are private
        try:
            partial.rename(target)  # replaces an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


@contextlib.contextmanager
def _partial(place: Path, name: str) -> Iterator[Path]:
    """Yield a folder in `place` for content of `name`; remove stray ones first, and it at the end."""
    prefix = f".{name[:200]}.partial-"
    _remove_stray(place, prefix)
    partial = Path(tempfile.mkdtemp(dir=place, prefix=prefix))
    lock = _lock(partial)  # held until this process ends, however it ends
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder, waiting for other processes; none where locks are unsupported."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a folder for files that belong together; at the end move all of them into `folder`, or none.

    Other files in `folder` are unchanged; those of the same names are replaced.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    with _partial(place, folder.name) as partial:
        try:
            yield partial
            files = [path.relative_to(partial) for path in sorted(partial.rglob("*")) if path.is_file()]
            for file in files:
                _check_replaceable(folder / file)
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).replace(folder / file)
        except OSError as problem:
            if problem.filename is not None:
                problem.filename = str(problem.filename).replace(str(partial), str(folder))
            raise


def check_writable(folder: Path, option: str, *, utf8: bool = False) -> None:
    """Check that files can be made in a folder, which need not exist yet; leave nothing behind.

    Args:
        option: the command-line option that named the folder, for the error.
        utf8: require a name in UTF-8, for libraries that accept no other (safetensors).

    Raises:
        ConfigError: it is a file, is inside one, is not writable, or is no valid path.
    """
    if utf8 and str(folder) != without_surrogates(str(folder)):
        raise ConfigError(f"{option} {shown(folder)}: its name is not UTF-8; choose another folder")
    try:
        nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if _stands(place))
        tempfile.TemporaryFile(dir=nearest).close()
    except (OSError, ValueError) as problem:
        reason = _reason(problem) if isinstance(problem, OSError) else problem
        raise ConfigError(
            f"{option} {shown(folder)}: {reason}; choose a folder that can be written"
        ) from problem


def _stands(place: Path) -> bool:
    """Check whether the path exists, including as a broken link."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def find_file(path: Path, what: str) -> int:
    """Return the size in bytes of a regular file; `what` names it in errors.

    Raises:
        CheckpointError: no regular file exists there.
    """
    try:
        if path.is_file():
            return path.stat().st_size
        kind = "; that is a folder" if path.is_dir() else "; that is no regular file" if path.exists() else ""
    except OSError as error:  # a name that is too long, a folder that may not be entered
        kind = f" ({error.strerror})"
    raise CheckpointError(f"{_cut(shown(path), 1024)}: no such {what}{kind}")


def read_bytes(path: Path, *, limit: int = MAX_METADATA_BYTES, error: type[RadioError] = DataError) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        RadioError: of the type `error`: no such file, no regular file (a folder, a device, a pipe), one that
            cannot be opened, or a larger one.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise error(f"{shown(path)}: is {kind}; give a file")
        if status.st_size > limit:
            raise error(
                f"{shown(path)}: has {status.st_size} bytes, and the limit is {limit}; is it the right file?"
            )
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{shown(path)}: {_reason(problem)}") from problem
    except RadioError:
        raise
    except ValueError as problem:
        raise error(f"{shown(path)}: cannot be a path ({problem})") from problem  # a NUL in it


def decode_text(data: bytes, where: object, *, error: type[RadioError] = DataError) -> str:
    """Decode a text: UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32 with one.

    Raises:
        RadioError: of the type `error`: it is none of these; names the first invalid byte.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as problem:
        raise error(
            f"{shown(where)}: is not UTF-8 text (byte {problem.start}: 0x{data[problem.start]:02x}); "
            f"save it as UTF-8"
        ) from problem


def read_text(path: Path, *, limit: int = MAX_METADATA_BYTES, error: type[RadioError] = DataError) -> str:
    """Read a text file, with or without a byte-order mark.

    Raises:
        RadioError: of the type `error`: as `read_bytes` and `decode_text`.
    """
    return decode_text(read_bytes(path, limit=limit, error=error), path, error=error)


def lines_of(text: str) -> list[str]:
    """Split a text at LF or CRLF only; other line separators, such as U+2028, are content."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def parse_json(
    text: str, where: object, *, error: type[RadioError] = DataError, constants: bool = False
) -> Any:
    """Parse foreign JSON without duplicate keys in its objects; lone surrogates become U+FFFD.

    Args:
        where: names the file, and the place in it, in errors.
        constants: accept NaN, Infinity and -Infinity, which JSON does not have but Python writes.

    Raises:
        RadioError: of the type `error`: not JSON, nested too deeply, with a number of thousands of digits, or
            with a duplicate key in an object, one of which would be silently dropped.
    """
    with contextlib.suppress(ValueError):  # whatever this parser refuses is read again, for Python's words
        quick = pydantic_core.from_json(text, allow_inf_nan=constants)
        if _count_keys(quick) == sum(1 for _ in _KEY.finditer(text)):  # no key is hidden by another
            return quick
    try:
        value = json.loads(
            text,
            parse_constant=None if constants else _refuse_constant,
            object_pairs_hook=_with_unique_keys,
        )
    except json.JSONDecodeError as problem:
        raise error(
            f"{shown(where)}: is not JSON ({problem.msg}: line {problem.lineno} column {problem.colno})"
        ) from problem
    except RecursionError as problem:
        raise error(f"{shown(where)}: is nested too deeply to be read; is it the right file?") from problem
    except ValueError as problem:  # a number with too many digits for Python, a constant, a duplicate key
        raise error(f"{shown(where)}: is not JSON ({str(problem).split(';')[0]})") from problem
    return without_surrogates(value) if _SURROGATE.search(text) else value


def has_surrogates(text: str) -> bool:
    """Check whether a text holds lone surrogates, which UTF-8 cannot encode."""
    return not text.isascii() and re.search("[\ud800-\udfff]", text) is not None


def without_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which UTF-8 cannot encode, by U+FFFD in plain data."""
    if isinstance(value, str):
        return value if value.isascii() else re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value


def validate(
    schema: TypeAdapter[T],
    value: Any,
    where: object,
    *,
    error: type[RadioError] = DataError,
    strict: bool = True,
) -> T:
    """Validate `value` against the schema and return it; values are converted only if `strict` is False.

    Raises:
        RadioError: of the type `error`: it does not fit; names the first place, its value and what was
            expected there.
    """
    try:
        return schema.validate_python(value, strict=strict)
    except ValidationError as problem:
        raise error(f"{shown(where)}: {explain(problem)}") from problem
    except RecursionError as problem:
        raise error(f"{shown(where)}: is nested too deeply to be read; is it the right file?") from problem


def explain(problem: ValidationError) -> str:
    """Describe the first mismatch: `images[3].id: input should be a valid integer, got '7'`."""
    errors = problem.errors(include_url=False, include_context=False)
    first = errors[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    got = "" if first["type"] == "missing" else f", got {brief(first['input'])}"
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{_cut(place, 120) + ': ' if place else ''}{message[:1].lower()}{message[1:]}{got}{rest}"


def read_json(
    path: Path,
    schema: TypeAdapter[T],
    *,
    limit: int = MAX_METADATA_BYTES,
    error: type[RadioError] = DataError,
    strict: bool = True,
) -> T:
    """Read a foreign JSON file as the type that the schema describes; dataclasses need `strict` to be False.

    Raises:
        RadioError: of the type `error`: as `read_text`, `parse_json` and `validate`.
    """
    value = parse_json(read_text(path, limit=limit, error=error), path, error=error)
    return validate(schema, value, path, error=error, strict=strict)


def read_jsonl(
    path: Path, schema: TypeAdapter[T], *, limit: int = MAX_DATA_BYTES, error: type[RadioError] = DataError
) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, record) of a file with one JSON record per line; skip empty lines.

    Raises:
        RadioError: of the type `error`: as `read_json`; names the line.
    """
    for number, line in enumerate(lines_of(read_text(path, limit=limit, error=error)), 1):
        if line.strip():
            where = f"{shown(path)}: line {number}"
            yield number, validate(schema, parse_json(line, where, error=error), where, error=error)


def brief(value: Any) -> str:
    """Describe a value of any size in a few words for a message."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    return _cut(repr(value), 60)


def expand_braces(pattern: str, *, limit: int = MAX_NAMES, error: type[RadioError] = DataError) -> list[str]:
    """Spell out a pattern such as `photos-{000000..000003}.tar`, as bash does.

    Raises:
        RadioError: of the type `error`: braces that do not match, or a pattern of more than `limit` names
            (counted without making them).
    """
    try:
        if len(pattern) > _MAX_PATTERN:
            raise ValueError(f"has {len(pattern)} letters, and the limit is {_MAX_PATTERN}")
        count = _count_names(pattern)
        if count > limit:
            amount = f"{count:,}" if count < 10**24 else f"10^{len(str(count)) - 1} or more"
            raise ValueError(f"stands for {amount} names, and the limit is {limit:,}")
        if count * len(pattern) > MAX_NAMES_LETTERS:  # no name is longer than its pattern
            raise ValueError(
                f"stands for {count:,} names of up to {len(pattern)} letters, and the limit is "
                f"{MAX_NAMES_LETTERS:,} letters together"
            )
        return list(braceexpand.braceexpand(pattern))
    except ValueError as problem:
        raise error(
            f"{shown(_cut(pattern, 200))}: {problem}; wanted a pattern such as photos-{{000000..000003}}.tar"
        ) from problem


def _count_names(pattern: str) -> int:
    """Count the names of a brace pattern, by sums over alternatives and products over groups."""
    around: list[tuple[int, int, int]] = []  # sum, product and start of the enclosing groups
    total, product, at = 0, 1, 0  # of finished alternatives; of the groups in the current one
    while at < len(pattern):
        char = pattern[at]
        if char == "{":
            around.append((total, product, at))
            if len(around) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
            total, product = 0, 1
        elif char == "," and around:
            total, product = total + product, 1
        elif char == "}":
            if not around:
                raise ValueError("unbalanced braces")
            names = total + product
            total, product, start = around.pop()
            product *= _count_range(pattern[start + 1 : at]) or names
        at += 2 if char == "\\" else 1
    if around:
        raise ValueError("unbalanced braces")
    return product


def _count_range(text: str) -> int | None:
    """Count the numbers or letters of a range such as `0..9`, `a..z` or `0..9..3`; None if it is no range."""
    match = _RANGE.fullmatch(text)
    if match is None:
        return None
    low, high, first, last, step = match.groups()
    place = braceexpand.alphabet.index
    distance = int(high) - int(low) if low else place(last) - place(first)
    return abs(distance) // (int(step or 1) or 1) + 1


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if another process holds it or locks are unsupported."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_stray(parent: Path, prefix: str) -> None:
    """Remove incomplete folders of killed processes: those an hour old whose lock no process holds."""
    folders = []
    with contextlib.suppress(OSError):
        folders = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    for folder in folders:
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _STRAY_SECONDS and (lock := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _umask() -> int:
    # The only portable way to read it is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _reason(problem: OSError) -> str:
    if isinstance(problem, FileNotFoundError):
        return "no such file"
    return problem.strerror or str(problem) or type(problem).__name__


_KEY = re.compile(r'"\s*:')  # ends every key; strings may hold it too


def _count_keys(value: Any) -> int:
    """Count the keys of all objects in plain data."""
    count, pending = 0, [value]
    while pending:
        item = pending.pop()
        if type(item) is dict:
            count += len(item)
            item = list(item.values())
        if type(item) is list and not {dict, list}.isdisjoint(map(type, item)):
            pending += [inner for inner in item if type(inner) is dict or type(inner) is list]
    return count


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"it holds {word}, which JSON does not have")


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it holds the key {twice[:80]!r} twice in one object")
    return members


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
