"""Recipes: functions that return the settings of one run. The command line names one of them."""

from __future__ import annotations

from collections.abc import Callable

from radio.registry import Registry

from ..config import TrainConfig

recipes: Registry[Callable[[], TrainConfig]] = Registry("recipe")

from . import paper as _paper  # noqa: E402, F401  (each enters its recipes)
from . import photos as _photos  # noqa: E402, F401
from . import scenes as _scenes  # noqa: E402, F401
from . import table3 as _table3  # noqa: E402, F401
from . import table6 as _table6  # noqa: E402, F401
