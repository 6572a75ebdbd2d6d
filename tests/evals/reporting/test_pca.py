"""Principal components against numpy's SVD and scikit-learn's PCA, and what the maps show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from evals.reporting.pca import Components, Taught, draw_maps, own_map, teacher_maps, teachers_of
from radio.errors import CheckpointError, DataError
from radio.hub import load_backbone
from radio.model import RadioModel
from radio.scenes import render_images


def tokens(count: int = 200, width: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, width)
    return torch.randn(count, width, generator=generator) * scale + 5


def images(count: int = 2) -> list[torch.Tensor]:
    drawn, _ = render_images(range(count), split="val")
    return [torch.from_numpy(image) for image in drawn]


def test_components_equal_numpys_svd_and_scikit_learns() -> None:
    points = tokens()
    found = Components.fit(points)
    centred = points.double().numpy() - points.double().numpy().mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(found.axes.numpy(), axes, atol=1e-9)
    other = PCA(n_components=3, svd_solver="full").fit(points.double().numpy())
    ours, theirs = found.coordinates(points).numpy(), other.transform(points.double().numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-9)
    assert found.explained(points) == pytest.approx(other.explained_variance_ratio_.sum())


def test_signs_do_not_depend_on_the_solver() -> None:
    """Points and their mirror image have the same axes, the largest entry positive."""
    points = tokens()
    axes = Components.fit(points).axes
    assert (axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)) > 0).all()
    torch.testing.assert_close(Components.fit(-points).axes, axes, atol=1e-9, rtol=0)


def test_colours_span_the_range_and_what_does_not_vary_is_grey() -> None:
    points = tokens()
    colours = Components.fit(points).colours(points)
    assert colours.shape == (200, 3) and colours.min() == 0 and colours.max() == 1
    line = torch.linspace(0, 1, 50)[:, None] * torch.ones(2)  # one dimension of two
    colours = Components.fit(line).colours(line)
    assert torch.equal(colours[:, 1:], torch.full((50, 2), 0.5).double())
    still = torch.ones(5, 4)
    assert torch.equal(Components.fit(still).colours(still), torch.full((5, 3), 0.5).double())
    assert Components.fit(still).explained(still) == 0


def test_values_that_are_not_finite_are_refused() -> None:
    points = tokens()
    points[3, 2] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        Components.fit(points)


def test_a_map_has_a_pixel_a_token_and_is_the_same_each_time() -> None:
    model = load_backbone("scenes:clip")
    once, again = own_map(model, images()), own_map(model, images())
    assert once.model == "scenes:clip" and once.note.startswith("96 x 96 px, 8 x 8 tokens, ")
    assert [image.shape for image in once.images] == [(8, 8, 3)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(once.images, again.images, strict=True))


def checkpoint(path: Path, spec: str) -> Path:
    """An untrained student with an adaptor for a teacher that its metadata names."""
    from radio.adaptors import AdaptorConfig
    from radio.model import ModelConfig, build

    adaptor = AdaptorConfig(name="clip", summary_dim=128, token_dim=128)
    metadata = {"resolution": 96, "teachers": [{"name": "clip", "model": spec, "student_resolution": 108}]}
    build(ModelConfig(student="vit-tiny12", adaptors=(adaptor,)), 0, metadata, "small").save(path)
    return path


def test_a_student_stands_beside_its_teacher_along_the_teachers_axes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "small.pt", "scenes:clip")
    maps, notes = draw_maps([str(path), "scenes:clip"], images())
    assert [one.model for one in maps] == ["small", "scenes:clip", "small as clip"] and notes == []
    assert [one.images[0].shape for one in maps] == [(8, 8, 3), (8, 8, 3), (9, 9, 3)]
    assert "along scenes:clip's axes" in maps[2].note


def test_a_perfect_student_has_its_teachers_colours(tmp_path: Path) -> None:
    """An adaptor that gives the teacher's own features makes both maps equal."""
    student = load_backbone(str(checkpoint(tmp_path / "small.pt", "scenes:clip")))
    teacher = load_backbone("scenes:clip")
    assert isinstance(student, RadioModel)
    shown = images()
    student.adapt = lambda name, features: teacher(  # type: ignore[method-assign, assignment]
        torch.stack([image / 255 for image in shown])
    )
    (taught,) = teachers_of(student)
    assert taught == Taught("clip", "scenes:clip", (108, 108))
    theirs, ours = teacher_maps(student, taught, teacher, shown)
    differences = [abs(a.astype(int) - b) for a, b in zip(theirs.images, ours.images, strict=True)]
    assert np.max(differences) <= 1


def test_a_teacher_that_is_gone_is_noted_and_a_wrong_spec_raises(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "small.pt", f"dinov2:vitb14@{tmp_path / 'gone.pth'}")
    maps, notes = draw_maps([str(path)], images(1))
    assert [one.model for one in maps] == ["small"]
    assert len(notes) == 1 and "gone.pth" in notes[0] and notes[0].startswith("small's teacher dinov2:vitb14")
    with pytest.raises(CheckpointError, match="no such"):
        draw_maps([str(tmp_path / "nowhere.pt")], images(1))
