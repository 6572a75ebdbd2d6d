"""What the tables consist of, at both sizes: the paper's lines, runs that can be trained, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from evals.core import paper
from evals.knn import KnnSettings
from radio.config import read_yaml, to_plain, write_yaml
from radio.errors import ConfigError, DataError
from radio.students import TABLE_6, resolve_options, students
from train.config import TrainConfig
from train.recipes import recipes
from train.setup import check_settings
from train.tables import ALL_TABLES, CLAIMS, TABLES, describe_table, make_tables
from train.tables.layout import (
    SOURCES,
    SPREADS,
    Evaluation,
    Size,
    TableLayout,
    choose_runs,
    runs_of,
    seeds_of,
)
from train.tables.making import evaluation_settings, protocols_of, rows_of
from train.tables.paper_size import DATA_SETS, place_weights, use_data_sets
from train.tables.results import deciding_settings

BOTH: tuple[Size, ...] = ("small", "paper")
EVERY = [*((size, name) for size in BOTH for name in TABLES), *(("small", name) for name in CLAIMS)]


def table_of(name: str, size: Size) -> TableLayout:
    (table,) = make_tables(name, size)
    return table


@pytest.mark.parametrize(("size", "name"), EVERY)
def test_every_line_of_every_table_can_be_made(size: Size, name: str, tmp_path: Path) -> None:
    table = table_of(name, size)
    assert (table.name, table.size) == (name, size)
    assert describe_table(name) and table.title
    runs = runs_of(table, table.base, table.num_seeds)
    for config in runs.values():
        check_settings(config, 1 if size == "small" else 64)
        write_yaml(config, tmp_path / "config.yaml")
        own = replace(config, options=resolve_options(config.student, config.options))
        assert read_yaml(TrainConfig, tmp_path / "config.yaml") == own
        assert config.student in students
        assert config.out.parent == table.base.out
    alike = {json.dumps(deciding_settings(config)) for config in runs.values()}
    assert len(alike) == len(runs)  # no two are the same run
    labels = [line.label for line in table.lines]
    assert len(set(labels)) == len(labels)
    assert {line.against for line in table.lines} <= {"", *labels}
    assert {line.run for line in table.lines if line.run} == {
        run.rpartition("-seed")[0] or run for run in runs
    }
    assert all(bool(line.run) != bool(line.model) for line in table.lines)
    known = {*paper.DATA, *SOURCES, *SPREADS}
    assert set(table.columns) <= known


@pytest.mark.parametrize("name", TABLES)
def test_the_papers_size_has_every_line_and_column_of_the_paper(name: str) -> None:
    table = table_of(name, "paper")
    number = name.removeprefix("table")
    rows = [row for row in paper.ROWS if row.table == f"table {number}"]
    shown = [line.paper for line in table.lines]
    missing = [row.model for row in rows if row not in shown]
    assert missing == []
    columns = {column for row in rows for column in row.values}
    assert columns <= set(table.columns)


def test_the_seeds_and_the_shared_runs() -> None:
    for table in make_tables(ALL_TABLES, "small"):
        assert table.num_seeds == (1 if table.name in ("table6", "table10") else 3)
    given = [
        (table, runs_of(table, table.base, table.num_seeds)) for table in make_tables(ALL_TABLES, "small")
    ]
    rows = {row.name: row for row in rows_of(given)}
    base = rows["base-seed1"]
    assert base.config.seed == 1
    assert base.config.out == Path("runs/tables/small/base-seed1")
    keys = [evaluation.key for evaluation in base.evaluations]  # of tables 1 to 5
    assert keys == ["knn", "zeroshot", "seg", "seg-crop-216", "vqa"]
    assert [e.key for e in rows["vitdet-seed0"].evaluations] == [
        *("sam-window-3", "sam-window-4", "sam-window-6", "zeroshot", "knn", "seg")
    ]
    assert [row.name for row in rows.values()][:3] == ["scenes:clip", "scenes:dense", "scenes:sam"]


def test_runs_of_one_name_are_one_run() -> None:
    tables = make_tables("table2", "small") + make_tables("table3", "small")
    given = [
        (tables[0], runs_of(tables[0], tables[0].base, 1)),
        (tables[1], runs_of(tables[1], replace(tables[1].base, steps=7), 1)),
    ]
    with pytest.raises(ConfigError, match="two tables have different runs called base; make them one by one"):
        rows_of(given)


def test_a_model_that_two_tables_show_is_scored_by_one_protocol() -> None:
    tables = make_tables("table2", "small") + make_tables("table10", "small")
    other = replace(tables[1].base, tasks={"knn": KnnSettings(k=(20,))})
    lines = tuple(replace(line, model="scenes:clip") for line in tables[0].lines[:1])
    first = replace(tables[0], lines=tuple(replace(line, run="") for line in lines))
    with pytest.raises(ConfigError, match="two tables score scenes:clip by different settings; make them"):
        rows_of([(first, {}), (replace(tables[1], base=other), {})])
    large = {row.name: row for row in rows_of([_runs(t) for t in make_tables(ALL_TABLES, "paper")])}
    assert protocols_of(large["sam:vit_h"])["vqa-llava"].image_tokens == 1024
    assert protocols_of(large["radio-v1"])["vqa-llava"].ocr


def test_the_tables_need_every_benchmark_of_a_data_root(tmp_path: Path) -> None:
    (table,) = make_tables("table10", "paper")
    for name in ("llava", "gqa", "textvqa"):
        (tmp_path / name).mkdir()
    (tmp_path / "data.yaml").write_text(
        "imagenet: in\nade20k: ade\nvoc: voc\n"
        "llava: {pretrain-data: p, pretrain-images: a, instruct-data: i, instruct-images: b}\n"
        "gqa: {questions: q, images: g}\ntextvqa: {questions: q, images: g}\n"
    )
    row = rows_of([(replace(table, base=replace(table.base, data_root=tmp_path)), {})])[0]
    with pytest.raises(
        ConfigError, match=r"vqa: .* has not sqa, vqav2, language-model, which the tables need"
    ):
        evaluation_settings(row)


def test_ocr_tokens_are_looked_for_before_the_first_row(tmp_path: Path) -> None:
    (table,) = make_tables("table10", "paper")
    row = {"question_id": 1, "image_id": "a", "question": "What?", "answers": ["x"] * 10}
    (tmp_path / "q.json").write_text(json.dumps({"dataset_type": "val", "data": [row]}))
    (tmp_path / "data.yaml").write_text(
        "imagenet: in\nade20k: ade\nvoc: voc\nlanguage-model: lm\n"
        "llava: {pretrain-data: p, pretrain-images: a, instruct-data: i, instruct-images: b}\n"
        "gqa: {questions: q, images: g}\nvqav2: {questions: q, images: g}\n"
        "sqa: {questions: q, images: g, splits: s}\ntextvqa: {questions: q.json, images: g}\n"
    )
    base = replace(table.base, data_root=tmp_path)
    rows = rows_of([(replace(table, base=base), {})])
    with pytest.raises(DataError, match=r"q\.json: the questions hold no 'ocr_tokens'; give the file of OCR"):
        evaluation_settings(rows[0])
    (tmp_path / "q.json").write_text(
        json.dumps({"dataset_type": "val", "data": [{**row, "ocr_tokens": ["x"]}]})
    )
    assert evaluation_settings(rows[0])["vqa-llava"].ocr


def test_runs_are_chosen_by_name_with_or_without_their_seed() -> None:
    table = table_of("table2", "small")
    runs = runs_of(table, table.base, 2)
    assert list(choose_runs(runs, ())) == list(runs)
    assert list(choose_runs(runs, ("base", "no-spatial-seed1"))) == [
        "no-spatial-seed1",
        "base-seed0",
        "base-seed1",
    ]
    assert seeds_of(runs, "spatial-clip") == ["spatial-clip-seed0", "spatial-clip-seed1"]
    with pytest.raises(ConfigError, match="no row 'bas'; did you mean base"):
        choose_runs(runs, ("bas",))


def test_the_names_of_evaluations() -> None:
    assert Evaluation("seg", "voc").key == "seg-voc"
    assert Evaluation("sam", "coco", 9).key == "sam-coco-window-9"
    assert Evaluation("seg", options=(("crop", 216),)).key == "seg-crop-216"


def test_the_papers_settings() -> None:
    runs = {row.name: row.config for row in rows_of([_runs(t) for t in make_tables(ALL_TABLES, "paper")])}
    assert {name: run.data for name, run in runs.items() if name.startswith("a-")} == {
        f"a-{name}": data for name, data in DATA_SETS.items()
    }
    for name in ("a-imagenet", "b-laion"):
        config = runs[name]
        large = name.startswith("a-")
        assert config.student == ("vit-l14" if large else "vit-h14")
        assert (
            config.teachers[0].model.partition("@")[0] == f"openclip:ViT-H-14{'' if large else '-quickgelu'}"
        )
        assert (config.batch_size, config.steps, config.resolution) == (1024, 600_000, 224)
    six = [config for config in runs.values() if config.batch_size == 4096]
    assert {config.student for config in six} >= {f"timm:{name}" for name in TABLE_6}
    assert {config.resolution for config in six} == {224}
    assert runs["b14-naive"].student == recipes["paper-b14"]().student == "vit-b14"
    assert runs["vitdet-h14"].teachers == recipes["paper-h14"]().teachers
    assert not to_plain(runs["no-cpe"].options)["cpe"]
    assert runs["mean"].summary == "mean"
    first = runs["radio-v1"]
    assert [teacher.name for teacher in first.teachers] == ["clip", "openai-clip", "dino"]
    assert to_plain(first.options)["registers"] == 5


def test_data_sets_and_weights_are_those_of_the_data_root(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("imagenet: in1k\nlaion: shards/{000..009}.tar\nweights: /w\n")
    (table,) = make_tables("table1", "paper")
    runs = runs_of(table, replace(table.base, data_root=tmp_path), 1)
    placed = {name: use_data_sets(run) for name, run in runs.items()}
    assert placed["a-imagenet"].data.images == (tmp_path / "in1k" / "train",)
    assert placed["a-imagenet"].data.shards == ()
    assert placed["b-laion"].data.shards == (str(tmp_path / "shards" / "{000..009}.tar"),)
    assert placed["b-datacomp"].data == DATA_SETS["datacomp"]  # not named: where it is expected
    assert (
        placed["a-laion"].teachers[0].model == "openclip:ViT-H-14@/w/open_clip_vit_h14_laion2b_s32b_b79k.bin"
    )
    assert place_weights("scenes:clip", placed["a-laion"]) == "scenes:clip"
    own = replace(runs["a-laion"], data=replace(runs["a-laion"].data, shards=("mine.tar",)))
    assert use_data_sets(own).data.shards == ("mine.tar",)
    assert use_data_sets(table.base) == table.base  # no data root
    with pytest.raises(ConfigError, match="no such file or folder"):
        use_data_sets(replace(table.base, data_root=tmp_path / "absent"))


def test_a_command_of_the_data_root_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("laion: 'pipe:cat {000..009}.tar'\ndatacomp: https://h/{0..9}.tar\n")
    (table,) = make_tables("table1", "paper")
    runs = runs_of(table, replace(table.base, data_root=tmp_path), 1)
    with pytest.raises(ConfigError) as caught:
        use_data_sets(runs["a-laion"])
    assert str(caught.value) == (
        f"{tmp_path}: laion would run the command 'cat 000.tar'; where you trust it, add --allow-pipes, or "
        f"else give your own --data.shards"
    )
    allowed = use_data_sets(runs["a-laion"], allow_pipes=True)
    assert allowed.data.shards == ("pipe:cat {000..009}.tar",)
    assert use_data_sets(runs["a-datacomp"]).data.shards == ("https://h/{0..9}.tar",)  # runs no shell
    own = replace(runs["a-laion"], data=replace(runs["a-laion"].data, shards=("pipe:cat mine.tar",)))
    assert use_data_sets(own).data.shards == ("pipe:cat mine.tar",)  # of the command line


def _runs(table: TableLayout) -> tuple[TableLayout, dict[str, TrainConfig]]:
    return table, runs_of(table, table.base, table.num_seeds)
