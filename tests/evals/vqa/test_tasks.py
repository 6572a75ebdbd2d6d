from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.vqa.benchmarks import TaskFiles, open_benchmark
from evals.vqa.records import read_predictions
from evals.vqa.scoring import Benchmark
from radio.errors import DataError


def gqa(tmp_path: Path, number: int = 4, **changes: Any) -> TaskFiles:
    record = {"question": "?", "isBalanced": True, "types": {"structural": "query", "semantic": "obj"}}
    data = {
        str(n): {**record, "imageId": str(n // 2), "answer": "cat" if n % 2 else "dog", **changes}
        for n in range(number)
    }
    path = tmp_path / "val_balanced_questions.json"
    path.write_text(json.dumps(data))
    return TaskFiles(questions=path, images=tmp_path / "images")


def test_questions_are_scored_in_their_order(tmp_path: Path) -> None:
    task = open_benchmark("gqa", gqa(tmp_path))
    assert (task.task, task.split, task.has_answers) == ("gqa", "val", True)
    scores = task.score({"3": "Cat.", "0": "dog", "1": "cow", "2": "dogs"})
    assert [question.id for question in task.questions] == ["0", "1", "2", "3"]
    assert scores.values == (1.0, 0.0, 0.0, 1.0)
    assert scores.images == ("0.jpg", "0.jpg", "1.jpg", "1.jpg")
    assert scores.metrics(seed=0)["accuracy"].value == 50.0


def test_missing_and_unknown_predictions(tmp_path: Path) -> None:
    task = open_benchmark("gqa", gqa(tmp_path))
    with pytest.raises(DataError, match="2 of the 4 questions of gqa val have no prediction, the first is 1"):
        task.score({"0": "dog", "2": "dog"})
    allowed = task.score({"0": "dog", "2": "dog"}, allow_missing=True)
    assert (allowed.values, allowed.missing) == ((1.0, 0.0, 1.0, 0.0), ("1", "3"))
    with pytest.raises(DataError, match="1 of the 2 predictions are for questions that gqa val does not ask"):
        task.score({"0": "dog", "99": "dog"}, allow_missing=True)


def test_a_limit_is_spread_and_keeps_groups_and_answers(tmp_path: Path) -> None:
    task = open_benchmark("gqa", gqa(tmp_path, 10), limit=3)
    assert [question.id for question in task.questions] == ["0", "3", "6"]
    assert [question.expected for question in task.questions] == ["dog", "cat", "dog"]
    assert task.num_questions == 10
    scores = task.score({str(n): "dog" for n in range(10)})  # the others are known, and not scored
    assert scores.values == (1.0, 0.0, 1.0)
    assert scores.groups["structural"] == ("query",) * 3
    assert len(open_benchmark("gqa", gqa(tmp_path, 10), limit=20).questions) == 10
    with pytest.raises(DataError, match="a limit of 0 leaves no questions"):
        open_benchmark("gqa", gqa(tmp_path), limit=0)


def test_the_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    first = open_benchmark("gqa", gqa(tmp_path)).fingerprint
    assert open_benchmark("gqa", gqa(tmp_path)).fingerprint == first
    assert open_benchmark("gqa", gqa(tmp_path, question="!")).fingerprint != first


def test_images_are_looked_for(tmp_path: Path) -> None:
    files = gqa(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").touch()
    with pytest.raises(DataError, match=r"1 of the 2 images of gqa val are not there, the first is 1\.jpg"):
        open_benchmark("gqa", files).check()
    (tmp_path / "images" / "1.jpg").touch()
    open_benchmark("gqa", files).check()
    with pytest.raises(DataError, match="no folder of images was given"):
        open_benchmark("gqa", TaskFiles(questions=files.questions)).check()


def vqav2(tmp_path: Path) -> TaskFiles:
    path = tmp_path / "test.json"
    asked = [{"question_id": n, "image_id": n, "question": "?"} for n in (5, 6)]
    path.write_text(json.dumps({"data_subtype": "test-dev2015", "questions": asked}))
    return TaskFiles(questions=path)


def test_a_split_without_answers_is_submitted(tmp_path: Path) -> None:
    task = open_benchmark("vqav2", vqav2(tmp_path))
    assert (task.split, task.has_answers) == ("test-dev", False)
    with pytest.raises(DataError, match=r"no right answers to vqav2 test-dev .* or write a submission"):
        task.score({"5": "a", "6": "b"})
    task.write_submission({"5": "Cat.", "6": "b"}, tmp_path / "out.json")
    assert read_predictions(tmp_path / "out.json") == {"5": "cat", "6": "b"}


def test_a_submission_is_of_all_questions_of_vqav2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answers all 2 questions, and the limit left 1"):
        open_benchmark("vqav2", vqav2(tmp_path), limit=1).write_submission({"5": "a"}, tmp_path / "out.json")
    with pytest.raises(DataError, match="gqa takes no EvalAI submission"):
        open_benchmark("gqa", gqa(tmp_path)).write_submission({}, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("task", ["vqav2", "textvqa", "scienceqa"])
def test_another_benchmarks_file(tmp_path: Path, task: Any) -> None:
    files = gqa(tmp_path)
    (tmp_path / "pid_splits.json").write_text('{"test": ["0"]}')
    if task == "scienceqa":
        files = TaskFiles(questions=files.questions, splits=tmp_path / "pid_splits.json")
    wanted = r"val_balanced_questions\.json: record 0: .*wanted .*the file looks like GQA's questions"
    with pytest.raises(DataError, match=wanted):
        open_benchmark(task, files)


def opened(task: Any, files: TaskFiles, **options: Any) -> Benchmark:
    return open_benchmark(task, files, **options)


def test_what_a_benchmark_does_not_read_is_refused(tmp_path: Path) -> None:
    path = gqa(tmp_path).questions
    for task, files, said in (
        (
            "gqa",
            TaskFiles(questions=path, annotations=path, ocr=True),
            "gqa does not read annotations and ocr",
        ),
        ("vqav2", TaskFiles(questions=path, splits=path), "vqav2 does not read splits"),
        ("textvqa", TaskFiles(questions=path, splits=path), "textvqa does not read splits"),
        ("scienceqa", TaskFiles(questions=path, ocr_file=path), "scienceqa does not read ocr_file"),
        ("gpa", TaskFiles(questions=path), "no benchmark 'gpa'; .*did you mean gqa"),
    ):
        with pytest.raises(DataError, match=said):
            opened(task, files)
    with pytest.raises(DataError, match="gqa has one rule, and got 'm4c'"):
        opened("gqa", gqa(tmp_path), rule="m4c")
    with pytest.raises(DataError, match="no rule 'loose'; there are official, m4c, llava"):
        opened("vqav2", vqav2(tmp_path), rule="loose")


def test_scienceqa_counts_what_is_missing_as_wrong(tmp_path: Path) -> None:
    problem = {"question": "?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": "image.png"}
    (tmp_path / "problems.json").write_text(json.dumps({"1": problem, "2": problem}))
    (tmp_path / "splits.json").write_text('{"test": ["1", "2"]}')
    files = TaskFiles(questions=tmp_path / "problems.json", splits=tmp_path / "splits.json")
    scores = open_benchmark("scienceqa", files).score({"2": "A"})
    assert (scores.values, scores.missing) == ((0.0, 1.0), ("1",))


def test_torch_is_not_needed() -> None:
    code = "import sys, evals.vqa.benchmarks, evals.vqa.scoring; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_would_stop_the_answers_at_the_end_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("0.jpg", "1.jpg", "COCO_test2015_000000000009.jpg"):
        (tmp_path / "images" / name).touch()
    open_benchmark("gqa", gqa(tmp_path)).check()
    with pytest.raises(DataError, match="4 questions of gqa val hold the mark <image> themselves, the first"):
        open_benchmark("gqa", gqa(tmp_path, question="Is <image> a tag?")).check()
    data = json.loads(gqa(tmp_path).questions.read_text())
    for record in data.values():
        del record["answer"]
    files = gqa(tmp_path)
    files.questions.write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"gqa takes no EvalAI submission here; .* files that hold the right"):
        open_benchmark("gqa", files).check()
