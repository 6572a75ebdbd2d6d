"""The sizes at which the evaluators give images to models, known without weights: the paper's, or 224 px."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.core.task import make_evaluator
from evals.knn import KnnSettings
from evals.linear import LinearSettings
from evals.sam_dropin import SamSettings
from evals.seg_probe.protocol import SegSettings
from evals.vqa.settings import VqaSettings
from radio.hub import load_teacher
from radio.model import AdaptorConfig, ModelConfig, build_meta
from radio.students import StudentOptions

SAM = {"name": "sam", "model": "sam:vit_h@absent.pth"}
SEG, VQA = SegSettings(preset="paper"), VqaSettings(preset="paper")


def size(model: Any, task: str, settings: Any) -> tuple[int, int]:
    input_size = make_evaluator(task).input_size
    assert input_size is not None
    return input_size(model, settings)


def student(name: str, **metadata: Any) -> Any:
    adaptor = AdaptorConfig(name="sam", summary_dim=8, token_dim=8)
    model = build_meta(ModelConfig(student=name, options=StudentOptions(), adaptors=(adaptor,)))
    model.metadata = metadata
    return model


@pytest.mark.parametrize(
    ("name", "seg", "vqa"),
    [
        ("vitdet-h14", 518, 336),  # in the probe with global attention: its windows do not divide 37
        ("vit-l14", 518, 336),
        ("vit-b32", 224, 224),
        ("e-radio-l", 224, 224),
        ("timm:resnetv2_101", 224, 224),
    ],
)
def test_the_papers_sizes(name: str, seg: int, vqa: int) -> None:
    model = student(name)
    assert size(model, "seg", SEG) == (seg, seg)
    assert size(model, "vqa", VQA) == (vqa, vqa)
    assert size(model, "seg", SegSettings()) == model.nearest_size(96, 96)  # of the generated world


def test_the_view_of_summaries() -> None:
    model = student("vit-l14")
    assert size(model, "knn", KnnSettings()) == model.native_size == (224, 224)
    assert size(model, "knn", KnnSettings(size=378)) == (378, 378)
    assert size(model, "linear", LinearSettings(size=378)) == (378, 378)


def test_in_sams_place() -> None:
    trained = student("vitdet-h14", teachers=[{**SAM, "student_resolution": 1008}])
    assert size(trained, "sam", SamSettings()) == (1008, 1008)
    assert size(student("vitdet-h14", teachers=[SAM]), "sam", SamSettings()) == (1008, 1008)
    assert size(student("vit-b16", teachers=[SAM]), "sam", SamSettings()) == (1024, 1024)
    chosen = SamSettings(size=512, data=Path("a"), images=Path("b"))
    assert size(student("vit-b16", teachers=[SAM]), "sam", chosen) == (512, 512)
    assert size(load_teacher("sam:vit_b@absent.pth", meta=True), "sam", SamSettings()) == (1024, 1024)
