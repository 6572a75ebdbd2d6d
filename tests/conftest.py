"""One thread for each worker, caches in a temporary folder, and no network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

# Read when the libraries are imported, hence before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Take what the libraries made while they were imported out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that no other test has filled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
