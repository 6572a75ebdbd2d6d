"""What the scenes teachers are taught: targets against slow loops, losses against hand values."""

from __future__ import annotations

import pytest
import torch

from radio.scenes.language import caption
from radio.scenes.world import CLASSES, SHAPES, render
from radio.teachers.scenes import Clip, new_dense
from radio.teachers.scenes_sam import new_sam
from train.scenes_lessons import (
    ClipLesson,
    DenseLesson,
    SamLesson,
    _contents,
    _mask_loss,
    _mirrored,
    _tags,
    gather,
    lessons,
    shares,
)


@pytest.fixture(scope="module")
def scenes():
    return [render(index, seed=3) for index in range(6)]


@pytest.fixture(scope="module")
def lesson(scenes):
    return gather(scenes, tuple(caption(scene, index, seed=3) for index, scene in enumerate(scenes)))


def test_a_lesson_is_the_scenes_in_order_and_reproducible():
    one = list(lessons(60, 20, 8, 1, torch.Generator().manual_seed(4)))
    two = list(lessons(60, 20, 8, 1, torch.Generator().manual_seed(4)))
    assert len(one) == 2  # the rest, smaller than a batch, is left out
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images) and a.captions == b.captions
    labels = one[1].colours[:, 0] * len(SHAPES) + one[1].shapes[:, 0]
    assert labels.tolist() == [render(index, seed=1).label for index in range(68, 76)]


def test_mirroring_moves_pixels_masks_and_boxes_together(lesson):
    turned = _mirrored(lesson, torch.tensor([True, False] * 3))
    assert torch.equal(turned.images[1], lesson.images[1])
    assert torch.equal(turned.images[0], lesson.images[0].flip(-1))
    for row in range(6):
        for column in range(4):
            if turned.colours[row, column] < 0:
                continue
            ys, xs = torch.where(turned.instances[row] == column + 1)
            box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert turned.boxes[row, column].tolist() == box


def test_cells_and_tags_agree_with_counting_pixels(scenes, lesson):
    parts = shares(lesson, 8)
    colours = _contents(parts, lesson.colours, 6)
    tags = _tags(lesson, parts)
    for row, scene in enumerate(scenes):
        counted = torch.zeros(len(CLASSES))
        for number, item in enumerate(scene.objects, start=1):
            counted[item.colour * len(SHAPES) + item.shape] += int((scene.instances == number).sum())
        torch.testing.assert_close(tags[row], counted / counted.sum())
        cell = torch.from_numpy(scene.instances[24:36, 48:60].copy()).flatten()  # row 2, column 4 of 8 x 8
        wanted = torch.zeros(7)
        for number in cell.tolist():
            wanted[0 if number == 0 else scene.objects[number - 1].colour + 1] += 1 / 144
        torch.testing.assert_close(colours[row, 2 * 8 + 4], wanted)


def test_the_mask_loss_of_a_perfect_answer_is_almost_nothing_and_the_best_mask_counts():
    wanted = torch.zeros(1, 8, 8)
    wanted[0, 2:6, 2:6] = 1
    perfect, empty = 60 * wanted - 30, torch.full((1, 8, 8), -30.0)
    logits = torch.stack((empty, perfect, empty), dim=1)
    loss = _mask_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]), wanted, 1)
    assert float(loss.total) < 1e-5
    assert float(loss.watched["box"]) == 1.0
    nothing = _mask_loss(empty[:, None].expand(1, 3, 8, 8), torch.zeros(1, 3), wanted, 1)
    # focal: a quarter of the pixels at entropy 30, times 20; dice: 1 - 1 / (16 + 1)
    assert float(nothing.total) == pytest.approx(20 * 30 / 4 + 1 - 1 / 17, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "clip", "sam"])
def test_each_loss_falls_when_one_batch_is_repeated(kind, lesson):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = {
            "dense": lambda: DenseLesson(new_dense()),
            "clip": lambda: ClipLesson(Clip()),
            "sam": lambda: SamLesson(new_sam(), torch.Generator().manual_seed(0)),
        }[kind]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    totals = []
    for _ in range(8):
        loss = module(lesson, 0.0)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
        optimizer.step()
        totals.append(float(loss.total.detach()))
    assert totals[-1] < totals[0]


def test_another_image_of_the_same_class_is_no_negative(lesson):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ClipLesson(Clip())
    apart = torch.nn.functional.normalize(torch.eye(128)[:2], dim=1)
    scale = torch.tensor(10.0)
    alone = module._captions(apart, apart.flip(0), torch.tensor([5, 5]), scale)
    assert float(alone.detach()) == 0.0  # nothing is left to be told apart from
    wrong = module._captions(apart, apart.flip(0), torch.tensor([5, 6]), scale)
    assert float(wrong.detach()) == pytest.approx(10.0, abs=1e-3)


def test_the_regions_stop_counting_after_the_first_half(lesson):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ClipLesson(Clip())
    with torch.no_grad():
        assert float(module(lesson, 0.4).total) > float(module(lesson, 0.5).total)
