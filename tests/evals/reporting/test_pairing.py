from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.core.report import DatasetInfo, Metric, Report
from evals.core.stats import resamples
from evals.reporting.compare import (
    METRIC_OF,
    StoredReport,
    block_sums,
    paired_interval,
    resampled_metrics,
)

IMAGES, CLASSES = 12, 5

Lines = Sequence[dict[str, Any]]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., StoredReport]:
    """Writes records beside a report of this value."""

    def save(side: str, value: float, lines: Lines, **changes: Any) -> StoredReport:
        folder = tmp_path / side
        folder.mkdir(exist_ok=True)
        name = f"ridge-{side}.jsonl"
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        used = DatasetInfo(role="val", name="d", fingerprint="a", count=IMAGES, num_classes=CLASSES)
        values: dict[str, Any] = {
            "task": "ridge",
            "model": side,
            "fingerprint": "f",
            "primary_metric": "h",
            "metrics": {"h": Metric(value=value)},
            "settings": {},
            "data": (used,),
            "device": "cpu",
            "seconds": {},
            "created": "",
            "versions": {},
            "files": (name,),
            "records": name,
        }
        return StoredReport(Report(**{**values, **changes}), folder / f"ridge-{side}.json")

    return save


def answers(seed: int) -> tuple[Lines, float]:
    """Two benchmarks that share images and count their questions alike; their accuracies' mean."""
    generator = np.random.default_rng(seed)
    records = [
        {"id": n, "part": part, "unit": f"{n % IMAGES}.jpg", "score": float(generator.random() < right)}
        for part, count, right in (("gqa", 40, 0.7), ("vqav2", 25, 0.4))
        for n in range(count)
    ]
    return records, mean(records, np.ones(IMAGES))


def mean(records: Lines, weights: np.ndarray) -> float:
    """The mean over the parts of the weighted mean of their scores, in percent."""
    means = []
    for part in ("gqa", "vqav2"):
        of_part = [record for record in records if record["part"] == part]
        each = [weights[record["id"] % IMAGES] for record in of_part]
        means.append(np.average([record["score"] for record in of_part], weights=each))
    return 100 * float(np.mean(means))


def areas(seed: int) -> np.ndarray:
    """[N, 3, C] of one truth; the last class is never there, the one before only predicted."""
    truth = np.random.default_rng(0).integers(0, CLASSES - 2, (IMAGES, 30))
    generator = np.random.default_rng(seed)
    predicted = np.where(
        generator.random(truth.shape) < 0.6, truth, generator.integers(0, CLASSES - 1, truth.shape)
    )
    each = np.arange(CLASSES)[:, None, None]
    counts = [((truth == each) & (predicted == each)), predicted == each, truth == each]
    return np.stack(counts).sum(axis=-1).transpose(2, 0, 1)


def area_lines(found: np.ndarray) -> Lines:
    return [
        {"id": f"{n}.jpg", "areas": [[c, *one[:, c].tolist()] for c in range(CLASSES) if one[1:, c].any()]}
        for n, one in enumerate(found)
    ]


def iou(found: np.ndarray) -> float:
    """The mean over the classes that are anywhere, by hand."""
    total = found.sum(axis=0)
    values = [b / (p + t - b) for b, p, t in total.T if p + t]
    return 100 * float(np.mean(values))


def weights_by_image() -> np.ndarray:
    """[R, N]: the resamples' weights of image 0, 1, ...; pairing sorts the images by their names."""
    names = sorted(f"{n}.jpg" for n in range(IMAGES))
    return np.concatenate(list(resamples(IMAGES)))[:, [names.index(f"{n}.jpg") for n in range(IMAGES)]]


def test_scores_are_resampled_by_unit_and_averaged_by_part(save: Callable[..., StoredReport]) -> None:
    (new, after), (old, before) = answers(1), answers(2)
    differences = [mean(new, w) - mean(old, w) for w in weights_by_image()]
    expected = np.percentile(differences, [2.5, 97.5])
    interval = paired_interval(save("new", after, new[::-1]), save("old", before, old))  # in any order
    assert interval == pytest.approx(tuple(expected), abs=1e-9)
    assert interval[0] < after - before < interval[1]


def test_a_part_that_a_resample_lacks_is_left_out_of_its_mean(save: Callable[..., StoredReport]) -> None:
    """As a class of SPair-71k with few pairs: more than a third of the resamples have none of it."""
    entries, means = [], []
    for side, seed in (("new", 1), ("old", 2)):
        records, _ = answers(seed)
        records = [*records, {"id": 0, "part": "rare", "unit": "0.jpg", "score": float(seed == 1)}]

        def mean_of_parts(weights: np.ndarray, records: Lines = records) -> float:
            shares = []
            for part in ("gqa", "vqav2", "rare"):
                own = [(weights[r["id"] % IMAGES], r["score"]) for r in records if r["part"] == part]
                if total := sum(weight for weight, _ in own):
                    shares.append(sum(weight * score for weight, score in own) / total)
            return 100 * sum(shares) / len(shares)

        entries.append(save(side, mean_of_parts(np.ones(IMAGES)), records))
        means.append([mean_of_parts(weights) for weights in weights_by_image()])
    expected = np.percentile(np.subtract(*means), [2.5, 97.5])
    assert paired_interval(*entries) == pytest.approx(tuple(expected), abs=1e-9)


