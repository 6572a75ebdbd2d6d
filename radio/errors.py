"""Errors that a user can act on, and the one way optional libraries are imported."""

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
    """What came, what was wanted, what to do. The command line prints it and exits with 2."""


class ConfigError(RadioError):
    """A setting that does not exist or cannot be read."""


class CheckpointError(RadioError):
    """A checkpoint or weights file that is absent, altered, truncated or foreign."""


class DataError(RadioError):
    """A data set that is absent, empty, or not in the layout asked for."""


class SizeError(RadioError):
    """An image, grid or window size that does not fit."""


class MissingExtraError(RadioError):
    """An optional library that is not installed."""


class MissingWeightsError(RadioError):
    """Weights that come as a pip package that is not installed."""


class ShadowedPackageError(RadioError):
    """Another `train` or `evals` stands on the import path before ours."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as '; did you mean vit-b16?' for the names nearest to `word`, else ''."""
    if len(word) > 200:  # comparing takes long, and no name has so many letters
        return ""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: object) -> str:
    """A path or word from outside as one printable line: control characters and half surrogates escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value)
    )


def one_line(error: BaseException) -> str | None:
    """Say an error that a user can act on in one line; None for our own slips, which keep their traceback."""
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
    """Leave the middle out of a line that nobody would read: what foreign files hold may be megabytes."""
    half = _MAX_LINE // 2
    return line if len(line) <= _MAX_LINE else f"{line[:half]} … {line[-half:]}"


def _of_the_system(error: OSError) -> str:
    """Say what the system refused, the file first: `report.html: No space left on device`."""
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename2 or error.filename,) if name is not None]
    remedy = _REMEDIES.get(error.errno or 0, "")
    return f"{': '.join([*names, reason])}{f'; {remedy}' if remedy else ''}"


def require(module: str, *, extra: str) -> ModuleType:
    """The imported optional module.

    Raises:
        MissingExtraError: the module is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'{module} is not installed; get it with: pip install "am-radio[{extra}]"'
        ) from error
