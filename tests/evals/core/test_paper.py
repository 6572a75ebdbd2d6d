"""The paper's tables as data: what its text says, row by row."""

from __future__ import annotations

import pytest

from evals.core.paper import (
    DATA,
    HEADLINE,
    ROWS,
    TABLE_6,
    TABLE_6_MODELS,
    TASKS,
    PaperRow,
    rows_for,
    table_6_row,
)
from radio.students import students

COUNTS = (10, 4, 3, 4, 2, 19, 8, 6 + 3, 4, 6, 8)  # rows of tables 1 to 11; table 8 has a second part


def find(model: str, table: str) -> dict[str, float]:
    (row,) = [row for row in ROWS if row.model == model and row.table == table]
    return dict(row.values)


def test_rows_are_those_of_the_paper() -> None:
    # Copied from the paper by hand, a row of each table.
    assert find("RADIO ViT-B/14, AdaLoss balancing", "table 3") == {
        "zeroshot": 71.31,
        "knn": 79.77,
        "ade20k": 44.36,
    }
    assert find("RADIO, config B, LAION-400M", "table 1") == {"knn": 83.77, "zeroshot": 77.46, "ade20k": 48.6}
    assert find("RADIO, spatial loss of DINOv2", "table 2") == {
        "zeroshot": 74.68,
        "knn": 83.02,
        "ade20k": 47.05,
    }
    assert find("RADIO ViT-L/14 with CPE", "table 4") == {"knn": 82.84, "ade20k": 48.52}
    assert find("RADIO, average pooling", "table 5") == {
        "summary_loss": 0.05,
        "feature_loss": 0.12,
        "zeroshot": 80.12,
        "knn": 83.83,
        "ade20k": 38.36,
        "voc": 77.04,
        "gqa": 70.92,
        "sqa": 65.84,
        "textvqa": 54.26,
        "vqav2": 78.28,
    }
    assert find("MViTV2-B", "table 6") == {
        "parameters": 51,
        "zeroshot": 75.92,
        "knn": 81.39,
        "ade20k": 41.39,
        "images_per_second": 975,
        "feature_loss": 0.345,
    }
    assert find("DINOv2 ViT-g/14", "table 7") == {
        "knn": 83.41,
        "ade20k": 47.53,
        "voc": 82.95,
        "gqa": 69.29,
        "sqa": 64.60,
        "textvqa": 45.25,
        "vqav2": 74.56,
        "images_per_second": 344,
    }
    assert find("RADIO ViTDet-H/14, window 9", "table 8") == {"coco": 75.31, "images_per_second": 8.04}
    assert find("SAM-CLIP ViTDet-B/16", "table 9") == {"zeroshot": 71.7, "ade20k": 38.4}
    assert find("SAM ViTDet-H/16", "table 10")["knn"] == 22.39
    assert find("RADIO ViT-H/14", "table 11")["vqav2"] == 77.66
    assert find("RADIO ViT-H/14", "table 7")["vqav2"] == 77.88


def test_the_misprinted_header_of_table_8_is_put_right() -> None:
    for model in ("SAM ViTDet-L/16", "SAM ViTDet-H/16"):
        wanted = find(model, "table 10")
        small = find(model, "table 8")
        assert small == {name: wanted[name] for name in ("knn", "ade20k", "voc")}
    assert find("RADIO ViTDet-H/14", "table 8") == {"zeroshot": 76.17, "knn": 83.34, "ade20k": 49.01}


def test_the_footnote_of_table_7_is_with_its_row() -> None:
    row = next(row for row in ROWS if (row.model, row.table) == ("RADIO ViT-H/14", "table 7"))
    assert row.remark.endswith("DFN CLIP among the teachers, whose zero-shot is 84.37 (footnote of table 7)")


def test_a_model_with_different_numbers_in_two_tables_has_a_remark_on_each() -> None:
    first: dict[tuple[str, str], PaperRow] = {}
    for row in ROWS:
        for name, value in row.values.items():
            other = first.setdefault((row.model, name), row)
            if other.values[name] != value and row.table != "table 9":  # which gives one digit less
                assert row.remark and other.remark, (row, other)


def test_every_number_is_explained_and_names_its_source() -> None:
    names = [(row.model, row.table) for row in ROWS]
    assert len(set(names)) == len(names) == sum(COUNTS)
    numbers = [int(row.table.removeprefix("table ")) for row in ROWS]
    assert [numbers.count(table) for table in range(1, 12)] == list(COUNTS)
    assert numbers == sorted(numbers)
    for row in ROWS:
        assert set(row.values) <= set(DATA)
        assert row.source.startswith("AM-RADIO, CVPR 2024, table ")
    assert all(name in DATA for names in TASKS.values() for name in names)
    assert [row.kind for row in HEADLINE] == ["student", "student"]


@pytest.mark.parametrize(("task", "count"), [("sam", 6), ("zeroshot", 53), ("vqa", 24), ("throughput", 0)])
def test_a_task_has_the_rows_that_say_something_of_it(task: str, count: int) -> None:
    assert len(rows_for(task)) == count


def test_every_row_of_table_6_has_a_name_of_ours_in_its_order() -> None:
    assert list(TABLE_6_MODELS.values()) == [row.model for row in TABLE_6]
    assert all(name in students for name in TABLE_6_MODELS if not name.startswith(("dinov2", "openclip")))
    row = table_6_row("dinov2:vitg14@weights/dinov2.pth")
    assert row is not None and row.values["images_per_second"] == 313
    assert table_6_row("vit-tiny12") is None
