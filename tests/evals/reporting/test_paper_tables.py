"""The paper's tables made again: their file, and their section of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.reporting.paper_tables import (
    MadeTable,
    MadeTables,
    TableCell,
    TableDifference,
    TableLine,
    markdown_table,
    number,
    read_tables,
    tables_section,
)
from radio.config import to_plain
from radio.errors import DataError


def made(lines: int = 4) -> MadeTables:
    """One table of a few models with speed, k-NN and a verdict."""
    table = MadeTable(
        name="table6",
        title="efficient backbones",
        columns=("images/s", "k-NN"),
        lines=tuple(
            TableLine(
                label=f"model {index}",
                paper_label=f"Paper {index}",
                seeds="1",
                cells=(TableCell(value=100.0 + index), TableCell(value=50.0 + index, half=1.5, paper=70.25)),
            )
            for index in range(lines)
        ),
        differences=(
            TableDifference(
                line="model 1",
                against="model 0",
                column="k-NN",
                value=1.0,
                low=0.25,
                high=1.75,
                paper=2.5,
                verdict="holds",
            ),
        ),
        remarks=("One seed.",),
    )
    return MadeTables(tables=(table,))


def test_the_file_reads_back(tmp_path: Path) -> None:
    (tmp_path / "tables.json").write_text(json.dumps(to_plain(made())))
    assert read_tables(tmp_path / "tables.json") == made()


@pytest.mark.parametrize("text", ["{", '{"tables": []}', '{"format": "am-radio-tables/1", "tables": [1]}'])
def test_another_file_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    path.write_text(text)
    if text == '{"tables": []}':
        assert read_tables(path) == MadeTables(tables=())
        return
    with pytest.raises(DataError, match=r"tables\.json"):
        read_tables(path)
    with pytest.raises(DataError, match=r"absent\.json"):
        read_tables(tmp_path / "absent.json")


def test_the_section_has_the_numbers_the_verdicts_and_the_speeds() -> None:
    section = tables_section(made())
    kinds = [element.kind for element in section.elements]
    assert kinds[:3] == ["grid", "grid", "plots"]
    scores, verdicts, plot = section.elements[:3]
    texts = [[cell.text for cell in row] for row in scores.rows]  # type: ignore[union-attr]
    assert texts[1] == ["model 1", "1", "101.0", "51.0 ±1.5"]
    assert scores.rows[1][3].small == "paper: 70.25"  # type: ignore[union-attr]
    judged = [cell.text for cell in verdicts.rows[0]]  # type: ignore[union-attr]
    assert judged == ["model 1", "model 0", "k-NN", "+1.00", "+0.25 to +1.75", "+2.50", "holds"]
    assert plot.legend[3] == ("model 3", 3)  # type: ignore[union-attr]
    assert "plots" not in [element.kind for element in tables_section(made(3)).elements]  # too few


@pytest.mark.parametrize(
    ("value", "text"), [(0.08765, "0.0877"), (82.14, "82.1"), (-0.5, "-0.5"), (3472.4, "3,472"), (0.0, "0")]
)
def test_numbers_have_the_digits_that_matter(value: float, text: str) -> None:
    assert number(value) == text


def test_markdown() -> None:
    table = markdown_table(("a", "b"), [("x", "1")], (1,))
    assert table == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
