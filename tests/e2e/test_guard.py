"""The installed commands, in a folder that holds a train.py and an evals of its own."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A folder whose `train` and `evals` say so when they are imported."""
    (tmp_path / "train.py").write_text("print('decoy')\n")
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "__init__.py").write_text("print('decoy')\n")
    return tmp_path


def _help(command: str, folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [SCRIPTS / command, "--help"],
        cwd=folder,
        env=inherited | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", ["radio-train", "radio-eval"])
def test_a_decoy_on_the_path_gives_the_guards_error(command: str, decoys: Path) -> None:
    done = _help(command, decoys, PYTHONPATH=".")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert f"{decoys / 'evals'} comes before" in done.stderr


@pytest.mark.parametrize("command", ["radio-train", "radio-eval"])
def test_beside_a_decoy_that_is_not_on_the_path_it_works(command: str, decoys: Path) -> None:
    done = _help(command, decoys)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert "decoy" not in done.stdout
