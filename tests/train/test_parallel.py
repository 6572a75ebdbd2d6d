"""Two ranks under torchrun learn what one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evals.core.dist import Group
from radio import checkpoint
from radio.config import write_yaml
from train.config import TrainConfig
from train.parallel import join

from .conftest import CPU, Start, fill_folder, read_records

ROOT = Path(__file__).resolve().parents[2]


def torchrun(settings: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`radio-train SETTINGS` on two ranks of this machine."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("tiny_teachers.py"))
    words += [script, str(settings), *options]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_two_ranks_give_the_losses_of_one(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 16, broken=2)
    shared = replace(config, data=replace(config.data, images=(folder,)), steps=6, log_every=2, save_every=3)
    start(shared, out=tmp_path / "one").train()
    write_yaml(replace(shared, out=tmp_path / "two"), tmp_path / "settings.yaml")
    done = torchrun(tmp_path / "settings.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: ") == 1  # one rank speaks
    one, two = read_records(tmp_path / "one"), read_records(tmp_path / "two")
    assert len(one) == len(two) == 3
    for alone, shared_record in zip(one, two, strict=True):
        for name, value in alone.items():
            if name == "loss" or name.endswith(("/summary", "/spatial")):
                assert shared_record[name] == pytest.approx(value, abs=1e-5), name
        assert shared_record["broken"] == alone["broken"] > 0
        assert shared_record["samples"] == alone["samples"]
    weights = [checkpoint.load(tmp_path / out / "ckpt.pt").tensors for out in ("one", "two")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name


@pytest.mark.slow
def test_two_ranks_share_a_cache_and_resume(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    cached = replace(config, cache=replace(config.cache, folder=tmp_path / "caches"), student="vitdet-tiny12")
    cached = replace(cached, resolution=96, windows=(2, 4), summary="mean", steps=6, save_every=3)
    start(cached, out=tmp_path / "one").train()
    write_yaml(replace(cached, out=tmp_path / "two"), tmp_path / "settings.yaml")
    done = torchrun(tmp_path / "settings.yaml")
    assert done.returncode == 0, done.stderr
    again = torchrun(tmp_path / "settings.yaml")
    assert again.returncode == 0, again.stderr
    losses = [[record["loss"] for record in read_records(tmp_path / out)] for out in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_process_alone_is_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(CPU) as group:
        assert group == Group(0, 1)
        assert group.leads
    assert not torch.distributed.is_initialized()
