"""What stands in a run folder stays good: no NaN replaces weights, no second trainer tears at it."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from radio import checkpoint, entry
from radio.config import write_yaml
from radio.errors import RadioError
from radio.model import make_student
from radio.students import StudentOptions, students
from train.config import TrainConfig
from train.data.loader import Batch
from train.loggers import JsonLines
from train.losses import Losses
from train.monitor import first_bad
from train.trainer import Trainer

from .conftest import TEACHERS, Start, read_records, same_weights, untimed
from .test_damaged_states import resealed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """With one teacher."""
    return replace(config, teachers=TEACHERS[:1])


def poison_weight(run: Trainer, step: int, name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a weight become something else in a step whose losses and gradients are finite."""
    genuine = run.train_step

    def advance(batch: Batch) -> None:
        genuine(batch)
        if run.step + 1 == step:
            with torch.no_grad():
                dict(run.model.named_parameters())[name].view(-1)[0] = value

    monkeypatch.setattr(run, "train_step", advance)


@pytest.mark.parametrize(
    ("value", "ema"),
    [(float("nan"), 0.9), pytest.param(float("inf"), 0.0, marks=pytest.mark.slow)],
)
def test_weights_that_are_not_finite_never_replace_good_ones(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch, value: float, ema: float
) -> None:
    run = start(config, ema=ema)
    name = list(dict(run.model.named_parameters()))[3]
    poison_weight(run, 10, name, value, monkeypatch)
    wanted = (
        rf"step 10: weights\.model\.{name} is not finite any more, though losses and gradients were; "
        rf"what was saved at step 5 stands\. Begin anew with --restart and a lower --optim\.lr"
    )
    with pytest.raises(RadioError, match=wanted):
        run.train()
    for file in ("ckpt.pt", *(["ckpt-ema.pt"] if ema else [])):
        found = checkpoint.load(config.out / file)
        assert found.metadata["provenance"]["step"] == 5
        assert first_bad(found.tensors) == ""
    assert sorted(path.name for path in (config.out / "state").iterdir()) == ["step-000005"]
    start(config, ema=ema).train()  # it was this once
    start(config, out=config.out / "whole", ema=ema).train()
    assert same_weights(config.out, config.out / "whole")


def test_a_state_of_nan_is_not_gone_on_from(config: TrainConfig, start: Start) -> None:
    start(config, steps=10).train()
    newest = config.out / "state" / "step-000010"
    (file,) = newest.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("weights.") and tensors[name].numel() > 1)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, file)
    resealed(newest)
    before = (config.out / "ckpt.pt").read_bytes()
    run = start(config, steps=10)
    assert run.step == 5
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"step-000010: damaged, and left aside ({name} is not finite in it)" in told
    assert (config.out / "ckpt.pt").read_bytes() == before
    run.train()
    assert start(config, steps=10).step == 10


def set_counts(state: Path, count: float, which: slice = slice(None)) -> None:
    """Let the optimizer of a state say another step, with valid checksums."""
    (file,) = state.glob("*.safetensors")
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("optimizer.step.")][which]:
        tensors[name].fill_(count)
    save_file(tensors, file)
    resealed(state)


@pytest.mark.parametrize(
    ("which", "count"), [pytest.param("all", 11.0, marks=pytest.mark.slow), ("one", 3.0)]
)
def test_a_state_whose_optimizer_is_of_another_step_is_not_gone_on_from(
    config: TrainConfig, start: Start, which: str, count: float
) -> None:
    start(config, steps=10).train()
    newest = config.out / "state" / "step-000010"
    set_counts(newest, count, slice(None) if which == "all" else slice(1))
    run = start(config, steps=10)
    assert run.step == 5
    (told,) = run.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    wanted = (
        rf"step-000010: damaged, and left aside \(optimizer\.step\.\S+ is {count:g} in it, after 10 steps of"
    )
    assert re.search(wanted, told)
    shutil.rmtree(config.out / "state" / "step-000005")
    with pytest.raises(
        RadioError, match=r"not a whole training state; start again with --restart \(step-0+10:"
    ):
        start(config, steps=10)


def test_steps_that_were_left_out_do_not_count_for_the_optimizer(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "compute_gradients", unfit_learning({2}))
    run = start(config, steps=5, log_every=5)
    run.train()
    assert {float(t) for name, t in run.state_tensors().items() if "optimizer.step" in name} == {4.0}
    assert start(config, steps=5).step == 5


@pytest.mark.parametrize(
    ("unfit", "rise", "said"),
    [
        ({}, 1.0, ""),
        (
            {1, 2},
            1.0,
            "warning: 2 of the 3 steps were left out, not finite: the weights may be useless; begin",
        ),
        ({2}, 1.0, "warning: 1 of the 3 steps were left out"),
        ({}, 9.0, "warning: the loss rose from "),
        ({2}, 9.0, "steps were left out, not finite, the loss rose from "),
    ],
)
def test_a_run_that_ends_with_doubtful_weights_says_so_in_one_line(
    config: TrainConfig,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    unfit: set[int],
    rise: float,
    said: str,
) -> None:
    monkeypatch.setattr(Trainer, "compute_gradients", unfit_learning(unfit, rise))
    run = start(config, steps=3, log_every=3)
    run.train()
    told = run.console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    lines = [line for line in told if line.startswith("warning")]
    assert len(lines) == bool(said)
    assert said in "".join(lines)
    again = start(config, steps=3, log_every=3)  # which knows the first loss too
    assert run.first is not None and again.first == run.first


