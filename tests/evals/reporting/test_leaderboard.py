"""The leaderboard against ranks by hand and a slow bootstrap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.core.report import DatasetInfo, Metric, Report
from evals.core.stats import resamples
from evals.reporting.leaderboard import Leaderboard, _ranks, leaderboard_table, make_leaderboard, read_all
from radio import entry
from radio.errors import ConfigError, DataError

from .conftest import Folder

IMAGES = 60


def used(name: str = "d") -> tuple[DatasetInfo, ...]:
    return (DatasetInfo(role="query", name=name, fingerprint=name * 8, count=IMAGES, num_classes=4),)


def scores(seed: int, right: float) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(IMAGES) < right


def add(folder: Folder, task: str, model: str, right: np.ndarray[Any, Any], **changes: Any) -> Report:
    """A report whose records are the scores."""
    lines = [{"id": f"{number:03d}", "score": int(good)} for number, good in enumerate(right)]
    records = folder.records(f"{task}-{model}.jsonl", *lines)
    values = {
        "metrics": {"top1": Metric(value=100 * float(right.mean()))},
        "records": records,
        "files": (records,),
        "data": used(),
        **changes,
    }
    return folder.add(task, model, **values)


@pytest.fixture
def reports(tmp_path: Path) -> Folder:
    """Two tasks: `a` and `b` are alike and good, `c` is bad and lacks the second."""
    folder = Folder(tmp_path / "reports")
    for seed, (model, right) in enumerate((("a", 0.9), ("b", 0.88), ("c", 0.3))):
        add(folder, "knn", model, scores(seed, right))
        if model != "c":
            add(folder, "zeroshot", model, scores(10 + seed, right))
    return folder


def ranked(*folders: Folder, tasks: tuple[str, ...] = ()) -> Leaderboard:
    return make_leaderboard(read_all([folder.path for folder in folders]), tasks)


def slow_ranks(values: list[float]) -> list[float]:
    return [1 + sum(v > own for v in values) + (sum(v == own for v in values) - 1) / 2 for own in values]


def test_rank_sums_and_their_intervals_by_hand(reports: Folder) -> None:
    board = ranked(reports)
    knn = [scores(seed, right) for seed, right in enumerate((0.9, 0.88, 0.3))]
    zeroshot = [scores(10 + seed, right) for seed, right in enumerate((0.9, 0.88))]

    def sums(weights: np.ndarray[Any, Any]) -> list[float]:
        first = slow_ranks([float(weights @ each) for each in knn])
        second = slow_ranks([*(float(weights @ each) for each in zeroshot), -1.0])
        return [one + two for one, two in zip(first, second, strict=True)]

    expected = dict(zip("abc", sums(np.ones(IMAGES)), strict=True))
    resampled = np.array([sums(w) for block in resamples(IMAGES) for w in block])
    assert {each.model: each.rank_sum for each in board.standings} == expected
    for each in board.standings:
        low, high = np.percentile(resampled[:, "abc".index(each.model)], [2.5, 97.5])
        assert (each.low, each.high) == pytest.approx((low, high))
    assert {each.model: each.group for each in board.standings} == {"a": 1, "b": 1, "c": 2}
    last = board.standings[-1]
    assert last.model == "c" and last.metrics[1] is None and last.groups == (2, None)


def test_a_rare_part_does_not_blur_the_ranks(tmp_path: Path) -> None:
    """Twenty classes of three images each, and most resamples lack one: ranks as by a slow loop."""
    folder, parts = Folder(tmp_path / "r"), np.arange(IMAGES) % 20
    rights = {"a": scores(1, 0.9), "b": scores(2, 0.75), "c": scores(3, 0.2)}

    def mean(right: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
        drawn = [part for part in range(20) if weights[parts == part].sum()]
        return float(np.mean([np.average(right[parts == p], weights=weights[parts == p]) for p in drawn]))

    for model, right in rights.items():
        lines = [
            {"id": f"{number:03d}", "part": f"{part:02d}", "score": int(good)}
            for number, (part, good) in enumerate(zip(parts, right, strict=True))
        ]
        value = {"top1": Metric(value=100 * mean(right, np.ones(IMAGES)))}
        add(folder, "knn", model, right, metrics=value)
        folder.records(f"knn-{model}.jsonl", *lines)
    weights = [each for block in resamples(IMAGES) for each in block]
    ranks = np.array([slow_ranks([mean(right, each) for right in rights.values()]) for each in weights])
    for place, standing in enumerate(ranked(folder).standings):
        assert standing.model == "abc"[place]
        assert (standing.low, standing.high) == pytest.approx(
            tuple(np.percentile(ranks[:, place], [2.5, 97.5]))
        )
        assert standing.low >= 1


def test_ranks_without_a_score_are_none() -> None:
    ranks = _ranks(np.array([[3.0, 1.0, 2.0], [np.nan] * 3, [-np.inf, 1.0, 1.0]]))
    assert ranks[[0, 2]].tolist() == [[1, 3, 2], [3, 1.5, 1.5]]
    assert np.isnan(ranks[1]).all()


def test_groups_of_a_task_follow_the_paired_interval(tmp_path: Path) -> None:
    """Six images more are surely better where all others agree, and may be chance where they do not."""
    folder, base = Folder(tmp_path / "r"), scores(3, 0.5)
    better = base.copy()
    better[np.flatnonzero(~base)[:6]] = True
    noisy = np.roll(base, 7)
    for model, right in (("base", base), ("better", better), ("noisy", noisy)):
        add(folder, "knn", model, right)
    groups = {each.model: each.groups[0] for each in ranked(folder).standings}
    weights = np.concatenate(list(resamples(IMAGES)))
    assert np.percentile(weights @ (better * 1.0 - base), 2.5) > 0  # images' names are in their order
    assert np.percentile(weights @ (better * 1.0 - noisy), 2.5) <= 0
    assert groups == {"better": 1, "base": 2, "noisy": 2}  # base, by its name, comes before its equal


def test_one_model_under_two_names_has_one_row(reports: Folder) -> None:
    """A report on another data set is called NAME-voc; it is a column of its own."""
    for model in "ab":
        add(reports, "knn", f"{model}-voc", scores(1, 0.5), data=used("v"), fingerprint=f"print of {model}")
    board = ranked(reports)
    assert [each.model for each in board.standings] == sorted("abc", key=lambda m: m)
    assert [(c.task, c.data) for c in board.columns][:2] == [("knn", f"d, {IMAGES}"), ("knn", f"v, {IMAGES}")]
    equal = [each.groups[1] for each in board.standings if each.model != "c"]
    assert equal == [1, 1]


def test_another_way_of_scoring_is_another_column(reports: Folder) -> None:
    """One model's extra report neither makes a row nor takes the task from the others."""
    settings = {"head": "clip"}
    add(reports, "knn", "a-clip-head", scores(1, 0.5), fingerprint="print of a", settings=settings)
    board = ranked(reports)
    assert {each.model for each in board.standings} == {"a", "b", "c"}
    assert [column.task for column in board.columns] == ["knn", "zeroshot"]
    assert "only one model has it; not made alike: " in board.notes[0] and "head is" in board.notes[0]
    add(reports, "knn", "b-clip-head", scores(2, 0.5), fingerprint="print of b", settings=settings)
    board = ranked(reports)
    assert [column.task for column in board.columns] == ["knn", "knn", "zeroshot"]
    assert sum("head" in title for title in board.titles) == 1


