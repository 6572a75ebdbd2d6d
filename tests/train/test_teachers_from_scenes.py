"""How the scenes teachers are made: the same twice, and the shipped files reach what their metadata say."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from radio.checkpoint import load
from radio.errors import CheckpointError, ConfigError
from radio.teachers.scenes import NAMES, scenes_sam, scenes_teacher, weights_file
from train.scenes_scores import FULL, QUICK, Protocol, box_miou, score
from train.teachers_from_scenes import Course, TeachersConfig, main

_TINY = Course(samples=16, batch=8, lr=1e-3)
_GLIMPSE = Protocol(bank=60, queries=10, sam_scenes=2)


def _settings(out, *only):
    return TeachersConfig(out=out, only=only or NAMES, dense=_TINY, clip=_TINY, sam=_TINY)


@pytest.fixture
def glimpse(monkeypatch):
    """Scores on a few scenes, so that a whole run takes a second."""
    monkeypatch.setattr("train.teachers_from_scenes.FULL", _GLIMPSE)
    monkeypatch.setattr("train.teachers_from_scenes.QUICK", _GLIMPSE)


@pytest.mark.usefixtures("glimpse")
def test_the_same_settings_give_the_same_weights_and_leave_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    quiet = Console(file=io.StringIO())
    first = [load(path) for path in main(_settings(tmp_path / "a"), quiet)]
    second = [load(path) for path in main(_settings(tmp_path / "b"), quiet)]
    for one, other in zip(first, second, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
        assert one.metadata["samples"] == 16
        assert one.metadata["scores"] == other.metadata["scores"]
    assert torch.equal(torch.get_rng_state(), state)
    assert "scenes:sam" in quiet.file.getvalue()


@pytest.mark.usefixtures("glimpse")
def test_what_is_written_is_what_was_scored(tmp_path):
    main(_settings(tmp_path, "dense"), Console(file=io.StringIO()))
    metadata = load(weights_file("dense", tmp_path)).metadata
    assert score(scenes_teacher("dense", tmp_path), _GLIMPSE)["knn"] == pytest.approx(
        metadata["scores"]["full"]["knn"], abs=0.01
    )


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean dense"):
        main(TeachersConfig(out=tmp_path, only=("dens",)))
    with pytest.raises(ConfigError, match="less than one batch of 8"):
        main(TeachersConfig(out=tmp_path, only=("dense",), dense=Course(samples=7, batch=8, lr=1e-3)))
    with pytest.raises(ConfigError, match=r"--dense\.batch: 0 is out of bounds"):
        main(TeachersConfig(out=tmp_path, only=("dense",), dense=Course(samples=7, batch=0, lr=1e-3)))
    with pytest.raises(ConfigError, match="--threads: 0 is out of bounds"):
        main(TeachersConfig(out=tmp_path, threads=0))
    with pytest.raises(CheckpointError, match=r"scenes_dense\.safetensors: no such checkpoint"):
        main(_settings(tmp_path, "clip"))


def _measured(name, protocol):
    return (
        box_miou(scenes_sam(), protocol.sam_scenes)
        if name == "sam"
        else score(scenes_teacher(name), protocol)
    )


# Half a point: other processors round otherwise, and a score is a count of some hundred scenes.
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_reach_the_quick_scores_of_their_cards(name):
    assert _measured(name, QUICK) == pytest.approx(
        load(weights_file(name)).metadata["scores"]["quick"], abs=0.51
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_reach_the_full_scores_of_their_cards(name):
    assert _measured(name, FULL) == pytest.approx(
        load(weights_file(name)).metadata["scores"]["full"], abs=0.51
    )


def test_a_list_without_teachers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--only names no teacher; leave it out, or give some of clip, dense"
    ):
        main(TeachersConfig(out=tmp_path / "out", only=()))
    assert not (tmp_path / "out").exists()
