"""Exports of a checkpoint for other libraries, and its classes for transformers' `AutoModel`.

transformers is not imported here: its Auto classes learn of ours when they are imported themselves.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AUTO_CLASSES = {  # modules of transformers, and those of this package with the class to register there
    "transformers.models.auto.configuration_auto": "hf_config",
    "transformers.models.auto.modeling_auto": "hf_model",
}


def register_with_transformers() -> None:
    """Register our classes with the Auto classes: now if they are imported already, else once they are."""
    for module in _AUTO_CLASSES:
        if module in sys.modules:
            _register(module)
    sys.meta_path.insert(0, _AfterImport())


def _register(module: str) -> None:
    importlib.import_module(f".{_AUTO_CLASSES[module]}", __name__).register()


class _AfterImport:
    """An import hook that registers our classes right after one of the Auto classes' modules has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the ordinary spec of those modules, with a loader that also registers; None for others."""
        spec = PathFinder.find_spec(name, path, target) if name in _AUTO_CLASSES else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(name)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
