"""Errors that a user can act on, and the one way optional libraries are imported."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


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
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def shown(value: object) -> str:
    """A path or word from outside as one printable line: control characters and half surrogates escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in str(value)
    )


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
