"""On a machine of eight GPUs, what is drawn on the CPU seeds none, and a training touches its own alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from radio.model import ModelConfig, build

CPU, OWN = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The GPUs whose generators were read, set or seeded."""
    touched: list[Any] = []

    def read(device: Any = "current") -> Tensor:
        touched.append(device)
        return torch.zeros(16, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", read)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="current": touched.append(device))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: touched.append("all"))
    return touched


def test_a_tiny_language_model(touched: list[Any]) -> None:
    pytest.importorskip("transformers")
    from evals.vqa.language import TinyShape, load_library, make_tiny

    load_library()

    make_tiny(["what colour is it red"], TinyShape(width=32, heads=2, feed_forward=64), 0).load()
    assert touched == []


def test_an_untrained_drop_in(touched: list[Any]) -> None:
    pytest.importorskip("segment_anything")
    from evals.sam_dropin.encoder import _untrained

    _untrained(build(ModelConfig(student="vit-tiny12"), 0), None, 96, 0)
    assert touched == []


def test_a_scenes_teacher(touched: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("segment_anything")
    from tools.scene_teachers import train as scene_teachers

    def stop(*_: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(scene_teachers, "_train", stop)
    with pytest.raises(InterruptedError):
        scene_teachers.train_teachers(scene_teachers.TeachersConfig(out=tmp_path), Console(quiet=True))
    assert touched == []


@pytest.mark.parametrize(("device", "wanted"), [(CPU, set()), (OWN, {OWN})])
def test_llavas_training(touched: list[Any], device: torch.device, wanted: set[Any]) -> None:
    pytest.importorskip("transformers")
    from evals.vqa.language import load_library

    load_library()
    from evals.vqa.stage_trainer import _own_randomness

    with _own_randomness(device):
        assert set(touched) == wanted
    assert set(touched) == wanted


@pytest.mark.parametrize(("device", "wanted"), [(CPU, set()), (OWN, {OWN})])
def test_the_probes_training(touched: list[Any], device: torch.device, wanted: set[Any]) -> None:
    pytest.importorskip("mmseg")
    from evals.seg_probe.evaluator import load_plugin

    load_plugin()
    from evals.seg_probe.training import _own_randomness

    with _own_randomness(device):
        assert set(touched) == wanted
    assert set(touched) == wanted
