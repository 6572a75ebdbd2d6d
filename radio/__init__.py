"""am-radio: distil several frozen vision foundation models into one student, and use it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import RadioError
from .export import register_with_transformers

if TYPE_CHECKING:
    from .hub import load_backbone
    from .model import RadioModel
    from .types import Backbone, Features

__all__ = ["Backbone", "Features", "RadioError", "RadioModel", "load_backbone"]
__version__ = "0.1.0"

_HOMES = {"load_backbone": "hub", "RadioModel": "model", "Backbone": "types", "Features": "types"}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that the scenes and their workers need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'radio' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


register_with_transformers()
