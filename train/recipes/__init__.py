"""Recipes: functions that return the settings of one run. A name on the command line is a function here."""

from __future__ import annotations

from collections.abc import Callable

from radio.registry import Registry

from ..config import TrainConfig

recipes: Registry[Callable[[], TrainConfig]] = Registry("recipe")

from . import paper as _paper, photos as _photos, scenes as _scenes  # noqa: E402, F401  (enter their recipes)