def test_resamples_of_void_images_alone_are_left_out(save: Callable[..., StoredReport]) -> None:
    """All images but one are void, and as many resamples have a value as draw that one."""
    found = np.zeros((IMAGES, 3, CLASSES), dtype=np.int64)
    found[3] = areas(1)[3]
    entry = save("new", iou(found), area_lines(found), pairing="mean_iou")
    resampled = resampled_metrics((entry, entry))
    assert resampled is not None
    drawn = weights_by_image()[:, 3] > 0
    assert 0 < drawn.sum() < len(drawn)
    assert np.isfinite(resampled[drawn]).all() and np.isnan(resampled[~drawn]).all()
    assert paired_interval(entry, entry) == (0.0, 0.0)


def test_areas_are_summed_before_they_are_divided(save: Callable[..., StoredReport]) -> None:
    new, old = areas(1), areas(2)
    differences = [iou(w[:, None, None] * new) - iou(w[:, None, None] * old) for w in weights_by_image()]
    entries = [
        save(side, iou(values), area_lines(values), pairing="mean_iou")
        for side, values in (("new", new), ("old", old))
    ]
    expected = np.percentile(differences, [2.5, 97.5])
    assert paired_interval(*entries) == pytest.approx(tuple(expected), abs=1e-9)
    assert paired_interval(entries[0], entries[0]) == (0.0, 0.0)


@pytest.mark.parametrize("num_blocks", [1, 5, IMAGES, 100])
def test_blocks_hold_what_the_metric_follows_from(save: Callable[..., StoredReport], num_blocks: int) -> None:
    """Each block has the records of every n-th image in the order of their names."""
    records, value = answers(1)
    blocks = block_sums(save("scores", value, records[::-1]), num_blocks)
    assert blocks is not None
    count = min(num_blocks, IMAGES)
    assert blocks.shape == (count, 2, 2)
    assert METRIC_OF["mean"](blocks.sum(axis=0)[None])[0] == pytest.approx(value)
    names = sorted({record["unit"] for record in records})
    for block, part in ((0, 0), (count - 1, 1)):
        own = [
            record["score"]
            for record in records
            if names.index(record["unit"]) % count == block and record["part"] == ("gqa", "vqav2")[part]
        ]
        assert blocks[block, :, part].tolist() == [sum(own), len(own)]
    found = areas(1)
    sums = block_sums(save("areas", iou(found), area_lines(found), pairing="mean_iou"), num_blocks)
    assert sums is not None
    assert METRIC_OF["mean_iou"](sums.sum(axis=0)[None])[0] == pytest.approx(iou(found))
    assert block_sums(save("other", value + 1, records), num_blocks) is None  # not the report's own value


def test_what_cannot_be_paired_is_not(save: Callable[..., StoredReport]) -> None:
    records, value = answers(1)
    old = save("old", value, records)
    assert paired_interval(save("new", value, records), old) is not None
    one_part = [record for record in records if record["part"] == "gqa"]
    without_score = [{key: field for key, field in record.items() if key != "score"} for record in records]
    odd: list[Any] = [{"score": 1.0}, {"id": True, "score": 1.0}, {"id": 1, "score": float("nan")}, [], 7]
    for other in (
        records[1:],
        [*records, records[0]],
        one_part,
        [],
        without_score,
        *([*records[1:], record] for record in odd),
    ):
        assert paired_interval(save("new", value, other), old) is None
    assert paired_interval(save("new", value + 0.1, records), old) is None
    assert paired_interval(save("new", value, records, pairing="mean_iou"), old) is None
    assert paired_interval(save("new", value, records, records=""), old) is None
    assert paired_interval(save("new", value, records, records="../old/ridge-old.jsonl"), old) is None
    new = save("new", value, records)
    (new.path.parent / new.report.records).unlink()
    assert paired_interval(new, old) is None


@pytest.mark.parametrize(
    ("areas", "reason"),
    [
        ([[CLASSES, 1, 1, 1]], "a class that does not exist"),
        ([[-1, 1, 1, 1]], "a class below 0 is no class from behind"),
        ([[0, 1, 1, True]], "true is no number"),
        ([[0, 1, 1]], "an area is missing"),
        ([[0, 1, 1, 10**400]], "more pixels than any image has"),
        (None, "no areas"),
    ],
)
def test_areas_out_of_range_are_not_paired(
    save: Callable[..., StoredReport], areas: Any, reason: str
) -> None:
    entries = [
        save(side, 100.0, [{"id": "a", "areas": areas}], pairing="mean_iou") for side in ("new", "old")
    ]
    assert paired_interval(*entries) is None, reason
