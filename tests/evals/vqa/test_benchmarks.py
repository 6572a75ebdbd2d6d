from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from evals.vqa.benchmarks import write_benchmarks
from evals.vqa.tasks import TASKS, Task, TaskData, TaskFiles, open_task
from radio.errors import DataError
from radio.scenes import questions, render

COUNT = 120  # every class of the world twice


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Task, TaskFiles]:
    return write_benchmarks(tmp_path_factory.mktemp("world") / "vqa", COUNT, 3, size=32)


def constant(task: TaskData, answer: str) -> float:
    return task.score({question.id: answer for question in task.questions}).metrics()["accuracy"].value


@pytest.mark.parametrize("name", TASKS)
def test_its_own_answers_are_all_right(files: dict[Task, TaskFiles], name: Task) -> None:
    task = open_task(name, files[name])
    answers = {question.id: said for question, said in zip(task.questions, task.expected, strict=True)}
    metrics = task.score(answers).metrics()
    assert {metric.value for metric in metrics.values()} == {100.0}
    assert task.check_images() == files[name].images
    assert constant(task, "nothing of the kind") == 0.0


@pytest.mark.parametrize("name", ["gqa", "vqav2"])
def test_constant_answers_are_at_chance_of_their_kind(files: dict[Task, TaskFiles], name: Task) -> None:
    task = open_task(name, files[name])
    kinds = Counter(
        question.kind
        for n in range(COUNT)
        for question in questions(render(n, split="val", seed=3), n, split="val", seed=3)
    )
    shares = {"yes": ("exists", 2), "red": ("colour", 6), "star": ("shape", 10), "2": ("count", 4)}
    for answer, (kind, choices) in shares.items():
        chance = 100 * kinds[kind] / choices / len(task.questions)  # type: ignore[index]
        assert constant(task, answer) == pytest.approx(chance, abs=3.0), answer


def test_constant_answers_to_colours_shapes_and_letters(files: dict[Task, TaskFiles]) -> None:
    text = open_task("textvqa", files["textvqa"])
    assert constant(text, "red") == pytest.approx(100 / 12, abs=0.1)
    assert constant(text, "star") == pytest.approx(100 / 20, abs=0.1)
    school = open_task("scienceqa", files["scienceqa"])
    assert [constant(school, letter) for letter in "ABCD"] == [25.0] * 4
    assert constant(school, "E") == 0.0


def test_people_disagree_and_no_rule_minds(files: dict[Task, TaskFiles]) -> None:
    annotations = files["vqav2"].annotations
    assert annotations is not None
    given = [
        [answer["answer"] for answer in annotation["answers"]]
        for annotation in json.loads(annotations.read_text())["annotations"]
    ]
    unanimous = sum(len(set(answers)) == 1 for answers in given)
    assert 0.35 < unanimous / len(given) < 0.65
    assert min(Counter(answers).most_common(1)[0][1] for answers in given) >= 7
    task = open_task("vqav2", files["vqav2"], rule="m4c")
    assert constant(task, "Yes.") == pytest.approx(constant(task, "yes"))


def test_the_images_are_the_worlds(files: dict[Task, TaskFiles]) -> None:
    for name in TASKS:
        task = open_task(name, files[name])
        assert task.images is not None
        question = task.questions[0]
        assert question.image is not None
        with Image.open(task.images / question.image) as image:
            assert (image.size, image.mode) == ((32, 32), "RGB")
    assert open_task("scienceqa", files["scienceqa"], limit=1).questions[0].image == "test/1/image.png"


def test_ocr_tokens_tell_nothing(files: dict[Task, TaskFiles]) -> None:
    data = json.loads(files["textvqa"].questions.read_text())["data"]
    assert {len(record["ocr_tokens"]) for record in data} == {0, 1, 2, 3}
    with_ocr = open_task(
        "textvqa", TaskFiles(questions=files["textvqa"].questions, ocr=True, images=files["textvqa"].images)
    )
    assert all("\nReference OCR token: " in question.prompt for question in with_ocr.questions)


def test_the_seed_decides_and_what_is_there_stays(tmp_path: Path) -> None:
    first = write_benchmarks(tmp_path / "a", 3, 1, size=32)
    kept = first["gqa"].questions.stat().st_mtime_ns
    assert write_benchmarks(tmp_path / "a", 3, 1, size=32) == first
    assert first["gqa"].questions.stat().st_mtime_ns == kept
    again = write_benchmarks(tmp_path / "b", 3, 1, size=32)
    other = write_benchmarks(tmp_path / "c", 3, 2, size=32)
    for name in TASKS:
        assert again[name].questions.read_bytes() == first[name].questions.read_bytes()
        assert other[name].questions.read_bytes() != first[name].questions.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="benchmarks of 0 images hold no questions"):
        write_benchmarks(tmp_path / "a", 0, 1)
    write_benchmarks(tmp_path / "a", 1, 1, size=32)
    with pytest.raises(DataError, match="holds something else than what is asked for"):
        write_benchmarks(tmp_path / "a", 2, 1, size=32)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(DataError, match=r"and no benchmarks\.json; move it away"):
        write_benchmarks(tmp_path / "mine", 1, 1)
    (tmp_path / "empty").mkdir()
    write_benchmarks(tmp_path / "empty", 1, 1, size=32)
