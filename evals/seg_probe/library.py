"""The only place that imports MMSegmentation: on demand, without its warnings and output."""

from __future__ import annotations

import contextlib
import io
import warnings
from types import ModuleType

from radio.errors import MissingExtraError, require


def load_plugin() -> ModuleType:
    """Import the module `plugin`, which registers our parts in MMSegmentation.

    Raises:
        MissingExtraError: the extra `seg` is not installed, or a system library that OpenCV needs.
    """
    # The import warns of compiled operators that are not used here, and prints 'Could not import OneDL'.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        _require_opencv()
        for module in ("mmengine", "mmcv", "mmseg"):
            require(module, extra="seg")
        from . import plugin
    return plugin


def _require_opencv() -> None:
    try:
        require("cv2", extra="seg")
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # a shared library that the wheel does not contain
        name = str(error).split(":")[0]
        package = "libgl1" if "libGL" in name else "libglib2.0-0"
        raise MissingExtraError(
            f"OpenCV cannot be loaded, {error}; on Debian and Ubuntu install {package}: "
            f"apt-get install {package}"
        ) from error
