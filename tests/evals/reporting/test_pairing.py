from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.core.bootstrap import resamples
from evals.core.report import DataUsed, Metric, Report
from evals.reporting.pairing import paired_interval
from evals.reporting.records import Entry

IMAGES, CLASSES = 12, 5

Lines = Sequence[dict[str, Any]]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Entry]:
    """Writes the records of a task, in files of these endings, beside a report of this value."""

    def save(task: str, side: str, value: float, **records: Lines) -> Entry:
        folder = tmp_path / side
        folder.mkdir(exist_ok=True)
        names = {f"{task}-{side}{ending.replace('_', '-')}.jsonl": lines for ending, lines in records.items()}
        for name, lines in names.items():
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        used = DataUsed(role="val", name="d", fingerprint="a", count=IMAGES, num_classes=CLASSES)
        report = Report(
            task=task,
            model=side,
            fingerprint="f",
            primary_metric="h",
            metrics={"h": Metric(value=value)},
            settings={},
            data=(used,),
            device="cpu",
            seconds={},
            created="",
            versions={},
            files=tuple(names),
        )
        return Entry(report, folder / f"{task}-{side}.json")

    return save


def answers(seed: int) -> tuple[dict[str, Lines], float]:
    """Two benchmarks that share images and count their questions alike; their accuracies' mean."""
    generator = np.random.default_rng(seed)
    found = {
        ending: [
            {
                "question_id": str(n),
                "image": f"{n % IMAGES}.jpg",
                "score": float(generator.random() < right),
            }
            for n in range(count)
        ]
        for ending, count, right in (("_gqa", 40, 0.7), ("_vqav2", 25, 0.4))
    }
    return found, 100 * float(np.mean([np.mean([one["score"] for one in of]) for of in found.values()]))


def areas(seed: int) -> np.ndarray:
    """[N, 3, C] of one truth; the last class is never there, the one before only predicted."""
    truth = np.random.default_rng(0).integers(0, CLASSES - 2, (IMAGES, 30))
    generator = np.random.default_rng(seed)
    said = np.where(
        generator.random(truth.shape) < 0.6, truth, generator.integers(0, CLASSES - 1, truth.shape)
    )
    each = np.arange(CLASSES)[:, None, None]
    counts = [((truth == each) & (said == each)), said == each, truth == each]
    return np.stack(counts).sum(axis=-1).transpose(2, 0, 1)


def area_lines(found: np.ndarray) -> Lines:
    return [
        {"image": f"{n}.jpg", "areas": [[c, *one[:, c].tolist()] for c in range(CLASSES) if one[1:, c].any()]}
        for n, one in enumerate(found)
    ]


def iou(found: np.ndarray) -> float:
    """The mean over the classes that are anywhere, by hand."""
    total = found.sum(axis=0)
    values = [b / (p + t - b) for b, p, t in total.T if p + t]
    return 100 * float(np.mean(values))


def drawn() -> np.ndarray:
    """[R, N]: the resamples' weights of image 0, 1, ...; pairing sorts the images by their names."""
    names = sorted(f"{n}.jpg" for n in range(IMAGES))
    return resamples(IMAGES)[:, [names.index(f"{n}.jpg") for n in range(IMAGES)]]


def test_answers_are_drawn_by_image_and_averaged_by_benchmark(save: Callable[..., Entry]) -> None:
    (new, after), (old, before) = answers(1), answers(2)

    def mean(side: dict[str, Lines], weights: np.ndarray) -> float:
        return 100 * float(
            np.mean(
                [
                    np.average(
                        [x["score"] for x in of], weights=[weights[n % IMAGES] for n in range(len(of))]
                    )
                    for of in side.values()
                ]
            )
        )

    wanted = np.percentile([mean(new, w) - mean(old, w) for w in drawn()], [2.5, 97.5])
    turned = dict(reversed([(ending, of[::-1]) for ending, of in new.items()]))
    found = paired_interval(save("vqa", "new", after, **turned), save("vqa", "old", before, **old))
    assert found == pytest.approx(tuple(wanted), abs=1e-9)
    assert found[0] < after - before < found[1]


def test_areas_are_summed_before_they_are_divided(save: Callable[..., Entry]) -> None:
    new, old = areas(1), areas(2)
    differences = [iou(w[:, None, None] * new) - iou(w[:, None, None] * old) for w in drawn()]
    entries = [
        save("seg", side, iou(found), **{"": area_lines(found)})
        for side, found in (("new", new), ("old", old))
    ]
    wanted = np.percentile(differences, [2.5, 97.5])
    assert paired_interval(*entries) == pytest.approx(tuple(wanted), abs=1e-9)
    assert paired_interval(entries[0], entries[0]) == (0.0, 0.0)


def test_what_cannot_be_paired_is_not(save: Callable[..., Entry]) -> None:
    found, value = answers(1)
    old = save("vqa", "old", value, **found)
    assert paired_interval(save("vqa", "new", value, **found), old) is not None
    fewer = {ending: of[1:] for ending, of in found.items()}
    twice = {ending: [*of, of[0]] for ending, of in found.items()}
    unreadable = {ending: [*of, {"question_id": "x"}] for ending, of in found.items()}
    for records in (fewer, twice, unreadable, {"_gqa": found["_gqa"]}, {}):
        assert paired_interval(save("vqa", "new", value, **records), old) is None
    assert paired_interval(save("vqa", "new", value + 0.1, **found), old) is None
    new = save("vqa", "new", value, **found)
    (new.path.parent / new.report.files[0]).unlink()
    assert paired_interval(new, old) is None
    assert paired_interval(save("noise", "new", value, **found), save("noise", "old", value, **found)) is None
    line = {"image": "1", "areas": [[CLASSES, 1, 1, 1]]}  # of a class that there is not
    entries = [save("seg", side, 100.0, **{"": [line]}) for side in ("new", "old")]
    assert paired_interval(*entries) is None
