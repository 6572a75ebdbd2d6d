"""What the maps show: a pixel a token, a student along its teacher's axes, and the variance in the colors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evals.core.blocks import ImageGrid, ImageRow
from evals.core.evaluator import run_evaluator
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.maps import MapsSettings
from radio.errors import ConfigError, DataError
from radio.hub import load_backbone
from radio.model import AdaptorConfig, ModelConfig, RadioModel, build
from radio.types import Features


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., tuple[Report, list[ImageRow]]]:
    """Runs the evaluator on two images; returns its report and the rows of images."""

    def draw(model: Any, query: str = "scenes:val", count: int = 2) -> tuple[Report, list[ImageRow]]:
        report = run_evaluator(
            make_evaluator("maps"), model, MapsSettings(query=query, num_images=count), tmp_path
        )
        (grid,) = read(tmp_path / f"maps-{report.model.replace(':', '-')}.json").blocks
        assert isinstance(grid, ImageGrid)
        return report, list(grid.rows)

    return draw


def pixels(folder: Path, row: ImageRow) -> list[np.ndarray]:
    return [np.asarray(Image.open(folder / image.file).convert("RGB")) for image in row.images]


def test_a_map_has_a_pixel_a_token_and_is_the_same_each_time(
    tmp_path: Path, draw: Callable[..., Any]
) -> None:
    model = load_backbone("scenes:clip")
    report, (images, own) = draw(model)
    assert images.note == "scenes:val" and [image.alt for image in images.images] == [
        "val/000000",
        "val/000750",
    ]
    assert own.name == "scenes:clip" and own.note.startswith("96 x 96 px, 8 x 8 tokens, ")
    assert [image.side for image in own.images] == [112, 112]
    once = pixels(tmp_path, own)
    assert [image.shape for image in once] == [(8, 8, 3)] * 2
    again, rows = draw(model)
    assert all(np.array_equal(a, b) for a, b in zip(once, pixels(tmp_path, rows[1]), strict=True))
    assert again.metrics == report.metrics


def test_the_metric_is_the_variance_that_three_components_hold(draw: Callable[..., Any]) -> None:
    """Against the singular values of the centred tokens."""
    model = load_backbone("scenes:clip")
    tokens = []

    def encode(images: torch.Tensor) -> Features:
        tokens.append(features := model(images))
        return features

    report, rows = draw(Wrapped(model, encode))
    points = torch.cat([each.tokens for each in tokens]).flatten(0, 1).double().numpy()
    values = np.linalg.svd(points - points.mean(axis=0), compute_uv=False) ** 2
    share = report.metrics["explained"]
    assert share.value == pytest.approx(100 * values[:3].sum() / values.sum(), abs=1e-6)
    assert share.higher_is_better is None and report.primary_metric == "explained"
    assert f"{share.value:.0f} % of the variance" in rows[1].note


class Wrapped:
    """A backbone whose forward pass is replaced."""

    def __init__(self, model: Any, encode: Callable[[torch.Tensor], Features]) -> None:
        self._model, self._encode = model, encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def to(self, *_: Any) -> Wrapped:
        return self

    def eval(self) -> Wrapped:
        return self

    def __call__(self, images: torch.Tensor) -> Features:
        return self._encode(images)


def make_student(spec: str) -> RadioModel:
    """An untrained student with an adaptor for a teacher that its metadata names."""
    adaptor = AdaptorConfig(name="clip", summary_dim=128, token_dim=128)
    metadata = {"resolution": 96, "teachers": [{"name": "clip", "model": spec, "student_resolution": 108}]}
    return build(ModelConfig(student="vit-tiny12", adaptors=(adaptor,)), 0, metadata, "small")


def test_a_student_stands_beside_its_teacher_along_the_teachers_axes(
    tmp_path: Path, draw: Callable[..., Any]
) -> None:
    report, rows = draw(make_student("scenes:clip"))
    assert [row.name for row in rows] == ["images", "small", "scenes:clip", "small as clip"]
    assert [pixels(tmp_path, row)[0].shape for row in rows[1:]] == [(8, 8, 3), (8, 8, 3), (9, 9, 3)]
    assert "108 x 108 px, along scenes:clip's axes, 9 x 9 tokens" in rows[3].note
    assert report.notes == ()


def test_a_perfect_student_has_its_teachers_colors(
    tmp_path: Path, draw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adaptor that gives the teacher's own features makes both maps equal."""
    teacher = load_backbone("scenes:clip")
    shown: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> Features:
        shown.append(images)
        return Features(torch.zeros(1, 4), torch.randn(1, 64, 4), (8, 8))

    student = make_student("scenes:clip")
    student.metadata["teachers"][0]["student_resolution"] = 96
    monkeypatch.setattr(student.student, "forward", lambda images, crops: encode(images))
    monkeypatch.setattr(student.adaptors["clip"], "forward", lambda *_: teacher(torch.cat(shown[-2:])))
    _, rows = draw(student)
    theirs, ours = (pixels(tmp_path, row) for row in rows[2:])
    differences = [abs(a.astype(int) - b) for a, b in zip(theirs, ours, strict=True)]
    assert np.max(differences) <= 1


def test_a_teacher_that_is_gone_is_noted(tmp_path: Path, draw: Callable[..., Any]) -> None:
    report, rows = draw(make_student(f"dinov2:vitb14@{tmp_path / 'gone.pth'}"))
    assert [row.name for row in rows] == ["images", "small"]
    (note,) = report.notes
    assert "gone.pth" in note and note.startswith("small's teacher dinov2:vitb14")


def test_unreadable_images_are_skipped_and_none_is_an_error(tmp_path: Path, draw: Callable[..., Any]) -> None:
    folder = tmp_path / "photos" / "cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    (folder / "b.png").write_text("no image")
    model = load_backbone("scenes:clip")
    report, rows = draw(model, str(folder.parent))
    (used,) = report.data
    assert used.count == 1 and [skipped.key for skipped in used.skipped] == ["cat/b.png"]
    assert [len(row.images) for row in rows] == [1, 1]
    (folder / "a.png").write_text("no image")
    with pytest.raises(DataError, match="none of the 2 images could be read, the first because: not"):
        draw(model, str(folder.parent))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_images"):
        MapsSettings(num_images=0)
