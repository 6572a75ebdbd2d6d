"""How much of a known pattern a student reproduces: against least squares, and on teachers with a pattern."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evals.core.evaluator import RunSettings, run_evaluator
from evals.core.report import Report
from evals.core.task import make_evaluator
from evals.fixed_pattern import PatternSettings
from evals.fixed_pattern.evaluator import pattern_shares
from radio.errors import ConfigError, RadioError
from radio.hub import load_teacher
from radio.teachers.base import Frozen
from radio.teachers.scene_variants import fixed_pattern
from radio.types import Features


class SharedPattern(nn.Module):
    """An adaptor of the clean teacher itself: its tokens, and a share of the pattern."""

    def __init__(self, share: float, width: int = 128) -> None:
        super().__init__()
        self.share, self.width = share, width

    def forward(self, features: Features, grid: tuple[int, int] | None = None) -> Features:
        assert grid == (9, 9)
        tokens = features.tokens + self.share * fixed_pattern().flatten(0, 1)
        return features._replace(tokens=tokens[..., : self.width])


def student(share: float, width: int = 128) -> Frozen:
    model = load_teacher("scenes:dense")
    assert isinstance(model, Frozen)
    model.adaptors = nn.ModuleDict({"dense": SharedPattern(share, width)})  # type: ignore[assignment]
    model.name = f"student-{share}-{width}"
    model._settings += model.name  # another fingerprint
    return model


def score(model: Frozen, out: Path, **changes: object) -> Report:
    settings = PatternSettings(scenes=6, **changes)  # type: ignore[arg-type]
    run = RunSettings(cache=out / "cache", device="cpu")
    return run_evaluator(make_evaluator("pattern"), model, settings, out, run=run)


def test_the_shares_are_those_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(9, 5, generator=generator).expand(4, 9, 5)
    clean, noise = torch.randn(2, 4, 9, 5, generator=generator)
    student_tokens: Tensor = clean + 0.3 * pattern + noise
    shares = pattern_shares(student_tokens, clean, clean + pattern)
    for image in range(4):
        x, y = pattern[image].reshape(-1, 1).double(), (0.3 * pattern + noise)[image].reshape(-1).double()
        assert float(shares[image]) == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0].item(), abs=1e-5)
    x, y = pattern.reshape(-1, 1).double(), (0.3 * pattern + noise).reshape(-1).double()
    assert float(shares.mean()) == pytest.approx(np.linalg.lstsq(x, y, rcond=None)[0].item(), abs=1e-5)


def test_teachers_that_are_alike_have_no_pattern() -> None:
    tokens = torch.rand(2, 4, 3)
    with pytest.raises(RadioError, match="alike, so there is no pattern"):
        pattern_shares(tokens, tokens, tokens)


@pytest.mark.parametrize("share", [-0.1, 0.0, 0.25, 1.2])
def test_a_student_reproduces_what_it_has_of_the_pattern(share: float, tmp_path: Path) -> None:
    report = score(student(share), tmp_path)
    metric = report.metrics["reproduced"]
    assert metric.value == pytest.approx(100 * share, abs=1e-3)
    assert metric.low == pytest.approx(metric.value, abs=1e-3)
    assert metric.higher_is_better is False
    lines = (tmp_path / report.records).read_text().splitlines()
    assert [json.loads(line)["share"] for line in lines] == pytest.approx([share] * 6, abs=1e-5)


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no adaptor 'dens'; did you mean dense"):
        score(student(0.5), tmp_path, head="dens")
    with pytest.raises(ConfigError, match="scenes:sam and scenes:dense have other grids or widths"):
        score(student(0.5), tmp_path, noisy="scenes:sam")
    with pytest.raises(ConfigError, match="has tokens of width 64, and scenes:dense of 128"):
        score(student(0.5, width=64), tmp_path)
    with pytest.raises(RadioError, match="no pattern to look for"):
        score(student(0.5), tmp_path, noisy="scenes:dense")
    lack = make_evaluator("pattern").missing_requirements(load_teacher("scenes:dense"))
    assert lack == "scenes:dense has no adaptors; a distilled student has"
