"""Shifted frames against teachers whose tokens are the mean colours of their patches."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radio.errors import ConfigError
from radio.ops import resize_features, resize_tokens
from radio.types import Features
from train.config import LossConfig
from train.losses import teacher_losses
from train.shift import (
    Frame,
    Frames,
    Input,
    Shift,
    Shifts,
    cut,
    draw_shifts,
    largest_shift,
    make_frames,
    overlap,
)

STD = 0.5
STUDENT = Input((96, 96), 16)


def mean_colours(images: Tensor, patch: int) -> Features:
    """Tokens that are the mean colours of the patches."""
    plane = F.avg_pool2d(images.double(), patch)
    tokens = plane.flatten(2).transpose(1, 2)
    return Features(tokens.mean(1), tokens, (plane.shape[2], plane.shape[3]))


def ramp(size: tuple[int, int]) -> Tensor:
    """An image [1, 3, h, w] of two ramps, down and right, and a plane of both."""
    y, x = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in size)
    down, right = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([down, right, (down + 2 * right) / 3]).unsqueeze(0)


def show(frame: Frame) -> Features:
    """What a model of mean colours sees of the ramp, which is drawn at the scale of its own canvas."""
    return mean_colours(cut(ramp(frame.canvas), frame), frame.input.patch)


def frames_of(student: Input, teacher: Input, own: Shift, other: Shift) -> Frames:
    return make_frames(STD, student, {"a": teacher}, Shifts(own, own, {"a": other}))


def test_draws_are_those_of_a_rounded_normal() -> None:
    counts: Counter[int] = Counter()
    for step in range(4000):
        shifts = draw_shifts(STD, ("a", "b"), 0, step)
        counts.update((*shifts.student, *shifts.average, *shifts.teachers["a"], *shifts.teachers["b"]))
    total = sum(counts.values())
    below = [0.5 * (1 + math.erf((place + 0.5) / STD / math.sqrt(2))) for place in range(3)]
    for patches in range(3):
        wanted = 2 * below[0] - 1 if patches == 0 else 2 * (below[patches] - below[patches - 1])
        found = sum(count for place, count in counts.items() if abs(place) == patches) / total
        assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted / total))
    assert {abs(place) for place in counts} == {0, 1, 2}
    assert below[0] * 2 - 1 == pytest.approx(0.683, abs=1e-3)


def test_a_draw_is_one_of_seed_step_and_model() -> None:
    assert draw_shifts(1.0, ("a",), 3, 7) == draw_shifts(1.0, ("a",), 3, 7)
    many = [draw_shifts(1.0, ("a",), seed, step) for seed, step in product(range(4), range(4))]
    assert len({(shifts.student, shifts.average, shifts.teachers["a"]) for shifts in many}) == len(many)
    assert sum(shifts.student != shifts.teachers["a"] for shifts in many) > len(many) // 2
    assert draw_shifts(0.0, ("a",), 0, 0) == Shifts((0, 0), (0, 0), {"a": (0, 0)})


def test_rare_shifts_are_cut_off() -> None:
    assert [largest_shift(std) for std in (0.1, 1 / 3, 0.5, 1.0)] == [1, 1, 2, 3]
    many = [draw_shifts(0.3, ("a",), 0, step).student for step in range(3000)]
    assert max(abs(place) for shift in many for place in shift) == 1


TEACHERS = {
    "the same": Input((96, 96), 16),
    "as many tokens": Input((84, 84), 14),
    "smaller patches": Input((98, 98), 14),
    "more pixels": Input((144, 144), 12),
    "larger patches": Input((160, 160), 32),
    "no square": Input((96, 112), 16),
}


@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=list(TEACHERS))
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-1, 1), (2, -2)])
def test_mean_colours_of_a_ramp_are_the_same_wherever_frames_overlap(teacher: Input, shift: Shift) -> None:
    std = 0.3 if min(teacher.grid) < 6 else STD
    if max(map(abs, shift)) > largest_shift(std):
        shift = (1, -1)
    down, right = shift
    shifts = Shifts(shift, shift, {"a": (-down, 1 if right == 0 else right)})
    frames = make_frames(std, STUDENT, {"a": teacher}, shifts)
    own, other = frames.student, frames.teachers["a"]
    of_student, of_teacher = overlap(own, other)
    student, target = (
        resize_features(show(frame), at) for frame, at in ((own, of_student), (other, of_teacher))
    )
    assert student.grid == target.grid == of_student.grid and student.tokens.shape[1] > 0
    torch.testing.assert_close(student.tokens, target.tokens, atol=1e-6, rtol=0)
    losses = teacher_losses(student, target, LossConfig(cosine=0.0, smooth_l1=1.0))
    assert float(losses.spatial) < 1e-12


@pytest.mark.parametrize("shift", [(0, 0), (1, -1), (2, 2)])
def test_a_canvas_resized_for_each_model_shows_them_the_same(shift: Shift) -> None:
    """Through the resize, whose kernel is cut off at the canvas's edges."""
    frames = frames_of(Input((96, 96), 16), Input((98, 98), 14), shift, (-1, 0))
    canvas = ramp((180, 180)).float()
    own, other = frames.student, frames.teachers["a"]
    at, there = overlap(own, other)
    student = resize_features(mean_colours(cut(canvas, own), 16), at)
    teacher = resize_features(mean_colours(cut(canvas, other), 14), there)
    torch.testing.assert_close(student.tokens, teacher.tokens, atol=1e-3, rtol=0)
    elsewhere = replace(other, shift=(0, 1))
    wrong = resize_features(mean_colours(cut(canvas, elsewhere), 14), there)
    assert (student.tokens - wrong.tokens).abs().max() > 0.03


