"""The order of samples: every one once, batches of one modality, decided by the seed."""

from __future__ import annotations

import pytest

from evals.vqa.data import epoch_order, sample_order

LENGTHS = [7 * n % 23 for n in range(50)]
MODALITIES = [n % 3 != 0 for n in range(50)]


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_an_epoch_holds_everything_once_in_batches_of_one_modality(batch: int) -> None:
    found = epoch_order(LENGTHS, MODALITIES, batch, seed=3, epoch=0)
    assert sorted(found) == list(range(50))
    whole = sum(MODALITIES) // batch + (50 - sum(MODALITIES)) // batch
    for start in range(0, whole * batch, batch):
        part = found[start : start + batch]
        assert len({MODALITIES[place] for place in part}) == 1
        assert [LENGTHS[place] for place in part] == sorted((LENGTHS[p] for p in part), reverse=True)


def test_the_seed_and_the_epoch_decide() -> None:
    orders = {tuple(epoch_order(LENGTHS, MODALITIES, 4, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert epoch_order(LENGTHS, MODALITIES, 4, 1, 1) == epoch_order(LENGTHS, MODALITIES, 4, 1, 1)


def test_steps_go_through_epochs() -> None:
    found = sample_order(LENGTHS, MODALITIES, 4, 30, seed=0)
    assert len(found) == 120
    assert found[:50] == epoch_order(LENGTHS, MODALITIES, 4, 0, 0)
    assert found[100:] == epoch_order(LENGTHS, MODALITIES, 4, 0, 2)[:20]
