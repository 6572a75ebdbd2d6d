"""Every recipe builds real settings that survive their own YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from radio.config import read_yaml, write_yaml
from radio.errors import ConfigError, RadioError
from radio.students import options_type
from radio.teachers import families
from train.config import TrainConfig
from train.recipes import recipes
from train.setup import check_settings, load_teachers


@pytest.mark.parametrize("name", list(recipes))
def test_every_recipe(name: str, tmp_path: Path) -> None:
    config = recipes[name]()
    assert config.recipe == name
    assert (recipes[name].__doc__ or "").strip()
    check_settings(config, 1)
    assert type(config.options) is options_type(config.student)  # known without a look at the students
    assert all(teacher.model.split(":")[0] in families for teacher in config.teachers)
    write_yaml(config, tmp_path / "config.yaml")
    assert read_yaml(TrainConfig, tmp_path / "config.yaml") == config


def test_the_papers_student_has_the_papers_settings() -> None:
    config = recipes["paper-h14"]()
    assert config.student == "vitdet-h14"
    assert (config.steps, config.batch_size, config.optim.lr) == (600_000, 1024, 1e-3)
    assert (config.loss.cosine, config.loss.smooth_l1) == (0.9, 0.1)
    assert [teacher.summary_weight for teacher in config.teachers] == [1.0, 1.0, 0.0]
    assert [teacher.spatial_weight for teacher in config.teachers] == [1.0, 1.0, 1.0]
    assert [teacher.resolution for teacher in config.teachers] == [224, 224, 1024]
    assert config.teachers[2].student_resolution == 72 * 14


def test_the_papers_teachers_without_their_files_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RadioError, match=r"weights/metaclip_h14\.pt: no such") as caught:
        load_teachers(recipes["paper-h14"](), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'paper-h41'; did you mean paper-h14"):
        recipes["paper-h41"]
