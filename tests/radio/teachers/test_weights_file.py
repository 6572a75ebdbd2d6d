"""Weights files of others: read as data, refused clearly."""

from __future__ import annotations

import pytest
import torch

from radio.errors import CheckpointError
from radio.teachers.base import read_weights, refuse_file


def test_floats_become_float32_and_wrappings_are_taken_off(tmp_path):
    path = tmp_path / "w.pt"
    tensors = {"module.a": torch.tensor([0.5], dtype=torch.float16), "module.n": torch.tensor(3)}
    torch.save({"epoch": 7, "state_dict": tensors}, path)
    found = read_weights("openclip:ViT-B-32", path)
    assert found["a"].dtype == torch.float32 and found["a"].item() == 0.5
    assert found["n"].dtype == torch.int64


def test_no_file_says_how_to_name_one():
    with pytest.raises(CheckpointError, match=r"dinov2:vitb14 needs a weights file; .*dinov2:vitb14@FILE"):
        read_weights("dinov2:vitb14", None)


def test_an_absent_file_and_a_text_file_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such weights file"):
        read_weights("sam:vit_b", tmp_path / "absent.pth")
    text = tmp_path / "text.pth"
    text.write_text("these are no weights")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        read_weights("sam:vit_b", text)


def test_a_file_that_would_run_code_is_refused_and_does_not(bomb):
    path, trace = bomb
    with pytest.raises(CheckpointError, match="nothing was run"):
        read_weights("dinov2:vitb14", path)
    assert not trace.exists()


def test_a_teacher_that_brings_its_weights_takes_no_file(tmp_path):
    refuse_file("pip:efficientnet-lite0", None)
    with pytest.raises(CheckpointError, match="brings its own weights"):
        refuse_file("pip:efficientnet-lite0", tmp_path / "w.pt")
