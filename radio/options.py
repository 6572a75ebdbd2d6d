"""Parse command lines into settings; values that the settings refuse raise the same error as elsewhere."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import tyro

from .errors import ConfigError

T = TypeVar("T")


def parse_options(kind: type[T], arguments: Sequence[str], **how: Any) -> T:
    """Parse a command line into settings of type `kind`; `how` holds arguments of tyro.cli.

    Raises:
        ConfigError: the settings refuse a value. tyro reports unknown options itself, and exits with 2.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro draws a box before it exits
            return cast(T, tyro.cli(kind, args=list(arguments), console_outputs=False, **how))
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, ConfigError):
            error = error.__context__
        if error is not None:
            raise error from None
    return cast(T, tyro.cli(kind, args=list(arguments), **how))  # again, with tyro's own output
