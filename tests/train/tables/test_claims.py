"""Tables of claims: their rows, and the verdicts that hand-made results give."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evals.reporting.elements import Plots
from evals.reporting.paper_tables import MadeTable, TableDifference, read_tables, tables_section
from radio import entry
from radio.config import to_plain
from train.cli import main
from train.config import TrainConfig
from train.losses import spatial_losses
from train.shift import Input, draw_shifts, make_frames
from train.tables import CLAIMS, make_tables
from train.tables.ablations import FRAME_AREA, INGREDIENTS, SHIFT, smaller_crops
from train.tables.layout import SOURCES, SPREADS, Claim, TableLayout, runs_of
from train.tables.making import protocols_of, rows_of
from train.tables.results import RowResult, Score, deciding_settings, write_result
from train.tables.showing import as_markdown, collect, spread, write_tables
from train.tables.verdicts import Difference, judge_claim


def table_of(name: str) -> TableLayout:
    (table,) = make_tables(name, "small")
    return table


def write_rows(table: TableLayout, folder: Path, values: dict[str, dict[str, float]]) -> None:
    """Write three seeds of rows, scores by column: the value - 1, the value, the value + 1, each ±0.5."""
    for row in rows_of([(table, runs_of(table, table.base, 3))]):
        name, _, seed = row.name.rpartition("-seed")
        if name not in values:
            continue
        scores: dict[str, dict[str, Score]] = {}
        for column, value in values[name].items():
            own = value + int(seed) - 1
            source = SOURCES[column]
            scores.setdefault(source.task, {})[source.metric] = Score(
                value=own, low=own - 0.5, high=own + 0.5
            )
        result = RowResult(
            name=row.name,
            settings=deciding_settings(row.config),
            scores=scores,
            protocols={key: to_plain(own) for key, own in protocols_of(row).items() if key in scores},
        )
        write_result(folder, result)


def collected(table: TableLayout, folder: Path) -> MadeTable:
    (made,) = collect([(table, runs_of(table, table.base, 3))], folder).tables
    return made


def find(made: MadeTable, line: str, column: str) -> TableDifference:
    (found,) = [each for each in made.differences if (each.line, each.column) == (line, column)]
    return found


# Both sides vary by 1 over three seeds, Welch's with 4 degrees of freedom; the images' half is 0.5 for each.
HALF = math.hypot(2.7764 * math.sqrt(2 / 3), math.hypot(0.5, 0.5))


def test_the_verdicts_of_hand_made_results(tmp_path: Path) -> None:
    table = table_of("ablations")
    base = {"unexplained": 50.0, "unexplained-clip": 40.0, "unexplained-dense": 45.0, "unexplained-sam": 65.0}
    evened = {
        "unexplained": 45.0,
        "unexplained-clip": 44.0,
        "unexplained-dense": 45.0,
        "unexplained-sam": 46.0,
    }
    write_rows(
        table,
        tmp_path,
        {
            "base": {**base, "knn": 70.0, "zeroshot": 60.0},
            "phi-s": {**evened, "knn": 72.0, "zeroshot": 50.0},
            "angle": {"knn": 70.5},
        },
    )
    made = collected(table, tmp_path)
    assert made.claims and made.verdict_head[5] == "claimed"
    for column, value, claim, verdict in (
        ("unexplained, mean", -5.0, "lower", "holds"),
        ("unexplained: largest - smallest", 2.0 - 25.0, "lower", "holds"),
        ("k-NN", 2.0, "higher", "as claimed, within noise"),
        ("zero-shot", -10.0, "higher", "reversed"),
    ):
        found = find(made, "+ PHI-S", column)
        assert (found.claim, found.verdict) == (claim, verdict)
        assert found.value == pytest.approx(value)
    found = find(made, "+ PHI-S", "k-NN")
    assert (found.low, found.high) == (pytest.approx(2 - HALF, abs=1e-3), pytest.approx(2 + HALF, abs=1e-3))
    assert find(made, "+ balanced summaries", "k-NN").verdict == "no difference seen"
    assert made.lines[1].seeds == "3"
    assert "probe" not in made.columns and "SAM" not in made.columns  # were not asked for
    assert found.texts[5] == "higher"


def test_taking_an_ingredient_away_claims_the_opposite() -> None:
    lines = {line.label: line for line in table_of("ablations").lines}
    for each in INGREDIENTS:
        control = f", {each.control_title}" if each.control is not None else ""
        alone, without = lines[f"+ {each.title}"], lines[f"all but {each.title}{control}"]
        assert (alone.against, without.against) == (f"base{control}", "all")
        opposite = {"higher": "lower", "lower": "higher", "": ""}
        assert {column: opposite[claim] for column, claim in alone.claims.items()} == without.claims


def test_all_has_every_ingredient_and_the_others_all_but_one() -> None:
    table = table_of("ablations")
    runs = table.make_runs(table.base)

    def changed(config: TrainConfig) -> set[str]:
        plain, base = to_plain(config), to_plain(table.base)
        return {name for name in plain if plain[name] != base[name]}

    alone = {each.name: changed(runs[each.name]) for each in INGREDIENTS}
    assert all(alone.values())
    assert changed(runs["all"]) == set().union(*alone.values())
    for each in INGREDIENTS:
        assert runs[f"no-{each.name}"] != runs["all"]
        control = set() if each.control is None else changed(each.control(table.base))
        assert changed(runs[f"no-{each.name}"]) <= changed(runs["all"]) | control


def test_a_smaller_crop_shows_as_much_as_a_shifted_frame() -> None:
    frames = make_frames(
        SHIFT, Input((96, 96), 12), {"clip": Input((96, 96), 12)}, draw_shifts(0, ["clip"], 0, 1)
    )
    (height, _), (canvas, _) = frames.student.input.size, frames.student.canvas
    assert (height / canvas) ** 2 == pytest.approx(FRAME_AREA)
    config = smaller_crops(table_of("ablations").base)
    assert config.data.crop_scale == pytest.approx((0.7 * 4 / 9, 4 / 9))


@pytest.mark.parametrize(
    ("low", "high", "claim", "verdict"),
    [
        (1.0, 3.0, "higher", "holds"),
        (1.0, 3.0, "lower", "reversed"),
        (-1.0, 3.0, "higher", "as claimed, within noise"),
        (-1.0, 3.0, "lower", "opposite, within noise"),
        (-1.0, 3.0, "", "no difference seen"),
        (1.0, 3.0, "", "higher"),
        (-3.0, -1.0, "", "lower"),
        (-3.0, -1.0, "lower", "holds"),
    ],
)
def test_a_claim_is_judged_by_its_sign_and_interval(
    low: float, high: float, claim: Claim, verdict: str
) -> None:
    found = Difference((low + high) / 2, low, high)
    assert judge_claim(found, claim) == verdict
    assert judge_claim(found._replace(low=None, high=None), claim) is None


def test_a_spread_is_the_largest_minus_the_smallest() -> None:
    scores = [
        Score(value=40.0, low=37.0, high=43.0),
        Score(value=90.0, low=86.0, high=94.0),
        Score(value=60.0),
    ]
    assert spread(scores) == Score(value=50.0, low=45.0, high=55.0)  # 3, 4, 5
    assert spread([Score(value=40.0), *scores[1:]]) == Score(value=50.0)
    assert all(column in SOURCES for columns, _ in SPREADS.values() for column in columns)


def test_a_squared_error_is_one() -> None:
    import torch

    table = table_of("teacher-scales")
    loss = table.make_runs(table.base)["mse"].loss
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double() * 10
    expected = (a - b).square().mean((1, 2))
    torch.testing.assert_close(spatial_losses(a, b, loss).double(), expected, rtol=1e-5, atol=0)


def test_a_page_of_claims_does_not_speak_of_a_paper(tmp_path: Path) -> None:
    table = table_of("teacher-scales")
    write_rows(table, tmp_path, {"phi-s": {"knn": 70.0}, "mse": {"knn": 60.0}})
    given = [(table, runs_of(table, table.base, 3))]
    made = collect(given, tmp_path)
    text = as_markdown(made, "radio-train teacher-scales")
    assert "## teacher-scales: teachers of unlike scale" in text
    assert "| squared error | PHI-S | k-NN | -10.00 |" in text
    assert "paper" not in text
    write_tables(made, tmp_path / "tables.json")
    assert read_tables(tmp_path / "tables.json") == made
    assert tables_section(made).title == "tables of runs"


def test_mode_switching_draws_a_curve_of_each_line_that_is_done(tmp_path: Path) -> None:
    table = table_of("mode-switching")
    split = dict(zip(table.curves[1].columns, (10.0, 20.0, 60.0, 30.0, 5.0), strict=True))
    shared = {**dict.fromkeys(split, 55.0), "zeroshot-index": 90.0}
    write_rows(table, tmp_path, {"split": {**split, "zeroshot-index": 8.0}, "shared": shared})
    made = collect([(table, runs_of(table, table.base, 3))], tmp_path)
    for column, value, verdict in (
        ("zero-shot, 192 px", 50.0, "holds"),
        ("zero-shot, 96 px", -5.0, "lower"),
        ("zero-shot, worst of best side", 82.0, "holds"),
    ):
        found = find(made.tables[0], "both at 96 and 192", column)
        assert (found.value, found.verdict) == (pytest.approx(value), verdict)
    (plots,) = [each for each in tables_section(made).elements if isinstance(each, Plots)]
    assert [title for title, _ in plots.panels] == ["zero-shot, top-1 (%)"]  # no row has k-NN
    assert [name for name, _ in plots.legend] == ["clip at 96, dense at 192", "both at 96 and 192"]


@pytest.mark.parametrize("name", CLAIMS)
def test_a_table_of_claims_is_in_small_alone(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.train([name, "--size", "paper"]) == 2
    assert f"--size paper: {name} has no numbers of a paper" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert f"\n  {name} " in capsys.readouterr().out


def test_one_command_trains_scores_and_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.tables.making.num_workers", lambda *_: 1)
    teachers = [f"--teachers.{i}.model=tiny:{name}" for i, name in enumerate(("clip", "dense", "sam"))]
    words = [
        *("--resolution", "48", "--steps", "2", "--batch-size", "2", "--log-every", "1", "--device", "cpu"),
        *("--data.scenes", "50", "--data.workers", "0", "--seeds", "1", "--out", str(tmp_path / "out")),
        *("--score", "fidelity", "--fidelity.num-images", "20", "--teachers.2.student-resolution", "48"),
    ]
    command = ["teacher-scales", *teachers, *words, "--page", str(tmp_path / "page.md")]
    assert main([*command, "--rows", "phi-s", "eq3"]) == 0
    (table,) = read_tables(tmp_path / "out" / "results" / "tables.json").tables
    assert [line.seeds for line in table.lines] == ["1", "1", "0 of 1"]
    assert find(table, "eq. 3", "unexplained, mean").verdict
    four = [table.lines[0].cells[i].value for i in range(4)]
    assert four[0] == pytest.approx(sum(value or 0.0 for value in four[1:]) / 3)
    page = (tmp_path / "page.md").read_text()
    assert "| eq. 3 | PHI-S | unexplained, mean |" in page
    assert "with 2 steps of 2 images at 48 px; of sam 4 at 48 px." in page  # as the command says


def test_a_demonstration_can_be_planned_and_rehearsed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for option, cells in (("--plan", ["vit-tiny12", "3"]), ("--rehearse", ["vit-tiny12"])):
        assert main(["fixed-noise", option, "--rows", "noisy"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| noisy"))
        found = [cell.strip() for cell in row.split("|")]
        assert found[2 : 2 + len(cells)] == cells
    assert found[-2] == "pattern 108, fidelity, knn 108, zeroshot 108"
