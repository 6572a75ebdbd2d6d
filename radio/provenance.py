"""Provenance of results: package versions, our own commit, the device."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .errors import ConfigError

_PACKAGES = (
    *("am-radio", "torch", "torchvision", "timm", "numpy", "pillow", "faiss-cpu", "faiss-gpu"),
    *("open_clip_torch", "segment-anything", "pycocotools", "transformers", "accelerate", "tokenizers"),
    *("onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv", "opencv-python"),
)


@lru_cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect results."""
    packages = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return packages


@lru_cache
def commit() -> str | None:
    """Return the git commit of our source tree, `-dirty` if uncommitted changes exist; None without git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed wheel may lie inside somebody else's checkout
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    return f"{head}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else head


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names; each rank of a node gets its own GPU.

    Raises:
        ConfigError: the device does not exist. A requested GPU is never replaced by the CPU.
    """
    available = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not available):
        return torch.device("cpu")
    if name not in ("auto", "cuda") and not re.fullmatch(r"cuda:\d{1,4}", name):
        raise ConfigError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    if not available:
        raise ConfigError(f"device {name} was asked for, and torch sees no GPU; use --device cpu")
    count = torch.cuda.device_count()
    index = int(name.partition(":")[2]) if ":" in name else _own_gpu(count)
    if index >= count > 0:
        raise ConfigError(f"GPU {index} was asked for, and {count} are visible, from 0 on; name one of them")
    return torch.device(f"cuda:{index}")


def _own_gpu(count: int) -> int:
    """Return the GPU index of this rank: 0 when only one is visible, else LOCAL_RANK."""
    local = os.environ.get("LOCAL_RANK", "0")
    if not local.isdecimal():
        raise ConfigError(
            f"LOCAL_RANK is {local!r}; wanted this rank's number on its machine, as torchrun sets"
        )
    return 0 if count == 1 else int(local)


def has_tf32(device: torch.device) -> bool:
    """Check whether float32 products use TF32: on a GPU that supports it, unless NVIDIA_TF32_OVERRIDE=0."""
    if device.type != "cuda" or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices use TF32 on a GPU, as its convolutions do anyway."""
    if not has_tf32(device):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def describe_device(device: torch.device) -> str:
    """Return the device's name for a report, with the number of threads for the CPU."""
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"cpu {platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: on the GPU if it is the device, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts in KiB


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
