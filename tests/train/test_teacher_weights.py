"""Teachers are kept as forwards use them, and say the same as before."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from radio.hub import load_teacher
from radio.types import Teacher
from train.config import CacheConfig, TeacherConfig, TrainConfig
from train.plan import bytes_of, without_fast_paths
from train.setup import halve, load_teachers, make_lean

CPU = torch.device("cpu")


def random_teacher(name: str) -> Teacher:
    """An architecture with random weights; indices, which it computes itself, are zero."""
    teacher = load_teacher(name, meta=True)
    assert isinstance(teacher, nn.Module)
    teacher.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(generator=generator).mul_(0.05).add_(0.05)
        else:
            tensor.data.zero_()
    return teacher


def features(teacher: Teacher, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16), without_fast_paths():  # as on a GPU under autocast
        summary, tokens, _ = teacher(images)
    return summary, tokens


@pytest.mark.parametrize(
    "name",
    [
        *("scenes:clip", "scenes:dense", "scenes:sam", "dinov2:vits14_reg"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("openclip:ViT-B-32", "sam:vit_b")),
    ],
)
def test_halved_weights_give_the_same_features_under_autocast(name: str) -> None:
    whole = load_teacher(name) if name.startswith("scenes") else random_teacher(name)
    halved = copy.deepcopy(whole)
    assert isinstance(halved, nn.Module)
    halve(halved)
    assert bytes_of(halved) < 0.8 * bytes_of(whole)
    side = 112 if name.startswith("dinov2") else whole.native_size[0]
    for one, other in zip(features(whole, side), features(halved, side), strict=True):
        assert one.dtype == other.dtype
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)


def test_a_subclass_that_computes_with_its_weight_keeps_it() -> None:
    class Standardised(nn.Conv2d):
        pass

    module = nn.Sequential(Standardised(3, 4, 1), nn.Conv2d(4, 4, 1), nn.LayerNorm(4))
    halve(module)
    assert [p.dtype for p in module.parameters()] == [torch.float32] * 2 + [torch.bfloat16] * 2 + [
        torch.float32
    ] * 2


def test_a_run_loads_its_teachers_lean(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, teachers=(TeacherConfig(name="clip", model="scenes:clip"),))
    known = load_teacher("scenes:clip").fingerprint
    teacher = load_teachers(config, CPU)["clip"]
    assert isinstance(teacher, nn.Module)
    assert teacher.text is None
    assert not any("text" in name for name, _ in teacher.named_parameters())
    for cache, kept in (
        (CacheConfig(folder=tmp_path), {torch.float32}),
        (CacheConfig(), {torch.bfloat16, torch.float32}),
    ):
        make_lean(teacher, replace(config, cache=cache), half=True)
        assert {weight.dtype for weight in teacher.parameters()} == kept
    assert teacher.fingerprint == known
