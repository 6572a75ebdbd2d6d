"""Every recipe builds real settings that survive their own YAML file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from radio.config import read_yaml, write_yaml
from radio.errors import ConfigError, RadioError, SizeError
from radio.hub import load_teacher
from radio.students import options_type
from radio.teachers import families
from train.config import PlanOptions, TrainConfig
from train.mosaic import tiles_per_side
from train.plan import make_plan
from train.recipes import recipes
from train.setup import check_settings, load_teachers, teacher_sizes
from train.stages import split_stages


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


LATER = ("radio-v2.5-b", "radio-v2.5-l", "radio-v2.5-h", "c-radio-v4-so400m", "c-radio-v4-h")


@pytest.mark.parametrize("name", LATER)
def test_the_settings_of_later_recipes_fit_64_ranks(name: str) -> None:
    """Every stage: groups of small and large images whose batches 64 ranks can share."""
    for stage in split_stages(recipes[name]()):
        partition = check_settings(stage.config, 64)
        low = partition.groups[0]
        assert low.batch_size == 1024 and low.teachers == low.adaptors
        assert all(group.batch_size == 128 for group in partition.groups[1:])
        assert all(set(group.adaptors) == set(low.adaptors) for group in partition.groups[1:])


def test_what_the_teachers_of_later_recipes_see() -> None:
    """RADIOv2.5: 27 x 27 tokens at 432 px. C-RADIOv4: DINOv3 sees the student's side, SAM k x k tiles."""
    dino, sam = (load_teacher(spec, meta=True) for spec in ("dinov2:vitb14_reg", "sam:vit_b"))
    first, second, third = split_stages(recipes["radio-v2.5-b"]())
    for stage, side, tokens in ((first, 256, 16), (second, 432, 27)):
        sizes = teacher_sizes(stage.config, {"dino": dino, "sam": sam})
        assert sizes == {"dino": {side: (14 * tokens,) * 2}, "sam": {side: (side, side)}}
        assert tiles_per_side(sam, side) == {256: 4, 432: 2}[side]
    high = teacher_sizes(third.config, {"dino-high": dino, "sam-high": sam})
    assert high == {"dino-high": {1024: (518, 518)}, "sam-high": {1024: (1024, 1024)}}
    (whole,) = split_stages(recipes["c-radio-v4-h"]())
    sizes = teacher_sizes(whole.config, {"sam": sam, "sam-high": sam})
    assert sizes["sam"] == {side: (side, side) for side in (128, 192, 224, 256, 384, 432)}
    assert sizes["sam-high"] == {512: (512,) * 2, 768: (768,) * 2, 1024: (1024,) * 2, 1152: (1024,) * 2}


def test_sam_3_takes_the_place_of_sam_as_documented() -> None:
    """1008 px of 14 px patches hold 2 x 2 of 432 px, and one of 512."""
    folder: Any = SimpleNamespace(
        name="sam3", native_size=(1008, 1008), patch_size=14, nearest_size=lambda h, w: (1008, 1008)
    )
    config = recipes["c-radio-v4-h"]()
    teachers = [replace(t, model="hf:FOLDER") if t.name.startswith("sam") else t for t in config.teachers]
    assert [t.name for t in teachers if t.model == "hf:FOLDER"] == [teachers[2].name, teachers[5].name]
    with pytest.raises(SizeError, match="teacher sam-high: its 1008 px hold one image of 518 px; leave its"):
        teacher_sizes(replace(config, teachers=tuple(teachers)), {"sam-high": folder})
    teachers[5] = replace(teachers[5], mosaic=False)
    changed = replace(config, teachers=tuple(teachers))
    check_settings(changed, 64)
    sizes = teacher_sizes(changed, {"sam": folder, "sam-high": folder})
    assert [tiles_per_side(folder, tile) for tile, _ in sizes["sam"].values()] == [8, 5, 4, 4, 2, 2]
    assert set(sizes["sam-high"].values()) == {(1008, 1008)}


@pytest.mark.slow
def test_the_plan_of_a_later_recipe_is_the_papers_bill() -> None:
    """PHI-S, ViT-B: 14,080 hours of A100s in three stages."""
    plans = [
        make_plan(stage.config, PlanOptions(world=64)) for stage in split_stages(recipes["radio-v2.5-b"]())
    ]
    assert sum(plan.days * 24 * 64 for plan in plans) == pytest.approx(14_080, rel=0.15)
