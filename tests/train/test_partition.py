"""Every teacher has ranks, every image of a step one place, and what cannot be shared is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import pytest
from hypothesis import given, strategies
from hypothesis import settings as effort

from radio.errors import ConfigError
from train.config import TeacherConfig, TrainConfig
from train.groups import (
    Partition,
    TeacherGroup,
    best_split,
    make_partition,
    mean_slowest,
    teacher_groups,
)
from train.recipes import recipes

Sizes = tuple[tuple[int, int], ...]  # (images a step, student's side) of each teacher


def settings(sizes: Sizes, **changes: object) -> TrainConfig:
    config = TrainConfig(
        recipe="test",
        student="vit-tiny12",
        teachers=tuple(
            TeacherConfig(name=f"t{i}", model="tiny:clip", batch_size=size, student_resolution=side)
            for i, (size, side) in enumerate(sizes)
        ),
        resolution=48,
        steps=1,
        batch_size=8,
        out=Path("run"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def check_rows(partition: Partition) -> None:
    """Whether the ranks' images are the step's, each once for the group that it belongs to."""
    dealt = []
    for group in partition.groups:
        rows = [row for rank in group.ranks for row in partition.rows(group, rank)]
        assert rows == list(range(group.first, group.first + group.batch_size))
        assert all(len(partition.rows(group, rank)) == group.share for rank in group.ranks)
        dealt += rows
    assert dealt == list(range(partition.batch_size))


WORLDS = range(1, 41)
MANY: tuple[Sizes, ...] = (
    ((16, 48), (16, 48), (4, 168)),
    ((12, 48), (18, 96), (30, 96)),
    ((24, 48), (24, 96)),
    ((7, 48), (5, 48), (7, 96)),
    ((32, 48),),
)


@pytest.mark.parametrize("sizes", MANY)
@pytest.mark.parametrize("kind", ["dedicated", "shared"])
def test_every_world_is_dealt_out_or_refused(sizes: Sizes, kind: str) -> None:
    config = settings(sizes, teacher_placement=kind)
    groups = teacher_groups(config)
    assert {(g.batch_size, *g.sides) for g in groups} == set(sizes)
    assert sorted(name for g in groups for name in g.teachers) == [t.name for t in config.teachers]
    batches = [g.batch_size for g in groups]
    for world in WORLDS:
        turns = kind == "shared" or world == 1
        wanted = [world * len(groups)] if turns else [world]
        counts = [[world]] * len(groups) if turns else [range(1, world + 1)] * len(groups)
        possible = [
            split
            for split in product(*counts)
            if sum(split) in wanted and not any(b % n for b, n in zip(batches, split, strict=True))
        ]
        if not possible:
            with pytest.raises(
                ConfigError,
                match=rf"{world} ranks cannot be|cannot be .* {world} ranks|--(ranks-per|teacher-pl)",
            ):
                make_partition(config, world)
            continue
        partition = make_partition(config, world)
        split = tuple(len(g.ranks) for g in partition.groups)
        assert split in possible
        assert partition.batch_size == sum(batches)
        assert all(partition.of(rank) for rank in range(world))
        assert [g for g in partition.groups if 0 in g.ranks] == list(partition.of(0))
        if not turns:
            assert [rank for g in partition.groups for rank in g.ranks] == list(range(world))
            loads = [
                max(g.batch_size / n * g.sides[0] ** 2 for g, n in zip(groups, s, strict=True))
                for s in possible
            ]
            assert max(g.share * g.sides[0] ** 2 for g in partition.groups) == min(loads)
        check_rows(partition)


def test_the_papers_split() -> None:
    partition = make_partition(recipes["paper-h14"](), 64)
    assert [(g.name, *g.sides, len(g.ranks), g.share) for g in partition.groups] == [
        ("clip+dino", 224, 32, 32),
        ("sam", 1008, 32, 4),
    ]
    assert partition.batch_size == 1152
    assert partition.rows(partition.groups[1], 63) == range(1148, 1152)
    assert partition.of(31) == partition.groups[:1]
    check_rows(partition)


def test_one_process_takes_turns() -> None:
    partition = make_partition(recipes["demo"](), 1)
    assert [(g.name, g.batch_size, g.first) for g in partition.groups] == [
        ("clip+dense", 24, 0),
        ("sam", 4, 24),
    ]
    assert partition.of(0) == partition.groups
    assert partition.rows(partition.groups[1], 0) == range(24, 28)


def test_dear_images_get_more_ranks() -> None:
    groups = teacher_groups(settings(((24, 48), (24, 96))))
    assert best_split(groups, 12, [(1.0,), (1.0,)]) == (6, 6)
    assert best_split(groups, 12, [(1.0,), (2.0,)]) == (4, 8)
    assert best_split(groups, 12, [(5.0,), (1.0,)]) == (8, 4)
    # the third group decides nothing: 24 a rank in any case; then the second ones are made even
    three = teacher_groups(settings(((24, 48), (24, 96), (23, 48))))
    assert best_split(three, 9, [(1.0,), (1.0,), (2.0,)]) == (4, 4, 1)


def test_a_split_that_is_asked_for() -> None:
    partition = make_partition(settings(((24, 48), (24, 96)), ranks_per_group=(8, 4)), 12)
    assert [g.ranks for g in partition.groups] == [tuple(range(8)), tuple(range(8, 12))]
    check_rows(partition)


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"ranks_per_group": (8, 4, 2)},
            14,
            r"--ranks-per-group 8 4 2 is for 3 groups; this run has 2: t0, t1",
        ),
        ({"ranks_per_group": (8, 4)}, 10, r"--ranks-per-group 8 4 is for 12 ranks, and there are 10"),
        ({"ranks_per_group": (8, 4)}, 1, r"--ranks-per-group 8 4 is for 12 ranks, and there are 1"),
        (
            {"ranks_per_group": (7, 5)},
            12,
            r"--ranks-per-group 7 5: a batch of 24 cannot be shared evenly by 7 ranks \(t0\)",
        ),
        ({"ranks_per_group": (12, 0)}, 12, r"cannot be shared evenly by 0 ranks \(t1\)"),
        (
            {"ranks_per_group": (8, 4), "teacher_placement": "shared"},
            12,
            r"--ranks-per-group 8 4 deals ranks to groups, and in turns",
        ),
        ({"teacher_placement": "shared"}, 5, r"a batch of 24 cannot be shared evenly by 5 ranks \(t0\)"),
    ],
)
def test_splits_that_cannot_be(changes: dict[str, object], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_partition(settings(((24, 48), (24, 96)), **changes), world)


def test_the_reason_why_ranks_cannot_be_shared() -> None:
    paper = recipes["paper-h14"]()
    reason = (
        r"7 ranks cannot be shared: .* of 1024 \(clip\+dino\) and 128 \(sam\) add up to 7; start 6 or 8 ranks"
    )
    with pytest.raises(ConfigError, match=reason):
        make_partition(paper, 7)
    with pytest.raises(
        ConfigError, match=r"3 groups of teachers \(t0, t1, t2\) .* --teacher-placement shared"
    ):
        make_partition(settings(((8, 48), (8, 96), (4, 48))), 2)
    with pytest.raises(
        ConfigError, match=r"a batch of 1024 cannot be shared evenly by 3 ranks \(clip\+dino\)"
    ):
        make_partition(recipes["paper-b14"](), 3)
    with pytest.raises(ConfigError, match="teacher t0 cannot see 0 images a step; give 1 or more"):
        teacher_groups(settings(((0, 48),)))


@given(
    sizes=strategies.lists(strategies.integers(1, 24), min_size=1, max_size=3),
    sides=strategies.lists(strategies.integers(1, 3), min_size=3, max_size=3),
    world=strategies.integers(1, 16),
    seed=strategies.integers(0, 5),
)
@effort(max_examples=100, deadline=None)
def test_the_best_split_is_the_best_of_all(sizes: list[int], sides: list[int], world: int, seed: int) -> None:
    draw = random.Random(seed)
    groups = [
        TeacherGroup(
            teachers=(f"t{place}",),
            adaptors=(f"t{place}",),
            sides=(48, 96, 144)[:count],
            weights=(1.0, 2.0, 1.0)[:count],
            batch_size=size,
            first=0,
            ranks=(),
        )
        for place, (size, count) in enumerate(zip(sizes, sides, strict=False))
    ]
    costs = [[float(draw.choice((1, 2, 4, 8))) for _ in group.sides] for group in groups]

    def loads(split: tuple[int, ...]) -> list[list[float]]:
        return [
            [group.batch_size / n * cost for cost in each]
            for group, n, each in zip(groups, split, costs, strict=True)
        ]

    def order(split: tuple[int, ...]) -> list[float]:
        """Mean of the slowest over all that can be drawn; without draws, the second slowest and so on too."""
        if all(len(group.sides) == 1 for group in groups):
            return sorted((load for (load,) in loads(split)), reverse=True)
        drawn = product(*(zip(*pair, strict=True) for pair in zip(loads(split), shares, strict=True)))
        return [sum(prod(share for _, share in each) * max(load for load, _ in each) for each in drawn)]

    shares = [list(group.side_shares.values()) for group in groups]
    ways = [
        split
        for split in product(range(1, world + 1), repeat=len(sizes))
        if sum(split) == world and all(s % n == 0 for s, n in zip(sizes, split, strict=True))
    ]
    if ways:
        best = best_split(groups, world, costs)
        assert best in ways
        assert order(best) == pytest.approx(min(map(order, ways)), rel=1e-9)
        assert mean_slowest(groups, loads(best)) == pytest.approx(order(best)[0], rel=1e-9)
    else:
        with pytest.raises(ConfigError):
            best_split(groups, world, costs)


def test_more_ranks_than_anybody_has_are_judged_at_once() -> None:
    many = teacher_groups(settings(((8, 48), (4, 96))))
    with pytest.raises(ConfigError, match=r"cannot be shared: .* add up to 65536; start 12 ranks"):
        best_split(many, 65536, [(1.0,), (1.0,)])
    large = teacher_groups(settings(tuple((720720, 48 + 12 * place) for place in range(4))))
    assert sum(best_split(large, 4096, [(1.0,), (1.0,), (2.0,), (3.0,)])) == 4096
    drawn = [replace(group, sides=(48, 96, 144), weights=()) for group in large]
    assert sum(best_split(drawn, 4096, [(1.0, 4.0, 9.0)] * 4)) == 4096
