"""Mosaics against a teacher whose tokens see their own patch alone, in a run, and in its plan."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from radio.errors import ConfigError, SizeError
from radio.hub import load_teacher
from radio.types import Features
from tests.train.conftest import CPU, Start, same_weights, untimed
from tests.train.ranks import on_ranks
from tests.train.test_balanced_runs import stop_at
from train.config import CacheConfig, PlanOptions, SidesConfig, TeacherConfig, TrainConfig
from train.mosaic import mosaic_features, tiles_per_side
from train.plan import make_plan, print_plan
from train.setup import check_settings, mosaic_shifts
from train.trainer import Trainer

PATCH = 4


class MeanColours:
    """A teacher whose tokens are the mean colours of its patches of 4 px; keeps its inputs."""

    name, patch_size = "mean colours", PATCH

    def __init__(self, side: int = 48) -> None:
        self.native_size = (side, side)
        self.inputs: list[Tensor] = []

    def __call__(self, images: Tensor) -> Features:
        assert images.shape[-2:] == self.native_size
        self.inputs.append(images)
        plane = torch.nn.functional.avg_pool2d(images, PATCH)
        tokens = plane.flatten(2).transpose(1, 2)
        return Features(tokens.mean(dim=1), tokens, (plane.shape[2], plane.shape[3]))


def by_loop(images: Tensor) -> Tensor:
    """The mean colour of each patch, one by one: [B, T, 3]."""
    side = images.shape[-1] // PATCH
    patches = [
        images[:, :, PATCH * y : PATCH * (y + 1), PATCH * x : PATCH * (x + 1)].mean(dim=(2, 3))
        for y in range(side)
        for x in range(side)
    ]
    return torch.stack(patches, dim=1)


@pytest.mark.parametrize(
    ("side", "count", "shift", "forwards"),
    [
        (12, 32, (0, 0), 2),  # 4 x 4 tiles, no room to shift
        (12, 17, (3, 5), 2),  # the last mosaic has one image
        (20, 5, (0, 0), 2),  # 2 x 2 cells of 6 tokens for images of 5
        (20, 4, (1, 1), 1),
        (20, 4, (1, 0), 1),
        (28, 3, (2, 4), 3),  # one image in a cell of 12 tokens
        (48, 2, (7, 7), 2),
    ],
)
def test_each_image_has_its_own_tokens(side: int, count: int, shift: tuple[int, int], forwards: int) -> None:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side))
    teacher: Any = MeanColours()
    found = mosaic_features(teacher, images, shift)
    torch.testing.assert_close(found.tokens, by_loop(images))
    torch.testing.assert_close(found.summary, by_loop(images).mean(dim=1))
    assert found.grid == (side // PATCH, side // PATCH)
    assert sum(map(len, teacher.inputs)) == forwards


def corner(mosaics: Tensor) -> tuple[int, int]:
    """The first row and column, in pixels, that are not black in mosaics [M, 3, h, w]."""
    seen = mosaics.amax(dim=(0, 1)) > 0
    return int(seen.any(dim=1).int().argmax()), int(seen.any(dim=0).int().argmax())


@pytest.mark.parametrize(
    ("whole", "tile", "places"),
    [
        (64, 8, 1),  # SAM's grid and the sides of the recipes, over 16: 8 x 8 tiles fill it
        (64, 12, 5),  # 5 x 5 tiles without room, and 4 tokens at the edge
        (64, 14, 3),
        (64, 16, 1),
        (64, 24, 9),
        (64, 27, 6),
        (11, 4, 3),  # a token in each of the 2 x 2 cells, and one at the edge
    ],
)
def test_images_move_over_all_that_is_free(whole: int, tile: int, places: int) -> None:
    """Each place is that of the pixels, the features stay those of the image."""
    images = torch.rand(3, 3, PATCH * tile, PATCH * tile, generator=torch.Generator().manual_seed(tile)) + 0.1
    teacher: Any = MeanColours(PATCH * whole)
    for shift in range(places):
        found = mosaic_features(teacher, images, (shift, 2 * shift + places))
        torch.testing.assert_close(found.tokens, by_loop(images))
        assert corner(teacher.inputs[-1]) == (PATCH * shift, PATCH * (2 * shift % places))


def test_a_mosaic_of_one_tile_is_the_teacher_itself() -> None:
    teacher = load_teacher("scenes:sam")
    side = teacher.native_size[0]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone, mosaic = teacher(images), mosaic_features(teacher, images)
    assert torch.equal(mosaic.tokens, alone.tokens) and mosaic.grid == alone.grid
    torch.testing.assert_close(mosaic.summary, alone.summary)


def test_a_real_teacher_sees_about_the_same_in_a_mosaic() -> None:
    """Attention sees the neighbours too, so not the same."""
    teacher = load_teacher("scenes:sam")
    side = teacher.native_size[0] // 2 // teacher.patch_size * teacher.patch_size
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, moved = (mosaic_features(teacher, images, shift) for shift in ((0, 0), (1, 1)))
    assert (
        first.tokens.shape == moved.tokens.shape == (4, (side // teacher.patch_size) ** 2, teacher.token_dim)
    )
    assert first.tokens.isfinite().all()


@pytest.mark.parametrize("side", [10, 0, 52])
def test_what_does_not_fit_is_one_error(side: int) -> None:
    teacher: Any = MeanColours()
    with pytest.raises(
        SizeError, match=rf"images of {side} px cannot stand in a mosaic of 48 px .* multiple of 4"
    ):
        tiles_per_side(teacher, side)


def with_mosaic(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Scenes' SAM, which takes 112 px alone, beside a tiny teacher."""
    sam = TeacherConfig(name="sam", model="scenes:sam", summary_weight=0.0, mosaic=True, **changes)
    return replace(config, teachers=(config.teachers[0], sam), steps=4, save_every=2)


