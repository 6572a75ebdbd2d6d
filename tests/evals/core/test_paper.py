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
    rows_for,
    table_6_row,
)
from radio.students import students


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
    assert find("MViTV2-B", "table 6") == {
        "zeroshot": 75.92,
        "knn": 81.39,
        "ade20k": 41.39,
        "images_per_second": 975,
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
    assert find("SAM ViTDet-H/16", "table 10")["knn"] == 22.39


def test_every_number_is_explained_and_names_its_source() -> None:
    names = [(row.model, row.table) for row in ROWS]
    assert len(set(names)) == len(names) == 3 + 19 + 8 + 6 + 1
    for row in ROWS:
        assert set(row.values) <= set(DATA)
        assert row.source.startswith("AM-RADIO, CVPR 2024, table ")
    assert all(name in DATA for names in TASKS.values() for name in names)
    assert [row.kind for row in HEADLINE] == ["student", "student"]


@pytest.mark.parametrize(("task", "count"), [("sam", 6), ("zeroshot", 26), ("vqa", 9), ("throughput", 0)])
def test_a_task_has_the_rows_that_say_something_of_it(task: str, count: int) -> None:
    assert len(rows_for(task)) == count


def test_every_row_of_table_6_has_a_name_of_ours_in_its_order() -> None:
    assert list(TABLE_6_MODELS.values()) == [row.model for row in TABLE_6]
    assert all(name in students for name in TABLE_6_MODELS if not name.startswith(("dinov2", "openclip")))
    row = table_6_row("dinov2:vitg14@weights/dinov2.pth")
    assert row is not None and row.values["images_per_second"] == 313
    assert table_6_row("vit-tiny12") is None
