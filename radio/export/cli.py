"""`radio-export`: convert a checkpoint for another library, and compare the result with it.

radio-export runs/demo/ckpt.pt --to onnx student.onnx

Usage and errors about options come without torch, whose import takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from ..config import check, parse_options
from ..errors import ConfigError, shown
from ..io import check_file, check_writable

Target = Literal["hf", "onnx", "timm", "pt2"]

_SUFFIXES: dict[Target, str] = {"onnx": ".onnx", "timm": ".safetensors", "pt2": ".pt2"}  # hf: a folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Convert a checkpoint for another library, read the result back, and compare it with the checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint file of radio-train."""
    out: tyro.conf.Positional[Path]
    """What to write: a folder for hf, else a file that ends in .onnx, .safetensors (timm) or .pt2."""
    to: Target
    """hf (transformers.AutoModel), onnx, timm (weights for timm.create_model) or pt2 (torch.export)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `radio-export`; return its exit code: 0 written, 1 another result than the checkpoint's.

    Raises:
        RadioError: anything that the user can correct (the console script prints it and exits with 2).
    """
    arguments = check(parse_options(Arguments, sys.argv[1:] if argv is None else argv, prog="radio-export"))
    _check_out(arguments.out, arguments.to)
    from .command import export

    return export(arguments.checkpoint, arguments.to, arguments.out, Console(highlight=False))


def _check_out(out: Path, to: Target) -> None:
    """Check that `out` can be written, has the target's suffix, and does not exist.

    Raises:
        ConfigError: one of these does not hold.
    """
    suffix = _SUFFIXES.get(to)
    if out.is_symlink() or out.exists():
        raise ConfigError(f"OUT {shown(out)}: exists already; choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"OUT {shown(out)}: its folder does not exist; make it, or choose another")
    if suffix is None:
        check_writable(out, "OUT", utf8=True)
    elif out.suffix != suffix:
        raise ConfigError(f"OUT {shown(out)}: a file for {to} ends in {suffix}; name it so")
    else:
        check_file(out, "OUT")
