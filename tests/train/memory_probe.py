"""Run as a script: the run in a config.yaml; prints the bytes that the process grew by at most."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from radio.config import read_yaml
from radio.dist import Ranks
from tests.train.tiny_teachers import register
from train.config import TrainConfig
from train.trainer import Trainer


def status(key: str) -> int:
    """Bytes of a line of this process's status, such as VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def wake(like: Tensor) -> None:
    """Let torch load what it needs for any step at all."""
    F.conv2d(F.gelu(F.linear(like, like[0, 0])), like).sum().backward()


def main() -> None:
    """The peak of the resident set beyond what it was before the run was built."""
    register()
    torch.set_num_threads(1)
    wake(torch.ones(1, 1, 8, 8, requires_grad=True))
    before = status("VmRSS")
    run = Trainer(
        read_yaml(TrainConfig, Path(sys.argv[1])), Ranks(), torch.device("cpu"), Console(file=io.StringIO())
    )
    run.save = lambda: None  # type: ignore[method-assign]  # copies of the weights, which are no part of a step
    run.train()
    sys.stdout.write(f"{status('VmHWM') - before}\n")


if __name__ == "__main__":
    main()
