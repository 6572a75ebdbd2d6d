"""Other packages' code: check their encoders' outputs, and name the package in their errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, one_line, shown
from .registry import Plugin, plugin_of, words_of
from .types import Features

# Letters: B batch, C summary width, T tokens, D token width, H W grid, h w pixels.

_OWN = ("radio", "evals", "train")
_PARTS = ("name", "fingerprint", "native_size", "summary_dim", "token_dim", "nearest_size")  # of any encoder


def blame(error: BaseException) -> str | None:
    """Describe in one line which package's code raised an error, and where; None for this package's own.

    Also None for errors that are reported in one line anyway: a RadioError, an error of the operating system,
    out of memory.
    """
    if not isinstance(error, ImportError) and one_line(error) is not None:
        return None
    plugin: Plugin | None = None
    called: FrameType | None = None
    done = place = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] in _OWN:
            called = None
        elif found := plugin_of(module, frame.f_locals.get("self")):
            path = Path(frame.f_code.co_filename)
            depth = 1 + module.count(".") + (path.name == "__init__.py")
            place = f"{Path(*path.parts[-depth:])}:{trace.tb_lineno}"
            if called is None:  # the function that we called; frames below are internal to the package
                called, plugin, done = frame, found, f"{frame.f_code.co_name}{_size(frame)}"
        trace = trace.tb_next
    if plugin is None:
        return None
    return (
        f"{plugin} failed in {done} ({shown(place)}): {words_of(error)}; mend or uninstall {plugin.package}"
    )


def _size(frame: FrameType) -> str:
    """Format the size of the images passed to a function: ` at size 224x224`; empty without images."""
    code = frame.f_code
    given = (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount])
    images = next((value for value in given if isinstance(value, Tensor) and value.ndim == 4), None)
    return "" if images is None else f" at size {images.shape[2]}x{images.shape[3]}"


def check_encoder(what: str, encoder: object, *, kind: str, part: str) -> None:
    """Check that an object is a torch module with every part of an encoder, and valid widths and sizes.

    What only some encoders have is filled in as empty where it is missing.

    Args:
        kind: the class in `radio.types` that it implements: Student or Teacher.
        part: what that class has beside the parts of every encoder.

    Raises:
        ConfigError: it is not; names what is missing or invalid.
    """
    if not isinstance(encoder, nn.Module):
        raise ConfigError(f"{what} is not a torch module; make its factory return one")
    # The class first: isinstance would compute every property, and a fingerprint hashes all weights.
    lacking = [n for n in (*_PARTS, part) if not hasattr(type(encoder), n) and not hasattr(encoder, n)]
    if lacking:
        raise ConfigError(f"{what} has no {', no '.join(lacking)}; make it a whole radio.types.{kind}")
    made: Any = encoder
    for dim in ("summary_dim", "token_dim"):
        if not _is_count(width := getattr(encoder, dim)):
            raise ConfigError(f"{what}: its {dim} is {width!r:.80}; wanted a whole number above 0")
    size = made.native_size
    if not _is_size(size):
        raise ConfigError(f"{what}: its native_size is {size!r:.80}; wanted (height, width) in pixels")
    for size_in in ((1, 1), size):
        size_out = made.nearest_size(*size_in)
        if not _is_size(size_out):
            raise ConfigError(
                f"{what}: its nearest_size{size_in} is {size_out!r:.80}; wanted the nearest "
                f"(height, width) in pixels"
            )
        if (again := made.nearest_size(*size_out)) != size_out:
            raise ConfigError(
                f"{what}: its nearest_size{size_in} is {size_out}, and nearest_size{size_out} is "
                f"{again!r:.80}; a size that it takes is the nearest to itself"
            )
    _fill_in(what, made)


def _fill_in(what: str, encoder: Any) -> None:
    """Set the attributes that an encoder need not have to what their absence means."""
    if getattr(encoder, "with_window", None) and not (
        hasattr(encoder, "window") and hasattr(encoder, "patch_size")
    ):
        raise ConfigError(
            f"{what} has with_window; give it the attributes window (the side in tokens, or None) and "
            f"patch_size (in pixels) too"
        )
    defaults = {"patch_size": encoder.nearest_size(1, 1)[0], "metadata": {}, "adaptors": {}}
    none = ("with_window", "window", "intermediate", "text", "weights_file", "sam")
    defaults |= {**dict.fromkeys(none), "fixed_size": False, "num_blocks": 0, "summary_tokens": 0}
    for part, default in defaults.items():
        if not hasattr(type(encoder), part) and not hasattr(encoder, part):
            setattr(encoder, part, default)
    if not _is_count(encoder.patch_size):
        raise ConfigError(
            f"{what}: its patch_size is {encoder.patch_size!r:.80}; wanted a whole number above 0"
        )


def watch_features(what: str, encoder: nn.Module) -> None:
    """Register a hook that checks the features of every forward of an encoder; it raises ConfigError."""
    encoder.register_forward_hook(partial(_check_features, what))


def _check_features(what: str, encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    images: Tensor = args[0]
    batch, _, height, width = images.shape
    if wrong := _wrong(encoder, batch, images.device, output):
        raise ConfigError(f"{what}: its forward at size {height}x{width} gave {wrong}")


def _wrong(encoder: Any, batch: int, device: torch.device, output: Any) -> str:
    """Describe what is wrong with features and what was expected; empty if they are valid."""
    if not isinstance(output, Features):
        return f"a {type(output).__name__}, wanted radio.types.Features"
    grid = output.grid
    if not _is_size(grid):
        return f"the grid {grid!r:.80}, wanted (height, width) in tokens"
    expected = {
        "summary": (batch, encoder.summary_dim),
        "tokens": (batch, grid[0] * grid[1], encoder.token_dim),
    }
    for part, shape in expected.items():
        tensor = getattr(output, part)
        if not isinstance(tensor, Tensor):
            return f"{part} that are a {type(tensor).__name__}, wanted a tensor"
        if tensor.shape != shape:
            return f"{part} of {list(tensor.shape)}, wanted {list(shape)} (the grid is {grid[0]}x{grid[1]})"
        dtypes = _dtypes(encoder, device)
        if tensor.dtype not in dtypes or tensor.device != device:
            words = " or ".join(str(dtype) for dtype in dtypes)
            return f"{part} in {tensor.dtype} on {tensor.device}, wanted {words} on {device}"
    return ""


def _dtypes(encoder: nn.Module, device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes that features may have: the weights', and under autocast its dtype too."""
    floats = (weight.dtype for weight in encoder.parameters() if weight.is_floating_point())
    dtype = next(floats, torch.float32)
    if torch.is_autocast_enabled(device.type):
        return dtype, torch.get_autocast_dtype(device.type)
    return (dtype,)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value))
