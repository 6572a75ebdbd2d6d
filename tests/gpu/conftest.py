"""Tests marked `gpu` are skipped, by the name of what is absent: a GPU, or a library."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NEEDED = (
    *("pydantic", "annotated_types", "typing_extensions", "yaml", "braceexpand", "safetensors"),
    *("numpy", "PIL", "timm", "torchvision", "rich"),
)
"""What the trainer and the evaluators cannot be imported without."""


class Module(pytest.Module):
    """A module of tests that is skipped whole where a library is missing."""

    def collect(self) -> Iterator[pytest.Item | pytest.Collector]:
        """Collect the tests, if what they import is there."""
        for name in NEEDED:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed", allow_module_level=True)
        yield from super().collect()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    """Collect each module of this folder as one that may be skipped."""
    module: Module = Module.from_parent(parent, path=module_path)
    return module


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where torch sees none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The last GPU, so that what goes to the first by mistake is seen; float32 is float32 on it."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield device
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.cuda.empty_cache()