def test_windows_of_one_model_stay_apart_and_take_no_name(reports: Folder) -> None:
    """Neither of two reports that share a column goes to the model without a window."""
    for window in ("global", "8"):
        add(reports, "sam", f"a-window-{window}", scores(1, 0.5), fingerprint="print of a")
    board = ranked(reports)
    assert {each.model for each in board.standings} == {"a", "a-window-8", "a-window-global", "b", "c"}
    (own,) = (each for each in board.standings if each.model == "a")
    assert own.metrics[[column.task for column in board.columns].index("sam")] is None


def test_the_reports_of_two_runs_are_ranked_together(tmp_path: Path) -> None:
    """Both have the teacher and the untrained student; each has a student of its own under the same name."""
    runs = [Folder(tmp_path / name / "reports") for name in ("first", "second")]
    for seed, run in enumerate(runs):
        add(run, "knn", "scenes:clip", scores(1, 0.9), created=f"2026-01-0{2 - seed}T00:00:00+00:00")
        add(run, "knn", "student", scores(2 + seed, 0.6 + 0.2 * seed), fingerprint=f"student {seed}")
    board = ranked(*runs)
    names = ["scenes:clip", "student (second)", "student (first)"]
    assert [each.model for each in board.standings] == names and board.notes == ()
    other = Folder(tmp_path / "other" / "first" / "reports")
    add(other, "knn", "student", scores(9, 0.1), fingerprint="student 9")
    board = ranked(*runs, other)
    named = {f"student ({tmp_path / name})" for name in ("first", "second", "other/first")}
    assert {each.model for each in board.standings} == {"scenes:clip", *named}
    add(other, "seg", "student", scores(9, 0.1), fingerprint="student b")  # of the run's next checkpoint
    add(runs[0], "seg", "scenes:clip", scores(1, 0.9))
    board = ranked(runs[0], other)
    named = {f"student ({'student ' + which})" for which in "09b"}
    assert {each.model for each in board.standings} == {"scenes:clip", *named}


