"""Every student, teacher, adaptor and text tower runs where it was moved to, without a host sync."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from radio.hub import load_teacher
from radio.model import AdaptorConfig, ModelConfig, RadioModel
from radio.students import students
from radio.students.vit import ViTOptions
from radio.types import Features, Student, Teacher, TextTower

from .fake import GPU, on_gpu, pretend

SMALL = ("vit-tiny12", "vitdet-tiny12", "e-radio-tiny", "e-radio-tiny-noup", "timm:efficientvit_l1")
TEACHERS = ("scenes:clip", "scenes:dense", "scenes:sam", "pip:efficientnet-lite0", "pip:dinov2-arch-vits14")
LARGE = (
    *(f"openclip:{name}" for name in ("ViT-B-32", "ViT-L-14-336", "ViT-H-14-quickgelu", "ViT-bigG-14")),
    *(f"dinov2:{name}" for name in ("vits14", "vitb14_reg", "vitl14", "vitg14", "vitg14_reg")),
    *(f"sam:{name}" for name in ("vit_b", "vit_l", "vit_h")),
)


def sized(names: tuple[str, ...], slow: tuple[str, ...]) -> list[object]:
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow if name not in names)]


def there(features: Features) -> bool:
    """Whether features are on the GPU, and as many tokens as the grid says."""
    assert features.tokens.shape[1] == features.grid[0] * features.grid[1]
    return features.summary.device == features.tokens.device == GPU


def window_of(name: str) -> int | None:
    """A window side of one's own that divides the map of a student's native size."""
    if name.startswith("e-radio"):
        return 4 if "tiny" in name else 7
    return 4 if name.endswith("tiny12") else None


@pytest.mark.parametrize("name", sized(SMALL, tuple(students)))
@pytest.mark.parametrize("training", [False, True])
def test_students(name: str, training: bool) -> None:
    adaptors = tuple(
        AdaptorConfig(name=f"{resample}", summary_dim=5, token_dim=7, resample=resample)
        for resample in ("before", "after")
    )
    with pretend():
        model = on_gpu(lambda: RadioModel(ModelConfig(student=name, adaptors=adaptors))).train(training)
        student: Student = model.student
        images = torch.rand(2, 3, *student.native_size, device=GPU)
        crops = student.sample_crops(2, torch.Generator()) if training else None
        found = model(images, None if crops is None else crops.to(GPU))
        assert there(found)
        for adaptor in adaptors:
            assert there(model.adapt(adaptor.name, found, (3, 5)))
        if student.with_window is not None:
            assert there(student.with_window(window_of(name))(images))


@pytest.mark.parametrize(
    "options", [{"class_tokens": 0}, {"class_tokens": 3, "registers": 2, "stem": "linear"}]
)
def test_options_of_a_student(options: dict[str, object]) -> None:
    with pretend():
        student = on_gpu(lambda: students["vit-tiny12"](ViTOptions(**options)))  # type: ignore[arg-type]
        assert there(
            student(torch.rand(2, 3, 96, 96, device=GPU), student.sample_crops(2, torch.Generator()).to(GPU))
        )


@pytest.mark.parametrize("name", sized(TEACHERS, LARGE))
def test_teachers_and_their_texts(name: str) -> None:
    with pretend():
        teacher: Teacher = on_gpu(lambda: load_teacher(name, meta=True))
        assert there(teacher(torch.rand(2, 3, *teacher.native_size, device=GPU)))
        tower: TextTower | None = teacher.text
        if tower is not None and not name.startswith("pip:"):  # that one needs files of its package
            vectors = tower.encode(["a red circle", "a blue square"])
            assert vectors.device == tower.project(vectors).device == GPU


class Careless(nn.Module):
    def __init__(self, slip: str) -> None:
        super().__init__()
        self.slip, self.weight, self.mask = slip, nn.Parameter(torch.ones(3)), torch.ones(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[3] -> [3], with a slip."""
        x = x * self.weight
        if self.slip == "device":
            return x + torch.ones(3)
        if self.slip == "left behind":
            return x + self.mask
        if self.slip == "index":
            return x[torch.arange(3)]
        return x * x.sum().item() if self.slip == "item" else x[x > 0]


@pytest.mark.parametrize("slip", ["device", "left behind", "item", "mask", "index"])
def test_what_a_gpu_would_refuse_or_wait_for_is_seen(slip: str) -> None:
    with pretend():
        module = on_gpu(lambda: Careless(slip))
        with pytest.raises((RuntimeError, DataDependentOutputException, AssertionError)):
            module(torch.rand(3, device=GPU))
