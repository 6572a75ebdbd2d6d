"""The scenes teachers are made again alike: targets and losses by hand, scores, and the shipped files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from radio.checkpoint import load
from radio.errors import CheckpointError, ConfigError
from radio.scenes.drawing import SHAPES
from radio.scenes.language import caption
from radio.scenes.world import CLASSES, render
from radio.teachers.scenes import NAMES, Clip, new_dense, new_sam, scenes_sam, scenes_teacher, weights_file
from tools.scene_teachers.losses import (
    ClipLoss,
    DenseLoss,
    SamLoss,
    cell_contents,
    cell_shares,
    class_shares,
    collate,
    mask_loss,
    mirror,
    scene_batches,
)
from tools.scene_teachers.scores import FULL, QUICK, Protocol, box_miou, filled, iou, knn, score, summaries
from tools.scene_teachers.train import Schedule, TeachersConfig, main, train_teachers

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def scenes():
    return [render(index, seed=3) for index in range(6)]


@pytest.fixture(scope="module")
def batch(scenes):
    return collate(scenes, [caption(scene, index, seed=3) for index, scene in enumerate(scenes)])


def test_a_lesson_is_the_scenes_in_order_and_reproducible():
    one = list(scene_batches(60, 20, 8, 1, torch.Generator().manual_seed(4)))
    two = list(scene_batches(60, 20, 8, 1, torch.Generator().manual_seed(4)))
    assert len(one) == 2  # the rest, smaller than a batch, is left out
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images) and a.captions == b.captions
    labels = one[1].colours[:, 0] * len(SHAPES) + one[1].shapes[:, 0]
    assert labels.tolist() == [render(index, seed=1).label for index in range(68, 76)]


def test_mirroring_moves_pixels_masks_and_boxes_together(batch):
    turned = mirror(batch, torch.tensor([True, False] * 3))
    assert torch.equal(turned.images[1], batch.images[1])
    assert torch.equal(turned.images[0], batch.images[0].flip(-1))
    for row in range(6):
        for column in range(4):
            if turned.colours[row, column] < 0:
                continue
            ys, xs = torch.where(turned.instances[row] == column + 1)
            box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            assert turned.boxes[row, column].tolist() == box


def test_cells_and_tags_agree_with_counting_pixels(scenes, batch):
    parts = cell_shares(batch, 8)
    colours = cell_contents(parts, batch.colours, 6)
    tags = class_shares(parts, batch)
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
    loss = mask_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]), wanted, 1)
    assert float(loss.total) < 1e-5
    assert float(loss.accuracies["box"]) == 1.0
    nothing = mask_loss(empty[:, None].expand(1, 3, 8, 8), torch.zeros(1, 3), wanted, 1)
    # focal: a quarter of the pixels at entropy 30, times 20; dice: 1 - 1 / (16 + 1)
    assert float(nothing.total) == pytest.approx(20 * 30 / 4 + 1 - 1 / 17, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "clip", "sam"])
def test_each_loss_falls_when_one_batch_is_repeated(kind, batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = {
            "dense": lambda: DenseLoss(new_dense()),
            "clip": lambda: ClipLoss(Clip()),
            "sam": lambda: SamLoss(new_sam(), torch.Generator().manual_seed(0)),
        }[kind]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    totals = []
    for _ in range(8):
        loss = module(batch, 0.0)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.parameters())
        optimizer.step()
        totals.append(float(loss.total.detach()))
    assert totals[-1] < totals[0]


def test_another_image_of_the_same_class_is_no_negative(batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ClipLoss(Clip())
    apart = torch.nn.functional.normalize(torch.eye(128)[:2], dim=1)
    scale = torch.tensor(10.0)
    alone = module.caption_loss(apart, apart.flip(0), torch.tensor([5, 5]), scale)
    assert float(alone.detach()) == 0.0  # nothing is left to be told apart from
    wrong = module.caption_loss(apart, apart.flip(0), torch.tensor([5, 6]), scale)
    assert float(wrong.detach()) == pytest.approx(10.0, abs=1e-3)


def test_the_regions_stop_counting_after_the_first_half(batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ClipLoss(Clip())
    with torch.no_grad():
        assert float(module(batch, 0.4).total) > float(module(batch, 0.5).total)


def test_knn_votes_like_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=generator), torch.randn(9, 8, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    found = knn(bank, labels, queries, k=7)
    for row, query in enumerate(queries):
        cosines = [float(query @ other / query.norm() / other.norm()) for other in bank]
        votes = [0.0] * 4
        for place in sorted(range(50), key=lambda i: -cosines[i])[:7]:
            votes[int(labels[place])] += math.exp(cosines[place] / 0.07)
        assert int(found[row]) == votes.index(max(votes))


def test_filled_boxes_and_overlap_by_hand():
    masks = filled(torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 1.0, 4.0, 3.0]]))
    assert masks[0].sum() == 8 and masks[0][:2, :4].all()
    assert float(iou(masks[:1], masks[1:])) == pytest.approx(2 / 10)


def test_summaries_come_in_the_order_of_the_scenes():
    class Mean:
        native_size = (96, 96)

        def __call__(self, images):
            from radio.types import Features

            return Features(images.mean(dim=(2, 3)), images.flatten(2), (96, 96))

    found, labels = summaries(Mean(), 103, "val")
    assert found.shape == (103, 3) and labels.shape == (103,)
    again, _ = summaries(Mean(), 5, "val")
    torch.testing.assert_close(found[:5], again)


_TINY = Schedule(samples=16, batch=8, lr=1e-3)
_GLIMPSE = Protocol(bank=60, queries=10, sam_scenes=2)


def _settings(out, *only):
    return TeachersConfig(out=out, only=only or NAMES, dense=_TINY, clip=_TINY, sam=_TINY)


@pytest.fixture
def glimpse(monkeypatch):
    """Scores on a few scenes, so that a whole run takes a second."""
    monkeypatch.setattr("tools.scene_teachers.train.FULL", _GLIMPSE)
    monkeypatch.setattr("tools.scene_teachers.train.QUICK", _GLIMPSE)


@pytest.mark.usefixtures("glimpse")
def test_the_same_settings_give_the_same_weights_and_leave_the_global_generator_alone(tmp_path):
    state = torch.get_rng_state()
    quiet = Console(file=io.StringIO())
    first = [load(path) for path in train_teachers(_settings(tmp_path / "a"), quiet)]
    second = [load(path) for path in train_teachers(_settings(tmp_path / "b"), quiet)]
    for one, other in zip(first, second, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items())
        assert one.metadata["samples"] == 16
        assert one.metadata["scores"] == other.metadata["scores"]
    assert torch.equal(torch.get_rng_state(), state)
    assert "scenes:sam" in quiet.file.getvalue()


@pytest.mark.usefixtures("glimpse")
def test_what_is_written_is_what_was_scored(tmp_path):
    train_teachers(_settings(tmp_path, "dense"), QUIET)
    metadata = load(weights_file("dense", tmp_path)).metadata
    assert score(scenes_teacher("dense", tmp_path), _GLIMPSE)["knn"] == pytest.approx(
        metadata["scores"]["full"]["knn"], abs=0.01
    )


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean dense"):
        train_teachers(TeachersConfig(out=tmp_path, only=("dens",)), QUIET)
    with pytest.raises(ConfigError, match="less than one batch of 8"):
        train_teachers(
            TeachersConfig(out=tmp_path, only=("dense",), dense=Schedule(samples=7, batch=8, lr=1e-3)), QUIET
        )
    with pytest.raises(ConfigError, match=r"--dense\.batch: 0 is out of bounds"):
        train_teachers(
            TeachersConfig(out=tmp_path, only=("dense",), dense=Schedule(samples=7, batch=0, lr=1e-3)), QUIET
        )
    with pytest.raises(ConfigError, match="--threads: 0 is out of bounds"):
        train_teachers(TeachersConfig(out=tmp_path, threads=0), QUIET)
    with pytest.raises(CheckpointError, match=r"scenes_dense\.safetensors: no such checkpoint"):
        train_teachers(_settings(tmp_path, "clip"), QUIET)


def _measured(name, protocol):
    return (
        box_miou(scenes_sam(), protocol.sam_scenes)
        if name == "sam"
        else score(scenes_teacher(name), protocol)
    )


# Half a point: other processors round otherwise, and a score is a count of some hundred scenes.
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_reach_the_quick_scores_of_their_cards(name):
    assert _measured(name, QUICK) == pytest.approx(
        load(weights_file(name)).metadata["scores"]["quick"], abs=0.51
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_reach_the_full_scores_of_their_cards(name):
    assert _measured(name, FULL) == pytest.approx(
        load(weights_file(name)).metadata["scores"]["full"], abs=0.51
    )


def test_a_list_without_teachers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--only names no teacher; leave it out, or give some of clip, dense"
    ):
        train_teachers(TeachersConfig(out=tmp_path / "out", only=()), QUIET)
    assert not (tmp_path / "out").exists()


def test_the_command_reports_an_error_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--only", "sam", "--sam.samples", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: 7 samples for scenes:sam are less than one batch of 32")
