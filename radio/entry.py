"""Entry points of the console scripts: run the guard, then the command line by its module's name.

`train` and `evals` are common names of other folders too. A file train.py earlier on the import path would
silently replace the trainer, so both are first located without importing them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, entry_points
from pathlib import Path

from .errors import ConfigError, ShadowedPackageError, one_line

OK, USAGE, INTERRUPTED = 0, 2, 130
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_MALLOC = {-3: 1 << 30, -1: 1 << 30, -2: 64 << 20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD in bytes
_GUARDED = ("evals", "train")
_MALFORMED = (TypeError, ValueError, AttributeError, LookupError)  # raised by importlib.metadata on bad files


def train(argv: Sequence[str] | None = None) -> int:
    """Run `radio-train` and return its exit code.

    0 fine, 1 a row of a table failed, 2 usage, 85 stopped and to be started again, 130 interrupted.

    Args:
        argv: the arguments after the command's name (default: the process's).
    """
    return _run("train.cli", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """Run `radio-eval` and return its exit code: 0 fine, 1 regression or failure, 2 usage, 130 interrupted.

    Args:
        argv: the arguments after the command's name (default: the process's).
    """
    return _run("evals.cli", argv)


def export(argv: Sequence[str] | None = None) -> int:
    """Run `radio-export` and return its exit code: 0 fine, 1 failure, 2 usage, 130 interrupted.

    Args:
        argv: the arguments after the command's name (default: the process's).
    """
    return _run("radio.export.cli", argv)


def check_not_shadowed(names: Sequence[str] = _GUARDED) -> None:
    """Check that each of the packages `names` is the one beside `radio`.

    Raises:
        ShadowedPackageError: another package of that name precedes it on the import path, or none exists.
    """
    root = Path(__file__).resolve().parent.parent
    for name in names:
        expected = root / name
        actual = _location(name)
        if actual is None:
            raise ShadowedPackageError(
                f"the package {name!r} is not installed; it belongs at {expected}: install am-radio again"
            )
        if actual != expected:
            raise ShadowedPackageError(
                f"{actual} comes before {expected} on the import path and hides the package {name!r}; "
                f"rename it, start the command in another folder, or take its folder out of PYTHONPATH"
            )


def check_entry_points() -> None:
    """Check that the entry points of all installed packages can be read, as torch, Triton and pydantic do.

    Raises:
        ConfigError: one cannot be read; names the package and its file.
    """
    try:
        entry_points(group="am_radio")
    except _MALFORMED:
        for package in distributions():
            try:
                _ = package.entry_points
            except _MALFORMED as error:
                name = package.metadata["Name"] or "a package"
                raise ConfigError(
                    f"{package.locate_file('')}: the entry_points.txt of {name} cannot be read "
                    f"({type(error).__name__}); install {name} again, or uninstall it"
                ) from error
        raise


def _location(name: str) -> Path | None:
    """Locate the resolved folder of the package, or file of the module, that `import name` would load."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin or name).resolve()


def end_with_torchrun() -> None:
    """Have the kernel kill this rank when the torchrun that started it is killed without stopping its ranks.

    Otherwise they would train on beside those of a restarted run.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning every large block to the kernel.

    A CPU forward frees its activations in every layer; the kernel would map and clear them anew, which takes
    half of a CNN's time. Settings of the user's own (MALLOC_..., GLIBC_TUNABLES) stay.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def print_anything() -> None:
    """Print characters that the output's encoding lacks as escapes instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _run(module: str, argv: Sequence[str] | None) -> int:
    end_with_torchrun()  # before the imports, which take seconds
    keep_freed_memory()
    print_anything()
    try:
        check_not_shadowed()
        check_entry_points()
        # By name, since the layering forbids imports of train and evals in radio.
        code: int = importlib.import_module(module).main(argv)
    except Exception as error:
        line = one_line(error)
        if line is None or isinstance(error, ImportError):
            from .foreign import blame  # imported late: it imports torch

            line = blame(error) or line
        if line is None:
            raise
        with contextlib.suppress(OSError):  # the reader of stderr may be gone
            sys.stderr.write(f"error: {line}\n")
        return USAGE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is done is kept: the same command goes on from there\n")
        return INTERRUPTED
    return code
