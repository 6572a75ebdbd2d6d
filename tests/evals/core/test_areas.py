from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.core.stats import areas, score
from radio.errors import DataError


def by_loop(prediction: np.ndarray, truth: np.ndarray, count: int) -> tuple[float, float, float]:
    """mIoU, mAcc and aAcc, pixel by pixel."""
    pairs = [(int(p), int(t)) for p, t in zip(prediction.flat, truth.flat, strict=True) if t != 255]
    ious, accs = [], []
    for name in range(count):
        both = sum(p == t == name for p, t in pairs)
        either = sum(name in (p, t) for p, t in pairs)
        labelled = sum(t == name for _, t in pairs)
        if either:
            ious.append(both / either)
        if labelled:
            accs.append(both / labelled)
    right = sum(p == t for p, t in pairs) / len(pairs)
    return 100 * sum(ious) / len(ious), 100 * sum(accs) / len(accs), 100 * right


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.int64, np.uint16]))
def test_the_scores_are_those_of_a_loop_over_pixels(seed, dtype):
    generator = np.random.default_rng(seed)
    prediction = generator.integers(0, 4, (2, 5, 6)).astype(dtype)
    truth = generator.choice([0, 1, 2, 3, 255], (2, 5, 6)).astype(dtype)
    found = areas(prediction, truth, num_classes=6)
    assert (found.miou, found.macc, found.aacc) == pytest.approx(by_loop(prediction, truth, 6))
    assert found.areas.shape == (3, 6)
    apart = np.stack([areas(p, t, num_classes=6).areas for p, t in zip(prediction, truth, strict=True)])
    assert score(apart).miou == found.miou


def test_tensors_and_lists_are_taken_and_the_number_of_classes_is_found():
    truth = [[0, 1], [2, 255]]
    for prediction in ([[0, 1], [1, 9]], torch.tensor([[0, 1], [1, 9]], dtype=torch.uint8)):
        found = areas(prediction, truth)
        assert found.iou.tolist() == pytest.approx([100, 50, 0])
        assert found.aacc == pytest.approx(200 / 3)
    assert areas([[True, False]], [[True, True]]).iou.tolist() == [0, 50]
    assert areas([[1, 0]], [[1, 255]], ignore=None).aacc == 50


@pytest.mark.parametrize(
    ("prediction", "truth", "options", "said"),
    [
        ([[0, 1]], [[0], [1]], {}, r"the prediction is \[1, 2\] and the truth \[2, 1\]"),
        ([[0.0, 1.0]], [[0, 1]], {}, "the prediction holds float64; wanted whole numbers"),
        ([[0, 1]], [["a", "b"]], {}, "the truth holds <U1"),
        ([[0, 1], [2]], [[0, 1]], {}, "the prediction is no array"),
        ([0, 1], [0, 1], {}, r"the prediction is \[2\]; wanted \[H, W\]"),
        ([[0, 3]], [[0, 1]], {"num_classes": 3}, "the prediction holds the class 3; wanted 0 to 2"),
        ([[0, 255]], [[0, 1]], {"num_classes": 3}, "the prediction holds the class 255; wanted 0 to 2"),
        ([[0, 1]], [[0, -1]], {}, "the truth holds the class -1; wanted 0 to 1"),
        ([[0, 10**15]], [[0, 1]], {}, "1,000,000,000,000,001 classes; wanted 1 to 65,536"),
        ([[0, 1]], [[0, 1]], {"num_classes": 0}, "0 classes; wanted 1 to"),
        ([[0, 1]], [[255, 255]], {}, "no pixel has a class"),
        (np.zeros((0, 3), int), np.zeros((0, 3), int), {}, "no pixel has a class"),
    ],
)
def test_what_are_no_label_maps(prediction, truth, options, said):
    with pytest.raises(DataError, match=said):
        areas(prediction, truth, **options)
