"""The generated world: conversations that are true and give no later answer away, and four benchmarks."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evals.core.evaluator import EvalRun, RunSettings
from evals.vqa.scenes import (
    Scenes,
    benchmarks,
    conversations_about,
    describe_questions,
    describe_training,
    load_scenes,
    training_images,
    training_records,
)
from evals.vqa.scoring import TASKS, Benchmark, Task
from radio.images import decode
from radio.scenes import COLOURS, SHAPES, questions, render

COUNT = 120  # every class of the world twice


def context(cache: Path, seed: int) -> EvalRun:
    return EvalRun(RunSettings(cache=cache, seed=seed), base="", folder=cache)


def load(cache: Path, count: int, seed: int = 3) -> Scenes:
    return load_scenes(context(cache, seed), "val", count, describe_questions)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Benchmark]:
    scenes = load(tmp_path_factory.mktemp("cache"), COUNT)
    return dict(zip(TASKS, benchmarks(scenes, TASKS), strict=True))


def constant(benchmark: Benchmark, answer: str) -> float:
    answers = {question.id: answer for question in benchmark.questions}
    return benchmark.score(answers).metrics()["accuracy"].value


def test_answers_are_true_and_not_told_before() -> None:
    kinds = set()
    for index in range(40):
        scene = render(index, split="train", seed=0)
        main = scene.objects[0]
        truth = (COLOURS[main.colour], SHAPES[main.shape])
        for talk in conversations_about(scene, index, 0):
            said = ""
            for question, answer in talk:
                kinds.add(question.split()[0])
                if "What colour" in question or "What shape" in question:
                    word = truth["What shape" in question]
                    lines = dict(line.split(". ", 1) for line in question.splitlines() if line[1:2] == ".")
                    assert lines.get(answer, answer) == word
                    assert word not in said.split()
                if question.startswith("How many"):
                    assert answer == str(len(scene.objects))
                said += f" {question.split(chr(10))[0].rstrip('?')} {answer}"
    assert kinds == {"What", "Is", "How", "Context:"}


def test_the_records_of_both_stages(tmp_path: Path) -> None:
    scenes = load_scenes(context(tmp_path, 0), "train", 3, describe_training)
    records = training_records(scenes)
    captions, talks = records["pretrain"], records["instruct"]
    assert len(captions) == 3 and len(talks) > 15
    assert {record.image for record in talks} - {None} == {record.image for record in captions}
    assert 0 < sum(record.image is None for record in talks) <= len(talks) / 8
    images = training_images(scenes, captions)
    assert images.keys == ("00000000.png", "00000001.png", "00000002.png")
    assert torch.equal(images.read(1), torch.from_numpy(render(1, split="train", seed=0).image))
    assert images.fingerprint != training_images(scenes, captions[:2]).fingerprint


@pytest.mark.parametrize("name", TASKS)
def test_its_own_answers_are_all_right(world: dict[Task, Benchmark], name: Task) -> None:
    benchmark = world[name]
    answers = {question.id: question.expected for question in benchmark.questions}
    metrics = benchmark.score(answers).metrics()
    assert {metric.value for metric in metrics.values()} == {100.0}
    benchmark.check()
    assert constant(benchmark, "nothing of the kind") == 0.0


@pytest.mark.parametrize("name", ["gqa", "vqav2"])
def test_constant_answers_are_at_chance_of_their_kind(world: dict[Task, Benchmark], name: Task) -> None:
    kinds = Counter(
        question.kind
        for n in range(COUNT)
        for question in questions(render(n, split="val", seed=3), n, split="val", seed=3)
    )
    shares = {"yes": ("exists", 2), "red": ("colour", 6), "star": ("shape", 10), "2": ("count", 4)}
    for answer, (kind, choices) in shares.items():
        chance = 100 * kinds[kind] / choices / len(world[name].questions)  # type: ignore[index]
        assert constant(world[name], answer) == pytest.approx(chance, abs=3.0), answer


def test_constant_answers_to_colours_shapes_and_letters(world: dict[Task, Benchmark]) -> None:
    assert constant(world["textvqa"], "red") == pytest.approx(100 / 12, abs=0.1)
    assert constant(world["textvqa"], "star") == pytest.approx(100 / 20, abs=0.1)
    assert [constant(world["scienceqa"], letter) for letter in "ABCD"] == [25.0] * 4
    assert constant(world["scienceqa"], "E") == 0.0


def test_people_disagree_and_no_rule_minds(world: dict[Task, Benchmark], tmp_path: Path) -> None:
    people = [one.score.keywords["truths"] for one in world["vqav2"].questions]  # type: ignore[union-attr]
    unanimous = sum(len(set(answers)) == 1 for answers in people)
    assert 0.35 < unanimous / len(people) < 0.65
    assert min(Counter(answers).most_common(1)[0][1] for answers in people) >= 7
    (lenient,) = benchmarks(load(tmp_path, COUNT), ["vqav2"], rule="m4c")
    assert constant(lenient, "Yes.") == pytest.approx(constant(lenient, "yes"))


def test_names_and_groups_are_those_of_the_real_benchmarks(world: dict[Task, Benchmark]) -> None:
    found = {task: benchmark.questions[0] for task, benchmark in world.items()}
    assert [(one.id, one.image) for one in found.values()] == [
        ("00000000", "scene0000000.jpg"),
        ("1000", "COCO_val2014_000000000001.jpg"),
        ("0", "scene0000000.jpg"),
        ("1", "test/1/image.png"),
    ]
    assert [benchmark.name for benchmark in world.values()] == [
        *("gqa val", "vqav2 val", "textvqa val", "scienceqa test")
    ]
    assert {task: list(benchmark.groups) for task, benchmark in world.items()} == {
        "gqa": ["structural", "semantic", "form"],
        "vqav2": ["answer_type"],
        "textvqa": [],
        "scienceqa": ["subject", "grade", "topic"],
    }


def test_the_images_are_the_worlds(world: dict[Task, Benchmark]) -> None:
    """Photographs are decoded from JPEG, drawings are as they were rendered."""
    frame = render(0, split="val", seed=3).image
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.save(file, format="JPEG", quality=95, subsampling=0)
    for task, benchmark in world.items():
        source = benchmark.images
        assert source is not None and not isinstance(source, Path)
        row = source.keys.index(str(benchmark.questions[0].image))
        expected = torch.from_numpy(frame) if task == "scienceqa" else decode(file.getvalue())
        assert torch.equal(source.read(row), expected)


def test_the_seed_decides_and_the_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = load(tmp_path, 3, seed=1), load(tmp_path, 3, seed=2)
    assert not np.array_equal(first.frames, other.frames)
    calls = []
    monkeypatch.setattr("evals.vqa.scenes.render", lambda *a, **k: calls.append(a) or render(*a, **k))
    again = load(tmp_path, 3, seed=1)
    assert np.array_equal(first.frames, again.frames) and first.facts == again.facts
    assert len(calls) == 1  # the sample in the key
    (limited,) = benchmarks(first, ["gqa"], limit=1)
    assert len(limited.questions) == 1 and limited.images.keys == ("scene0000000.jpg",)  # type: ignore[union-attr]
    prints = [benchmarks(scenes, ["gqa"])[0].fingerprint for scenes in (first, again, other)]
    assert prints[0] == prints[1] != prints[2]


def test_damaged_scenes_are_rendered_again(tmp_path: Path) -> None:
    whole = load(tmp_path, 2)
    (path,) = tmp_path.rglob("*.safetensors")
    data = path.read_bytes()
    for content in (data[:-5], data.replace(b"colour", b"colonr"), b"[" * 1000, None):
        if content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(content)
        run = context(tmp_path, 3)
        again = load_scenes(run, "val", 2, describe_questions)
        assert np.array_equal(again.frames, whole.frames) and again.facts == whole.facts
        assert "1 damaged file of the cache was made again" in run.damage.notes()[0]
