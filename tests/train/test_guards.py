"""Steps left out, against a count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from radio.dist import Group
from radio.errors import RadioError
from train.guards import NonFiniteMonitor, Skipped

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def see(guard: NonFiniteMonitor, fine: bool, clip: float = 1.0, sam: float = 1.0) -> None:
    parts: list[dict[str, Tensor]] = [
        {"clip/spatial": torch.tensor(clip)},
        {"sam/spatial": torch.tensor(sam)},
    ]
    guard.update(torch.tensor(fine), parts)


def test_steps_and_names_since_the_last_reading() -> None:
    guard = NonFiniteMonitor(CPU)
    see(guard, True)
    see(guard, False, clip=NAN)
    see(guard, False)
    see(guard, True)
    assert guard.read(Group(), 4, 3) == Skipped(2, 2, ("clip/spatial",))
    assert guard.read(Group(), 4, 3) == Skipped(2, 0, ())
    see(guard, False, clip=INF, sam=-INF)
    found = guard.read(Group(), 5, 3)
    assert found == Skipped(3, 1, ("clip/spatial", "sam/spatial"))
    assert found.describe() == "1 step was left out, not finite: clip/spatial, sam/spatial"
    see(guard, False)
    assert guard.read(Group(), 6, 3).describe() == (
        "1 step was left out, not finite: a gradient of finite losses"
    )


@pytest.mark.parametrize("readings", [(), (2,), (1, 2)])
def test_so_many_in_a_row_are_too_many(readings: tuple[int, ...]) -> None:
    """Whether or not some of them were read of before."""
    guard = NonFiniteMonitor(CPU)
    see(guard, False)
    see(guard, True)
    for step in range(1, 4):
        see(guard, False, sam=NAN)
        if step in readings:
            guard.read(Group(), step, 3)
    with pytest.raises(
        RadioError, match=r"step 9: 3 steps in a row were left out, not finite: sam/spatial; what"
    ):
        guard.check(9, 3)
    guard.check(9, 4)


def test_those_before_a_good_step_do_not_count() -> None:
    guard = NonFiniteMonitor(CPU)
    for fine in (False, False, True, False, False):
        see(guard, fine)
    guard.check(5, 3)
    assert guard.read(Group(), 5, 3).total == 4


def test_other_ranks_name_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "gather_objects", lambda self, mine: [["dino/summary"], mine])
    guard = NonFiniteMonitor(CPU)
    see(guard, False, sam=NAN)
    assert guard.read(Group(1, 2), 1, 9).names == ("dino/summary", "sam/spatial")


def test_what_was_kept_goes_on() -> None:
    first, second = NonFiniteMonitor(CPU), NonFiniteMonitor(CPU)
    see(first, False, clip=NAN)
    see(first, False)
    second.restore(first.state())
    see(second, False)
    with pytest.raises(RadioError, match="3 steps in a row were left out, not finite: clip/spatial"):
        second.read(Group(), 3, 3)
    assert second.read(Group(), 3, 4) == Skipped(3, 3, ("clip/spatial",))
