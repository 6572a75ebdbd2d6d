"""Students as graphs: torch.export and torch.compile give the same features."""

from __future__ import annotations

import shutil

import pytest
import torch

from radio.model import ModelConfig, build
from radio.types import Features

NAMES = ["vit-tiny12", "vitdet-tiny12", "e-radio-tiny"]
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def _close(found: Features, wanted: Features) -> None:
    assert tuple(found.grid) == wanted.grid
    torch.testing.assert_close(found.summary, wanted.summary, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_student_gives_the_same_features(name):
    student = build(ModelConfig(student=name), 0).eval()
    images = torch.rand(2, 3, 96, 192, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(student, (images,)).module()
    with torch.inference_mode():
        for batch in (images, images.flip(0)):
            _close(exported(batch), student(batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_one_graph_for_inference_and_for_training(name):
    student = build(ModelConfig(student=name), 0)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    crops = student.sample_crops(2, torch.Generator().manual_seed(1))
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _close(compiled(images), student(images))
    gradients = []
    for model in (compiled, student):
        student.zero_grad()
        model(images, crops).tokens.square().mean().backward()
        gradients.append([p.grad.clone() for p in student.student.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_gives_the_same_features(name):
    student = build(ModelConfig(student=name), 0).eval()
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _close(torch.compile(student, fullgraph=True)(images), student(images))
