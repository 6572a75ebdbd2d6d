"""am-radio: several frozen vision foundation models distilled into one student, and the student put to use."""

from __future__ import annotations

from .errors import RadioError
from .hub import load_backbone
from .model import RadioModel
from .types import Backbone, Features

__all__ = ["Backbone", "Features", "RadioError", "RadioModel", "load_backbone"]
__version__ = "0.1.0"
