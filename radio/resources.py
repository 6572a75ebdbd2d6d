"""The machine: locks on folders, devices and their memory; the versions and the commit that run on it."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import platform
import re
import resource
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Interval
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from .errors import ConfigError, DataError, RadioError, SizeError, shown
from .io import read_json
from .types import Backbone

NAME = ".lock"

_ATTEMPTS = 100  # to open the lock while other processes remove and make the folder
_UNLOCKABLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without locks


class _Holder(TypedDict):
    host: str
    pid: Annotated[int, Interval(ge=1, lt=2**31)]
    since: str


_HOLDER = TypeAdapter(_Holder)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Lock a folder (made if absent) against every other process that locks it with this function.

    The operating system releases the lock when the process ends, however it ends: no lock is ever stale. A
    folder that was made for it and is empty at the end is removed.

    Args:
        folder: the folder to lock.
        doing: what is done in it, for the error message of other processes: `trained`.

    Raises:
        RadioError: another process holds the lock (the message names its host and process id), or something
            other than a file is in the lock's place.
        OSError: the lock cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    handle = _take(path, doing)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is still held
        os.close(handle)
        with suppress(OSError):
            for each in made:
                each.rmdir()


def _take(path: Path, doing: str) -> int:
    while True:
        if _is_foreign(path):
            raise RadioError(f"{shown(path)}: is no regular file, and the lock goes there; move it away")
        handle = _open(path)
        try:
            # lockf's lock belongs to the process, not to the file: children that outlive it do not keep it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = error.errno in (errno.EACCES, errno.EAGAIN)
            if held or error.errno not in _UNLOCKABLE or _may_live(_holder(path)):
                os.close(handle)
                if not held and error.errno not in _UNLOCKABLE:
                    raise
                ended = "" if held else f". Where that one has ended, remove {shown(path)}"
                raise RadioError(_refusal(path, doing) + ended) from error
        if _is(path, handle):
            break
        os.close(handle)  # its previous holder has removed it in the meantime
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(holder).encode())
    except OSError as error:  # a full disk
        with suppress(OSError):
            path.unlink()
        os.close(handle)
        error.filename = str(path)
        raise
    return handle


def _open(path: Path) -> int:
    """Open the lock file; retry while the previous holder removes the file or its folder."""
    for attempt in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except (FileNotFoundError, FileExistsError):
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def _is_foreign(path: Path) -> bool:
    """Check whether a folder, link, pipe or device is in the lock file's place."""
    try:
        return not stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> _Holder | None:
    """Read who holds the folder from the lock file; None if the holder has not written its name yet."""
    try:
        return read_json(path, _HOLDER, limit=4096)
    except DataError:
        return None


def _may_live(holder: _Holder | None) -> bool:
    """Check whether the holder may still run, on a file system without locks (on another host it may)."""
    if holder is None or holder["host"] != socket.gethostname():
        return holder is not None
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return holder["pid"] != os.getpid()


def _refusal(path: Path, doing: str) -> str:
    holder = _holder(path)
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {shown(holder['host'])}, since {shown(holder['since'])}"
    return f"{path.parent}: is being {doing} already, by {who}; wait for it, stop it, or give another --out"


_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # limit of a container or a job


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or each local rank's share of the machine's or container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, _allowed(whole)) // local_ranks()


def collect() -> None:
    """Run the garbage collector; defer an interruption (Ctrl-C) until it is done.

    Python would raise it in the running finalizer, where errors are printed and dropped.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        gc.collect()  # only the main thread receives signals
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        gc.collect()
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _allowed(whole: int) -> int:
    try:
        text = _CONTROL_GROUP.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return whole
    return int(text) if text.isdecimal() else whole


def local_ranks() -> int:
    """Return the number of ranks on this machine, as torchrun tells."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(text), 1) if text.isdecimal() else 1


_LEAST_PATCH = 8  # pixels, for a backbone that accepts any size


def check_memory(
    model: Backbone, batch: int, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    """Check that the images of a batch and their tokens fit into memory; activations are not counted.

    Raises:
        SizeError: they do not; the message has the sizes.
    """
    height, width = size
    patch = max(model.patch_size, _LEAST_PATCH)
    rows, columns = max(height // patch, 1), max(width // patch, 1)
    need = batch * dtype.itemsize * (3 * height * width + rows * columns * model.token_dim)
    there = memory_of(device)
    if need > there:
        raise SizeError(
            f"{batch} images of {height}x{width} px and their tokens take {need / 1e9:,.1f} GB, and {device} "
            f"has {there / 1e9:,.1f}; make the images or the batch smaller"
        )


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
