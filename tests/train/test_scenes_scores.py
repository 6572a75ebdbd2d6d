"""The scores of the scenes teachers against loops and hand values."""

from __future__ import annotations

import math

import pytest
import torch

from train.scenes_scores import _filled, _iou, knn, summaries


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
    masks = _filled(torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 1.0, 4.0, 3.0]]))
    assert masks[0].sum() == 8 and masks[0][:2, :4].all()
    assert float(_iou(masks[:1], masks[1:])) == pytest.approx(2 / 10)


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
