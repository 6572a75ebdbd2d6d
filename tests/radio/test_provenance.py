from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from radio import resources
from radio.errors import ConfigError
from radio.resources import choose_device, commit, describe_device, versions


def test_versions_name_what_runs() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["python"].startswith("3.")


def test_the_commit_is_gits_and_marked_when_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    (tmp_path / "radio").mkdir()
    file = tmp_path / "radio" / "__init__.py"
    file.write_text("")
    monkeypatch.setattr(resources, "__file__", str(file))
    commit.cache_clear()
    assert commit() is None  # no checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    commit.cache_clear()
    assert commit() == git("rev-parse", "HEAD")
    file.write_text("changed")
    commit.cache_clear()
    assert commit() == git("rev-parse", "HEAD") + "-dirty"
    commit.cache_clear()


def test_a_gpu_that_was_asked_for_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            choose_device(name)
    with pytest.raises(ConfigError, match="unknown device 'gpu'"):
        choose_device("gpu")
    assert describe_device(torch.device("cpu")).startswith("cpu ")


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # every rank is shown a GPU of its own
    assert choose_device("cuda") == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_rank_that_sees_one_gpu_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, said in (("auto", "GPU 3 was asked for, and 2 are visible"), ("cuda:2", "GPU 2 was")):
        with pytest.raises(ConfigError, match=said):
            choose_device(name)
    for name in ("cuda:x", "cuda:-1", "cuda:", "cuda:99999999999999999999"):
        with pytest.raises(ConfigError, match="unknown device"):
            choose_device(name)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 'first'"):
        choose_device("auto")
