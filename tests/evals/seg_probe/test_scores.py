from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassJaccardIndex

from evals.core.stats import score
from evals.seg_probe.areas import area_records, bootstrapped, class_table
from evals.seg_probe.evaluator import repeated
from radio.dist import Ranks
from radio.errors import DataError

CLASSES = 7  # the last two are absent, of them one is predicted


def random_maps(count: int, seed: int, predicted: int = CLASSES - 1):
    """Labels with 255 among them, and predictions that agree with half of them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES - 2, (count, 13, 17))
    guesses = generator.integers(0, predicted, labels.shape)
    said = np.where(generator.random(labels.shape) < 0.5, labels, guesses)
    labels[generator.random(labels.shape) < 0.2] = 255
    return labels, said


def areas_by_mmseg(plugin, labels, said):
    """Through the metric, as the test loop calls it."""
    metric = plugin.AreaMetric(Ranks())
    metric.dataset_meta = {"classes": [f"c{n}" for n in range(CLASSES)]}
    for label, guess in zip(labels, said, strict=True):
        sample = {"pred_sem_seg": {"data": torch.tensor(guess)}, "gt_sem_seg": {"data": torch.tensor(label)}}
        metric.process({}, [sample])
    rounded = metric.evaluate(len(labels))
    return metric.areas, rounded


def areas_by_loop(labels, said):
    areas = np.zeros((len(labels), 3, CLASSES))
    for n, (label, guess) in enumerate(zip(labels, said, strict=True)):
        for truth, one in zip(label.flat, guess.flat, strict=True):
            if truth == 255:
                continue
            areas[n, 0, one] += truth == one
            areas[n, 1, one] += 1
            areas[n, 2, truth] += 1
    return areas


@pytest.mark.parametrize("seed", range(3))
def test_areas_are_those_of_a_slow_loop_and_scores_those_of_mmseg(plugin, seed: int) -> None:
    labels, said = random_maps(6, seed)
    areas, rounded = areas_by_mmseg(plugin, labels, said)
    np.testing.assert_array_equal(areas, areas_by_loop(labels, said))
    found = score(areas)
    assert found.miou == pytest.approx(rounded["mIoU"], abs=0.0051)
    assert found.macc == pytest.approx(rounded["mAcc"], abs=0.0051)
    assert found.aacc == pytest.approx(rounded["aAcc"], abs=0.0051)


@pytest.mark.parametrize("predicted", [CLASSES - 1, CLASSES - 2])
def test_scores_are_scikit_learns_and_torchmetrics(plugin, predicted: int) -> None:
    labels, said = random_maps(8, 9, predicted)
    found = score(areas_by_mmseg(plugin, labels, said)[0])
    there = labels != 255
    truth, guess = labels[there], said[there]
    # scikit-learn scores the classes that occur in either; a class of neither is left out.
    occurring = sorted(set(truth) | set(guess))
    iou = jaccard_score(truth, guess, labels=occurring, average=None, zero_division=0)
    assert found.miou == pytest.approx(100 * iou.mean(), abs=1e-9)
    np.testing.assert_allclose(found.iou[occurring], 100 * iou, atol=1e-9)
    assert np.isnan(found.iou[[c for c in range(CLASSES) if c not in occurring]]).all()
    recall = recall_score(truth, guess, labels=sorted(set(truth)), average="macro")
    assert found.macc == pytest.approx(100 * recall, abs=1e-9)
    assert found.aacc == pytest.approx(100 * accuracy_score(truth, guess), abs=1e-9)
    # torchmetrics also leaves out what occurs in neither, and averages what is left.
    index = MulticlassJaccardIndex(CLASSES, average="macro", ignore_index=255)
    assert found.miou == pytest.approx(100 * float(index(torch.tensor(said), torch.tensor(labels))), abs=1e-4)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    areas = np.array([[[4.0, 0, 0], [4, 2, 0], [6, 0, 0]]])
    found = score(areas)
    assert found.iou[:2].tolist() == [pytest.approx(100 * 4 / 6), 0]
    assert np.isnan(found.iou[2])
    assert found.miou == pytest.approx(100 * 4 / 6 / 2)
    assert found.macc == pytest.approx(100 * 4 / 6)
    table = class_table([areas], ("a", "b", "c"))
    assert table.columns == ("class", "iou", "acc", "share")
    assert table.rows[1] == ("b", 0.0, None, 0.0)
    assert table.rows[2] == ("c", None, None, 0.0)
    with pytest.raises(DataError, match="no validation pixel has a class"):
        score(np.zeros((2, 3, 4)))


def test_sums_do_not_lose_pixels_beyond_two_to_the_24() -> None:
    areas = np.ones((3, 3, 2))
    areas[0] = 2.0**24
    found = score(areas)
    assert found.aacc == 100
    assert areas.sum(axis=0)[2, 0] == 2**24 + 2


def test_intervals_are_a_bootstrap_over_images() -> None:
    generator = np.random.default_rng(0)
    labels, said = random_maps(30, 4)
    areas = areas_by_loop(labels, said)
    found = bootstrapped(areas)
    for metric in found.values():
        assert metric.low < metric.value < metric.high
    # the slow way: draw images, sum, score
    drawn = [score(areas[generator.integers(0, 30, 30)]).miou for _ in range(2000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found["miou"].low == pytest.approx(low, abs=0.25)
    assert found["miou"].high == pytest.approx(high, abs=0.25)
    assert bootstrapped(areas) == found


def test_a_image_of_void_alone_does_not_break_the_interval() -> None:
    areas = np.zeros((2, 3, 2))
    areas[0] = [[3, 1], [4, 2], [4, 2]]
    found = bootstrapped(areas)
    assert found["miou"].low == found["miou"].high == pytest.approx(found["miou"].value)


def test_several_heads_give_mean_and_spread() -> None:
    runs = [np.array([[[n, 1.0], [4, 4], [4, 4]]]) for n in (1.0, 2.0, 3.0)]
    values = [score(run).miou for run in runs]
    found = repeated(runs)["miou"]
    assert found.value == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == (None, None)


def test_a_line_a_image_holds_the_areas_of_what_is_there() -> None:
    areas = np.zeros((2, 3, 4))
    areas[0, :, 1], areas[0, 1, 3] = (5, 6, 9), 2**40  # more pixels than a float32 counts
    assert list(area_records(areas, ["a", "ü"])) == [
        {"id": "a", "areas": [[1, 5, 6, 9], [3, 0, 2**40, 0]]},
        {"id": "ü", "areas": []},
    ]
