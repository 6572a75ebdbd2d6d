"""Several resolutions of the student, and one teacher in several groups, against runs made by hand."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from radio import checkpoint
from radio.dist import Ranks
from radio.errors import ConfigError
from train.config import LossConfig, NormaliseConfig, PlanOptions, SidesConfig, StageConfig, TrainConfig
from train.data.loader import to_images
from train.groups import make_partition, student_sides, teacher_groups
from train.plan import make_plan
from train.setup import check_settings, load_teachers, teacher_sizes
from train.stages import split_stages

from .conftest import CPU, TEACHERS, Start, read_records, same_weights, untimed
from .ranks import on_ranks
from .test_parallel import begin, check_alike, trained

CLIP, DENSE, SAM = TEACHERS
SIDES = SidesConfig(sides=(48, 72), weights=(1.0, 3.0))
# every image of four at one of two sides with all teachers, and two more images at 96 px with clip and sam
HIGH = (
    replace(CLIP, name="clip-high", adaptor="clip", student_resolution=96, batch_size=2),
    replace(SAM, name="sam-high", adaptor="sam", student_resolution=96, batch_size=2),
)


@pytest.fixture
def mixed(config: TrainConfig) -> TrainConfig:
    """Two groups that share adaptors, the first at two sides."""
    return replace(
        config,
        teachers=(*TEACHERS, *HIGH),
        resolutions=SIDES,
        steps=5,
        save_every=2,
        ema=0.8,
        optim=replace(config.optim, lr=1e-4),
    )


def test_a_side_is_drawn_as_often_as_its_weight_says(config: TrainConfig) -> None:
    (group,) = teacher_groups(replace(config, resolutions=SIDES))
    assert group.side_shares == {48: 0.25, 72: 0.75}
    counts = Counter(group.side_at(0, step) for step in range(2000))
    assert abs(counts[72] / 2000 - 0.75) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert [group.side_at(1, s) for s in range(50)] != [group.side_at(0, s) for s in range(50)]


def test_all_ranks_draw_the_same_and_groups_by_themselves(mixed: TrainConfig) -> None:
    mixed = replace(
        mixed, teachers=(CLIP, replace(SAM, batch_size=2)), resolutions=SidesConfig(sides=(48, 96))
    )
    draws = []
    for world in (1, 2, 4):
        partition = make_partition(
            replace(mixed, teacher_placement="shared" if world == 1 else "dedicated"), world
        )
        draws.append([tuple(g.side_at(0, step) for g in partition.groups) for step in range(200)])
    assert draws[0] == draws[1] == draws[2]
    assert set(Counter(draws[0])) == {(a, b) for a in (48, 96) for b in (48, 96)}


@pytest.mark.parametrize(
    "own", [{"student_resolution": 48}, {"student_resolutions": SidesConfig(sides=(48, 60))}]
)
def test_sides_that_no_teacher_sees(config: TrainConfig, own: dict[str, Any]) -> None:
    config = replace(config, teachers=tuple(replace(teacher, **own) for teacher in TEACHERS))
    check_settings(config, 1)
    with pytest.raises(ConfigError, match=r"--resolutions.sides has no effect where every teacher has"):
        check_settings(replace(config, resolutions=SIDES), 1)
    one = replace(config, resolutions=SIDES, teachers=(CLIP, *config.teachers[1:]))
    check_settings(one, 1)
    ended = StageConfig(steps=2, teachers=config.teachers, resolution=48)
    check_settings(split_stages(replace(one, stages=(ended,)))[1].config, 1)


@pytest.mark.parametrize(
    ("changes", "teacher", "message"),
    [
        ({"resolutions": SidesConfig(sides=(48, 48))}, {}, "--resolutions.sides 48 48: one is given twice"),
        (
            {"resolutions": SidesConfig(sides=(48, 72), weights=(1.0,))},
            {},
            "--resolutions: 1 weights for 2 sides; give a weight for every side, or none",
        ),
        ({"resolutions": SidesConfig(weights=(1.0,))}, {}, "--resolutions: 1 weights for 0 sides"),
        (
            {},
            {"student_resolutions": SIDES, "student_resolution": 48},
            "teacher clip: student-resolutions has no effect beside student-resolution",
        ),
        ({}, {"adaptor": "sam"}, "teacher clip is tiny:clip, and its adaptor 'sam' is not that of a teacher"),
        ({}, {"adaptor": "clip"}, "teacher clip has an adaptor of its own anyway; leave adaptor out"),
        ({}, {"adaptor": "none"}, "leave adaptor out, or name one of those"),
        ({}, {"mosaic": True, "same_grid": True}, "teacher clip: same-grid has no effect on mosaics"),
    ],
)
def test_settings_that_contradict_each_other(
    config: TrainConfig, changes: dict[str, Any], teacher: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(replace(config, teachers=(replace(CLIP, **teacher), *TEACHERS[1:]), **changes), 1)


def test_an_adaptor_is_named_by_its_owner(config: TrainConfig) -> None:
    chain = (CLIP, HIGH[0], replace(HIGH[0], name="clip-higher", adaptor="clip-high", student_resolution=144))
    with pytest.raises(ConfigError, match=r"teacher clip-higher: 'clip-high' has no .* give adaptor clip$"):
        check_settings(replace(config, teachers=chain), 1)


def test_what_each_teacher_sees(config: TrainConfig) -> None:
    """clip: patches of 10 px; as many of them as the student has of 12 px, up to its resolution."""
    chosen = replace(
        config,
        resolutions=SidesConfig(sides=(36, 48, 96)),
        teachers=(replace(CLIP, same_grid=True, resolution=50), replace(DENSE, student_resolution=60)),
    )
    sizes = teacher_sizes(chosen, load_teachers(chosen, CPU))
    assert sizes == {"clip": {36: (30, 30), 48: (40, 40), 96: (50, 50)}, "dense": {60: (64, 64)}}
    assert student_sides(chosen.teachers[0], chosen) == ((36, 48, 96), ())
    partition = make_partition(chosen, 1)
    assert partition.crop_sides(sizes) == ({36: 36, 48: 48, 96: 96}, {60: 64})


def test_a_stage_with_one_resolution_ends_the_several_before(config: TrainConfig) -> None:
    stages = (
        StageConfig(steps=2, batch_size=2),
        StageConfig(steps=2, resolution=60),
        StageConfig(steps=2, resolutions=SIDES),
    )
    parts = split_stages(replace(config, resolutions=SIDES, stages=stages))
    assert [part.config.resolutions for part in parts] == [SIDES, SIDES, SidesConfig(), SIDES]


def test_the_student_sees_the_side_that_is_drawn(config: TrainConfig, start: Start) -> None:
    run = start(config, resolutions=SIDES, steps=6)
    (group,) = run.groups
    seen = [batch.groups[0].images.shape[-1] for batch in run.batches()]
    assert seen == [group.side_at(config.seed, step) for step in range(6)] and len(set(seen)) == 2
    # the crops are as large as the largest model needs them: sam's 108 px
    assert {len(rows[0].pixels[0, 0]) for rows in run.loader.rows(range(6))} == {108}


def test_the_crops_are_no_larger_than_a_step_needs(config: TrainConfig, start: Start) -> None:
    run = start(config, teachers=TEACHERS[:1], resolutions=SidesConfig(sides=(48, 96)), steps=6)
    (group,) = run.groups
    for step, (rows,) in enumerate(run.loader.rows(range(6))):
        side = max(group.side_at(config.seed, step), 50)
        assert rows.pixels.shape[-1] == side
        assert to_images(rows.pixels, CPU).max() <= 1


def test_a_run_of_a_mixture_goes_on_exactly(mixed: TrainConfig, start: Start, tmp_path: Path) -> None:
    start(mixed, out=tmp_path / "whole").train()
    first = start(mixed, out=tmp_path / "parts")
    asked = iter([False, False, True])
    first.stop.agreed = lambda: next(asked)  # type: ignore[method-assign]
    first.train()
    assert first.stopped and first.step == 3
    start(mixed, out=tmp_path / "parts").train()
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert same_weights(tmp_path / "parts", tmp_path / "whole")
    saved = checkpoint.load(tmp_path / "whole" / "ckpt.pt")
    assert {name.split(".")[1] for name in saved.tensors if name.startswith("adaptors.")} == {
        "clip",
        "dense",
        "sam",
    }
    entries = saved.metadata["teachers"]
    assert [entry["name"] for entry in entries] == ["clip", "dense", "sam"]
    assert entries[0]["student_resolution"] == 96
    assert entries[1]["student_resolution"] == 72


def test_one_adaptor_learns_from_both_groups(mixed: TrainConfig, start: Start) -> None:
    """Its gradient is the sum of those of two runs that have one of the groups each."""
    mixed = replace(mixed, resolutions=SidesConfig())
    run = start(mixed)
    batch = next(iter(run.batches()))
    run.compute_gradients(batch)
    whole = {key: p.grad for key, p in run.model.named_parameters()}
    key = next(key for key in whole if key.startswith("adaptors.clip.spatial") and key.endswith("weight"))
    parts = []
    for group in batch.groups:
        run.compute_gradients(batch._replace(groups=(group,)))
        grad = dict(run.model.named_parameters())[key].grad
        assert grad is not None
        parts.append(grad.clone())
    torch.testing.assert_close(whole[key], parts[0] + parts[1], atol=1e-7, rtol=1e-5)
    assert run.teachers["clip-high"] is run.teachers["clip"]  # loaded once


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": LossConfig(summary="angle"), "normalise": NormaliseConfig(kind="phi-s", steps=2)},
        {"loss": LossConfig(summary="angle", dispersion="running"), "balance": "adaloss"},
    ],
)
def test_groups_that_share_adaptors_on_their_own_ranks(
    mixed: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if changes.get("balance"):
        changes = {**changes, "balance": replace(mixed.balance, kind="adaloss")}
    mixed = replace(mixed, **changes)
    trained(mixed, Ranks(), tmp_path / "one")

    def work(group: Ranks) -> list[str]:
        trained(mixed, group, tmp_path / "three", ranks_per_group=(2, 1))
        run = begin(mixed, group, out=tmp_path / "again", ranks_per_group=(2, 1))
        return sorted(run.model.adaptors)

    held = on_ranks(3, tmp_path / "ranks", work)
    assert held == [["clip", "dense", "sam"]] * 3
    check_alike(tmp_path / "one", tmp_path / "three")


def test_the_plan_of_a_mixture(config: TrainConfig) -> None:
    """Mean operations and the most memory of the plans of each side; steps wait for the slowest group."""
    config = replace(config, teachers=(CLIP, replace(SAM, batch_size=2)), batch_size=4)
    single = {side: make_plan(replace(config, resolution=side), PlanOptions(world=2)) for side in (48, 72)}
    plan = make_plan(replace(config, resolutions=SIDES), PlanOptions(world=2))
    for name in ("clip", "sam"):
        flops = {side: each.costs[name].flops for side, each in single.items()}
        assert plan.flops_at[name] == flops
        assert plan.costs[name].flops == pytest.approx(0.25 * flops[48] + 0.75 * flops[72], abs=2)
        assert plan.costs[name].activations == single[72].costs[name].activations
    waits = 0.0
    for clip, p in ((48, 0.25), (72, 0.75)):
        for sam, q in ((48, 0.25), (72, 0.75)):
            waits += p * q * max(single[clip].seconds["clip"], single[sam].seconds["sam"])
    assert plan.step_seconds == pytest.approx(waits, rel=1e-6)
    assert plan.kinds[0].memory.peak == single[72].kinds[0].memory.peak


def test_the_plan_of_shared_adaptors(mixed: TrainConfig) -> None:
    """Ranks of the higher group hold the adaptors of the lower one too; a teacher is held once."""
    plan = make_plan(replace(mixed, ranks_per_group=(2, 1)), PlanOptions(world=3))
    low, high = plan.kinds
    assert low.memory.weights == high.memory.weights
    alone = make_plan(replace(mixed, teachers=(*TEACHERS, HIGH[0])), PlanOptions(world=1))
    without = make_plan(replace(mixed, teachers=TEACHERS), PlanOptions(world=1))
    assert alone.kinds[0].memory.teachers == without.kinds[0].memory.teachers


def test_losses_are_logged_for_every_teacher_of_every_group(mixed: TrainConfig, start: Start) -> None:
    start(mixed, steps=2, log_every=1).train()
    record = read_records(mixed.out)[-1]
    assert {"clip/spatial", "clip-high/spatial", "sam-high/spatial"} <= record.keys()
