"""Errors that a user can act on, and the import of optional libraries."""

from __future__ import annotations

import difflib
import errno
import importlib
import re
from collections.abc import Iterable
from types import ModuleType

_NO_MEMORY = re.compile("can't allocate memory|out of memory|Unable to allocate")  # torch's, CUDA's, NumPy's
_MAX_LINE = 2000  # letters of an error on the terminal
_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a place that you may read and write",
    errno.EPERM: "choose a place that you may read and write",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "one part of the path is a file; choose another path",
    errno.ELOOP: "it is a link in a circle; choose another path",
    errno.EISDIR: "it is a folder; choose another name",
    errno.EEXIST: "something of that name stands there; choose another name",
    errno.EMFILE: "too many files are open; raise ulimit -n, or take fewer --workers",
}


class RadioError(ValueError):
    """An error that states the input, what was expected and what to do; the command line exits with 2."""


class ConfigError(RadioError):
    """A setting that does not exist or cannot be read."""


class CheckpointError(RadioError):
    """A checkpoint or weights file that is absent, altered, truncated or foreign."""


class DataError(RadioError):
    """A data set that is absent, empty, or not in the requested layout."""


class MissingDataError(DataError):
    """A file or folder of a data set that is not there."""


class SizeError(RadioError):
    """An image, grid or window size that does not fit."""


class MissingExtraError(RadioError):
    """An optional library that is not installed."""


class MissingWeightsError(RadioError):
    """Weights whose pip package is not installed."""


class ShadowedPackageError(RadioError):
    """Another `train` or `evals` precedes this package's on the import path."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Build a hint such as '; did you mean vit-b16?' from the names nearest to `word`, or ''."""
    if len(word) > 200:  # comparing takes long, and no name has so many letters
        return ""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: object) -> str:
    """Escape control characters and lone surrogates of a path or word, so that it prints on one line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value)
    )


def one_line(error: BaseException) -> str | None:
    """Describe an error that a user can act on in one line; None for bugs, which keep their traceback."""
    if isinstance(error, RadioError):
        return _cut(shown(" ".join(str(error).split())))
    if isinstance(error, OSError):
        return _cut(shown(_of_the_system(error)))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        words = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        much = f" ({words[0].lower()})" if words else ""
        return f"not enough memory{much}; take less at once, or a smaller model"
    library = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and library not in ("", "radio", "evals", "train"):
        return f"the library {library} is not installed; get am-radio with all it needs: pip install -e ."
    return None


def _cut(line: str) -> str:
    """Cut the middle out of a line that is too long: content quoted from files may be megabytes."""
    half = _MAX_LINE // 2
    return line if len(line) <= _MAX_LINE else f"{line[:half]} … {line[-half:]}"


def _of_the_system(error: OSError) -> str:
    """Describe an error of the operating system, the file first: `report.html: No space left on device`."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename2 or error.filename,) if name is not None]
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{': '.join([*names, reason])}{f'; {remedy}' if remedy else ''}"


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module and return it.

    Raises:
        MissingExtraError: the module is not installed; names the extra that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'{module} is not installed; get it with: pip install "am-radio[{extra}]"'
        ) from error