@pytest.mark.parametrize("newest", [0, 1])
def test_of_two_reports_of_the_same_weights_the_newest_counts(tmp_path: Path, newest: int) -> None:
    runs = [Folder(tmp_path / name / "reports") for name in ("first", "second")]
    add(runs[0], "knn", "b", scores(5, 0.3))
    for number, run in enumerate(runs):
        created = f"2026-01-0{1 + (number == newest)}T00:00:00+00:00"
        add(run, "knn", "a", scores(number, 0.5 + 0.3 * number), created=created)
    board = ranked(*runs)
    value = next(each.metrics[0] for each in board.standings if each.model == "a")
    assert value is not None and value.value == 100 * scores(newest, 0.5 + 0.3 * newest).mean()
    new, old = (runs[index].path / "knn-a.json" for index in (newest, 1 - newest))
    assert board.notes == (f"{old} is left out: {new} is newer and of the same weights",)


def test_what_cannot_be_ranked_is_left_out_with_its_reason(reports: Folder) -> None:
    rate = {"top1": Metric(value=5.0, unit="images/s")}
    loss = {"top1": Metric(value=5.0, higher_is_better=None)}
    for model in "ab":
        reports.add("speed", model, metrics=rate, data=used())
        reports.add("norm", model, metrics=loss, data=used())
        add(reports, "seg", model, scores(1, 0.5), settings={"crop": model})  # each made otherwise
    reports.add("maps", "a", data=used())
    board = ranked(reports)
    assert [column.task for column in board.columns] == ["knn", "zeroshot"]
    text = "\n".join(board.notes)
    assert "speed (d, 60) is left out: a speed depends on the machine" in text
    assert "norm (d, 60) is left out: neither more nor less" in text
    assert "seg (d, 60) is left out: only one model has it; not made alike: crop is a or b" in text
    assert "maps (d, 60) is left out: only one model has it" in text


def test_less_can_be_better_and_no_records_count_as_certain(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "r")
    for model, value in (("a", 0.5), ("b", 0.7), ("c", 0.5)):
        folder.add("depth", model, metrics={"top1": Metric(value=value, higher_is_better=False)}, data=used())
    board = ranked(folder)
    assert [(e.model, e.rank_sum, e.low, e.high) for e in board.standings] == [
        ("a", 1.5, 1.5, 1.5),
        ("c", 1.5, 1.5, 1.5),
        ("b", 3.0, 3.0, 3.0),
    ]
    assert [each.group for each in board.standings] == [1, 1, 2]
    assert "no records that can be paired" in board.notes[0]


def test_the_command_prints_a_table_and_writes_both_files(
    reports: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, table = tmp_path / "board.html", tmp_path / "board.md"
    command = ["leaderboard", str(reports.path), "--html", str(page), "--markdown", str(table), "--plain"]
    assert entry.evaluate(command) == 0
    out = capsys.readouterr().out
    assert "rank sum" in out and "| 1 " in out
    rows = table.read_text().splitlines()
    assert rows[0].startswith("| group | model | rank sum |") and len(rows) == 5
    assert "Models of one group" in page.read_text() and "group 2" in page.read_text()
    assert len(leaderboard_table(ranked(reports))) == 4


def test_bad_input_is_one_error(reports: Folder, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no report is of the task kn, only of knn, zeroshot; did you mean knn"
    ):
        ranked(reports, tasks=("kn",))
    with pytest.raises(DataError, match="no folder of reports is given"):
        ranked()
    with pytest.raises(DataError, match="no such folder"):
        read_all([tmp_path / "none"])
    other = Folder(tmp_path / "other")
    add(other, "knn", "a", scores(7, 0.5), fingerprint="")
    add(reports, "knn", "a", scores(8, 0.5), fingerprint="")
    with pytest.raises(DataError, match="are both of knn and a on the same data; leave one out"):
        ranked(reports, other)
    with pytest.raises(DataError, match=r"nothing to rank: knn \(d, 60\) is left out: only one model"):
        ranked(other)
