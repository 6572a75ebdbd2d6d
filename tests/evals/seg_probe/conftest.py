"""The backbone of the tests, and our parts in MMSegmentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def backbone(patches: Callable[..., Any]) -> Callable[..., Any]:
    """Makes backbones."""
    return patches


@pytest.fixture(scope="session")
def plugin() -> Any:
    """Our parts in MMSegmentation, imported as the evaluator imports them."""
    from evals.seg_probe.evaluator import load_plugin

    return load_plugin()