def test_a_run_sees_other_mosaics_in_every_step_and_goes_on_with_them(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    config = with_mosaic(config)
    whole = start(config, out=tmp_path / "whole")
    assert whole.sizes["sam"] == {48: (48, 48)}  # the student's side
    inputs: list[Tensor] = []
    sam: Any = whole.teachers["sam"]
    with sam.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        whole.train()
    shifts = [mosaic_shifts(config, step)["sam"] for step in range(4)]
    places = [corner(mosaics) for mosaics in inputs]  # tiles of 6 patches of 8 px in cells of 7
    assert places == [(8 * (down % 2), 8 * (right % 2)) for down, right in shifts]
    assert len(set(places)) > 1
    first = start(config, out=tmp_path / "parts", steps=4)
    asked = iter([False, True])
    first.stop.agreed = lambda: next(asked)  # type: ignore[method-assign]
    first.train()
    assert first.stopped and first.step == 2
    start(config, out=tmp_path / "parts").train()
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")


def test_a_run_that_goes_on_with_other_ranks_says_so(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    config = with_mosaic(config)
    on_ranks(2, tmp_path / "two", lambda ranks: stop_at(2, Trainer(config, ranks, CPU, Console(quiet=True))))
    line = "the number of ranks was 2 and is 1: mosaics hold other images together, and the features of sam"
    resumed = start(config)
    assert resumed.step == 2 and line in resumed.console.file.getvalue()  # type: ignore[attr-defined]
    resumed.save()
    resumed.states.wait()
    assert "mosaics hold" not in start(config).console.file.getvalue()  # type: ignore[attr-defined]


def test_the_plan_counts_fewer_forwards(config: TrainConfig) -> None:
    alone, mosaic = (
        make_plan(replace(with_mosaic(config), teachers=teachers), PlanOptions(world=1))
        for teachers in (
            (TeacherConfig(name="sam", model="scenes:sam"),),
            (TeacherConfig(name="sam", model="scenes:sam", mosaic=True),),
        )
    )
    (single,), (together,) = alone.costs.values(), mosaic.costs.values()
    assert single.teacher_flops == 4 * together.teacher_flops  # 2 x 2 images of 48 px in 112


@pytest.mark.parametrize(("world", "at_48"), [(1, 5), (5, 1)])
def test_the_plan_says_what_mosaics_save(config: TrainConfig, world: int, at_48: int) -> None:
    """Of 20 images on a rank 2 x 2 share a forward at 48 px, and of 4; at 96 px each has its own."""
    sam = TeacherConfig(name="sam", model="scenes:sam", mosaic=True)
    sides = SidesConfig(sides=(48, 96), weights=(3.0, 1.0))
    mosaic = replace(config, teachers=(sam,), resolutions=sides, batch_size=20)
    alone = replace(mosaic, teachers=(replace(sam, mosaic=False),))
    plans = [make_plan(each, PlanOptions(world=world)) for each in (mosaic, alone)]
    saved = world * (plans[1].costs["sam"].teacher_flops - plans[0].costs["sam"].teacher_flops)
    out = io.StringIO()
    print_plan(plans[0], Console(file=out, width=200))
    assert (
        f"mosaics: forwards of sam for a rank's {20 // world} images: {at_48} at 48 px, {20 // world} at "
        f"96 px; one by one they would take {saved / 1e9:.4g} GFLOP more a step"
    ) in " ".join(out.getvalue().split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, "images of 60 px cannot stand in a mosaic of 112 px"),
        ({"student_resolution": 168}, r"its 112 px hold one image of 112 px; leave its mosaic out"),
        ({"student_resolution": 60}, r"its 112 px hold one image of 64 px; leave its mosaic out"),
    ],
)
def test_a_mosaic_that_does_not_fit_is_said_before_the_first_step(
    config: TrainConfig, start: Start, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(SizeError, match=message):
        start(with_mosaic(config, **changes))


def test_a_cache_keeps_no_mosaics(config: TrainConfig, tmp_path: Path) -> None:
    cached = replace(with_mosaic(config), cache=CacheConfig(folder=tmp_path))
    with pytest.raises(ConfigError, match="teacher sam: with mosaic its features change from step to step"):
        check_settings(cached, 1)