def overlap_by_loop(coarse: Frame, fine: Frame) -> list[tuple[int, int]]:
    """The coarse tokens whose centres lie between those of fine ones, on the canvas."""

    def centres(frame: Frame, axis: int) -> list[float]:
        patch, side = frame.input.patch, frame.canvas[axis]
        return [(frame.corner[axis] + (i + 0.5) * patch) / side for i in range(frame.input.grid[axis])]

    inside = []
    for axis in range(2):
        known = centres(fine, axis)
        inside.append(
            [i for i, at in enumerate(centres(coarse, axis)) if known[0] - 1e-9 <= at <= known[-1] + 1e-9]
        )
    return list(product(*inside))


@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=list(TEACHERS))
def test_every_pair_of_shifts_leaves_what_the_loop_finds(teacher: Input) -> None:
    std = 0.3 if min(teacher.grid) < 6 else STD
    most = largest_shift(std)
    for own, other in product(range(-most, most + 1), repeat=2):
        frames = make_frames(std, STUDENT, {"a": teacher}, Shifts((own, 0), (0, 0), {"a": (other, -own)}))
        mine, theirs = frames.student, frames.teachers["a"]
        for frame in (mine, theirs):
            assert all(corner >= 0 for corner in frame.corner)
            ends = (c + side for c, side in zip(frame.corner, frame.input.size, strict=True))
            assert all(end <= side for end, side in zip(ends, frame.canvas, strict=True))
        of_student, of_teacher = overlap(mine, theirs)
        at_teacher = math.prod(teacher.grid) <= math.prod(STUDENT.grid)
        coarse, fine = (theirs, mine) if at_teacher else (mine, theirs)
        indices, positions = (of_teacher, of_student) if at_teacher else (of_student, of_teacher)
        rows, columns = (range(int(at.first), int(at.first) + at.length) for at in indices)
        assert indices.rows.are_tokens and indices.columns.are_tokens
        assert list(product(rows, columns)) == overlap_by_loop(coarse, fine)
        for at, side in zip(positions, fine.input.grid, strict=True):
            assert at.first >= 0 and at.first + (at.length - 1) * at.step <= side - 1


def test_equal_frames_share_whole_tokens() -> None:
    """Of 16 and of 14 px: as many tokens on the same share of the canvas, so nothing is interpolated."""
    for teacher in (TEACHERS["the same"], TEACHERS["as many tokens"]):
        frames = frames_of(STUDENT, teacher, (1, 0), (-1, 0))
        both = overlap(frames.student, frames.teachers["a"])
        assert all(at.are_tokens for sampling in both for at in sampling)
        assert [at.grid for at in both] == [(4, 6), (4, 6)]
        assert [int(at.rows.first) for at in both] == [0, 2]
        still = frames_of(STUDENT, teacher, (1, 2), (1, 2))
        pair = (still.student, still.teachers["a"])
        for frame, at in zip(pair, overlap(*pair), strict=True):
            features = show(frame)
            assert resize_features(features, at).tokens is features.tokens


def test_without_a_shift_a_coarser_teacher_gets_the_resized_map() -> None:
    tokens = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0))
    teacher = Input((160, 160), 40)
    frames = make_frames(0.3, STUDENT, {"a": teacher}, draw_shifts(0.0, ("a",), 0, 0))
    at, there = overlap(frames.student, frames.teachers["a"])
    assert there.grid == teacher.grid
    sampled = resize_features(Features(tokens[:, 0], tokens, (6, 6)), at).tokens
    torch.testing.assert_close(sampled, resize_tokens(tokens, (6, 6), teacher.grid))


@pytest.mark.parametrize(
    ("std", "student", "teacher", "message"),
    [
        (
            0.5,
            (96, 96),
            (64, 64),
            r"teacher a has 4 x 4 patches, .* up to 2 .* give at most 0\.3, or give a larger",
        ),
        (1.0, (96, 96), (160, 160), r"the student has 6 x 6 patches, .* up to 3 .* at most 0\.6,"),
        (0.1, (96, 96), (16, 96), r"teacher a has 1 x 6 patches, .* leave it out, or give a larger"),
    ],
)
def test_frames_without_anything_in_common_are_one_error(
    std: float, student: tuple[int, int], teacher: tuple[int, int], message: str
) -> None:
    shifts = draw_shifts(std, ("a",), 0, 0)
    with pytest.raises(ConfigError, match=message):
        make_frames(std, Input(student, 16), {"a": Input(teacher, 16)}, shifts)