def test_a_state_after_a_first_loss_that_was_not_finite(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state can be read, and the first finite loss counts, whether the run was stopped or not."""
    monkeypatch.setattr(Trainer, "compute_gradients", unfit_learning({0}, first=math.nan))
    run = start(config, steps=3, save_every=1, keep_last=3)
    run.train()
    for step in (3, 2):
        shutil.rmtree(config.out / f"state/step-{step:06d}")
    again = start(config, steps=3, save_every=1, keep_last=3)
    assert (again.step, again.first) == (1, None)
    again.train()
    assert run.first is not None and run.first.isfinite() and again.first == run.first


def unfit_learning(unfit: set[int], rise: float = 1.0, first: float = 1.0) -> Callable[..., Any]:
    """`compute_gradients` with gradients not finite in some steps; `first` and `rise` multiply the losses."""
    genuine = Trainer.compute_gradients

    def compute(trainer: Trainer, batch: Batch) -> tuple[list[Losses], Tensor, Tensor]:
        losses, total, norm = genuine(trainer, batch)
        total = total * (rise if trainer.step else first)
        return losses, total, norm * torch.inf if trainer.step in unfit else norm

    return compute


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("ema", "harm"), [(0.0, remove), (0.5, remove), (0.0, cut), (0.5, empty)])
def test_checkpoints_that_are_gone_or_damaged_after_the_end_are_written_again(
    config: TrainConfig, start: Start, ema: float, harm: Callable[[Path], None]
) -> None:
    names = ["ckpt.pt", *(["ckpt-ema.pt"] if ema else [])]
    start(config, steps=3, ema=ema).train()
    before = {name: checkpoint.load(config.out / name) for name in names}
    harm(config.out / names[-1])
    run = start(config, steps=3, ema=ema)
    run.train()
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert told == f"written again from the state of step 3: {names[-1]}\n"
    for name in names:
        after = checkpoint.load(config.out / name)
        assert after.metadata == before[name].metadata
        assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before[name].tensors.items())


def test_no_state_outlives_the_records_of_its_steps(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for the log while steps 4 to 6 are done; a state of step 5 would lose them."""
    start(config, out=config.out / "whole").train()
    out = config.out / "full"
    run = start(config, out=out)
    genuine = JsonLines.flush

    def flush(log: JsonLines) -> str:
        return "No space left on device" if 3 <= run.step <= 5 else genuine(log)

    monkeypatch.setattr(JsonLines, "flush", flush)
    run.train()
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "metrics.jsonl could not be written (No space left on device); its records are kept until" in told
    assert "no state of step 5 is written before the log is (No space left on device)" in told
    assert [path.name for path in sorted((out / "state").iterdir())] == ["step-000010", "step-000012"]
    assert untimed(out) == untimed(config.out / "whole")
    assert same_weights(out, config.out / "whole")


HOLD = """
import sys
from pathlib import Path
from radio.resources import locked
with locked(Path(sys.argv[1]), "trained"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_trainer_in_a_run_folder_is_refused(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml(replace(config, steps=1), tmp_path / "settings.yaml")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        half = config.out / "state" / "step-000001.tmp"
        half.mkdir(parents=True)  # the first one is writing it
        assert entry.train([str(tmp_path / "settings.yaml")]) == 2
        said = capsys.readouterr().err
        assert f"run: is being trained already, by process {first.pid} on " in said
        assert half.is_dir()
        assert not (config.out / "config.yaml").exists()
        first.communicate("")
    assert entry.train([str(tmp_path / "settings.yaml")]) == 0
    assert [record["step"] for record in read_records(config.out)] == [1]
    assert not (config.out / ".lock").exists()


def test_a_run_that_never_began_leaves_no_settings(
    config: TrainConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_yaml(replace(config, teachers=(replace(config.teachers[0], fingerprint="x"),)), tmp_path / "a.yaml")
    assert entry.train([str(tmp_path / "a.yaml")]) == 2
    assert "other weights than configured" in capsys.readouterr().err
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["vit-tiny12", "vitdet-tiny12", "e-radio-tiny", "timm:resnet18"])
def test_fresh_students_pass_the_guard(name: str) -> None:
    if name not in students:
        pytest.skip(f"there is no {name}")
    student = make_student(name, StudentOptions())
    assert isinstance(student, torch.nn.Module)
    assert first_bad(student.state_dict()) == ""


@pytest.mark.parametrize("target", ["nowhere", "state"])
def test_a_place_for_states_that_leads_nowhere_is_told_before_the_first_step(
    config: TrainConfig, start: Start, target: str
) -> None:
    config.out.mkdir(parents=True)
    (config.out / "state").symlink_to(target)
    run = start(config)
    with pytest.raises(RadioError, match=r"--out .*state: .*; choose a folder that can be written"):
        run.train()
    assert run.step == 0 and not (config.out / "metrics.jsonl").exists()


def test_a_state_beyond_the_last_step_is_refused(config: TrainConfig, start: Start) -> None:
    start(config, steps=3).train()
    state = (config.out / "state" / "step-000003").rename(config.out / "state" / "step-000004")
    set_counts(state, 4.0)
    notes = state / "run.json"
    notes.write_text(notes.read_text().replace('"step": 3', '"step": 4', 1))
    with pytest.raises(RadioError, match=r"step-000004: is beyond the run's last step, 3, .*; move it away"):
        start(config, steps=3)
    state.rename(config.out / "elsewhere")
    assert start(config, steps=3).step == 0
