"""A frozen encoder: it normalises, refuses sizes, never learns, and is known by its weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from radio.errors import SizeError
from radio.teachers.base import Frozen
from radio.types import Features, Teacher


class Tiny(nn.Module):
    """4 x 4 mean pixels through a linear layer, batch norm and dropout, which must stay asleep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Features:
        pixels = nn.functional.avg_pool2d(images, 4)
        tokens = self.linear(pixels.flatten(2).transpose(1, 2))
        tokens = self.drop(self.norm(tokens.transpose(1, 2)).transpose(1, 2))
        return Features(tokens.mean(1), tokens, (pixels.shape[2], pixels.shape[3]))


def frozen(trunk: nn.Module | None = None, *, fixed_size: bool = False, name: str = "tiny") -> Frozen:
    if trunk is None:
        torch.manual_seed(0)
        trunk = Tiny()
    return Frozen(
        trunk=trunk,
        name=name,
        mean=(0.5, 0.25, 0.0),
        std=(0.5, 0.25, 2.0),
        native_size=(16, 8),
        patch_size=4,
        fixed_size=fixed_size,
        summary_dim=5,
        token_dim=5,
    )


def test_it_is_a_teacher_without_text():
    teacher = frozen()
    assert isinstance(teacher, Teacher)
    assert teacher.text is None


def test_pixels_are_normalised_before_the_trunk():
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Features:
            seen.append(images)
            return Features(images.new_zeros(1, 5), images.new_zeros(1, 1, 5), (1, 1))

    frozen(Spy())(torch.ones(1, 3, 16, 8))
    assert seen[0][0, :, 0, 0].tolist() == [1.0, 3.0, 0.5]  # (1 - mean) / std by hand


def test_training_a_parent_neither_wakes_nor_teaches_it():
    teacher = frozen()
    images = torch.rand(2, 3, 16, 8)
    before = teacher(images)
    nn.Sequential(teacher).train()
    after = teacher(images)
    assert torch.equal(before.tokens, after.tokens)  # dropout and batch statistics would differ
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_features_can_stand_in_a_loss():
    teacher = frozen()
    own = torch.zeros(2, 5, requires_grad=True)
    target = teacher(torch.rand(2, 3, 16, 8)).summary
    assert not target.requires_grad
    nn.functional.smooth_l1_loss(own, target).backward()  # an inference tensor would raise here
    assert own.grad is not None


@pytest.mark.parametrize(
    ("asked", "fitting"), [((16, 8), (16, 8)), ((17, 1), (16, 4)), ((18, 9), (20, 8)), ((0, 30), (4, 32))]
)
def test_fit_is_the_nearest_multiple(asked, fitting):
    assert frozen().nearest_size(*asked) == fitting


def test_without_a_multiple_only_the_native_size_fits():
    teacher = frozen(fixed_size=True)
    assert teacher.nearest_size(999, 1) == (16, 8)
    with pytest.raises(SizeError, match=r"tiny cannot take 16x16 pixels.*nearest size that it can is 16x8"):
        teacher(torch.rand(1, 3, 16, 16))


def test_a_size_that_does_not_fit_names_the_one_that_does():
    with pytest.raises(SizeError, match=r"tiny cannot take 10x7 .*is 12x8: resize"):
        frozen()(torch.rand(1, 3, 10, 7))


@pytest.mark.parametrize("shape", [(3, 16, 8), (1, 1, 16, 8)])
def test_what_is_no_batch_of_rgb_images_is_refused(shape):
    with pytest.raises(SizeError, match=r"wanted images \[B, 3, h, w\]"):
        frozen()(torch.rand(shape))


def test_the_fingerprint_follows_weights_name_and_type():
    teacher = frozen()
    assert teacher.fingerprint == frozen().fingerprint
    assert teacher.fingerprint != frozen(name="other").fingerprint
    torch.manual_seed(1)
    assert teacher.fingerprint != frozen(Tiny()).fingerprint
    whole = teacher.fingerprint
    half = teacher.to(torch.device("cpu"), torch.bfloat16)
    assert half.fingerprint != whole


def test_moved_to_another_type_it_answers_in_it():
    teacher = frozen().to(torch.device("cpu"), torch.bfloat16)
    assert teacher(torch.rand(1, 3, 16, 8)).tokens.dtype == torch.bfloat16
