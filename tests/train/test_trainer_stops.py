"""Runs that are stopped, by a kill, a signal, a full disk or losses that are not finite, and go on."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from evals.core.report import Metric
from evals.core.suite import Outcome
from evals.knn import KnnSettings
from radio import checkpoint
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.model import RadioModel
from radio.students import ViTOptions
from radio.teachers import families
from radio.types import Features
from train import trainer as module
from train.config import DataConfig, LossConfig, TrainConfig
from train.trainer import Trainer

from .conftest import TEACHERS, Start, fill_folder, read_records, same_weights, untimed
from .stopping import run_until
from .tiny_teachers import tiny


@pytest.mark.parametrize(
    ("name", "call", "log_every", "step"),
    [
        ("teacher_features", 9, 4, 5),
        ("gather", 2, 1, 5),  # in the save of step 10
        ("learning_rate", 22, 4, 10),  # asked for both groups of parameters
    ],
)
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    config: TrainConfig, start: Start, name: str, call: int, log_every: int, step: int
) -> None:
    start(config, out=config.out / "whole", log_every=log_every).train()
    out = config.out / "stopped"
    run_until(start(config, out=out, log_every=log_every), name, call)
    resumed = start(config, out=out, log_every=log_every)
    assert resumed.step == step
    resumed.train()
    assert untimed(out) == untimed(config.out / "whole")
    assert same_weights(out, config.out / "whole")


def test_batch_norms_and_channels_last_weights_go_on_too(config: TrainConfig, start: Start) -> None:
    hybrid = replace(config, student="e-radio-tiny", resolution=96, steps=4, save_every=2)
    start(hybrid, out=config.out / "whole").train()
    out = config.out / "stopped"
    run_until(start(hybrid, out=out), "teacher_features", 4)
    resumed = start(hybrid, out=out)
    assert resumed.step == 2
    resumed.train()
    assert untimed(out) == untimed(config.out / "whole")
    assert same_weights(out, config.out / "whole")


def test_a_finished_run_is_not_run_again(config: TrainConfig, start: Start) -> None:
    path = start(config, steps=2).train()
    before = path.stat().st_mtime_ns, (config.out / "metrics.jsonl").read_bytes()
    assert start(config, steps=2).train() == path
    assert (path.stat().st_mtime_ns, (config.out / "metrics.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 13},
        {"summary": "mean"},
        {"teachers": TEACHERS[:2]},
        {"precision": "bf16"},
        {"loss": LossConfig(summary="mse")},
        {"options": ViTOptions(cpe=False)},
    ],
)
def test_other_settings_need_another_folder(
    config: TrainConfig, start: Start, changes: dict[str, object]
) -> None:
    start(config, steps=1, save_every=1).train()
    with pytest.raises(
        CheckpointError, match=r"run: holds a run with other settings \(.*\); give another --out, or --re"
    ):
        start(config, **{"steps": 1, "save_every": 1, **changes})


def test_other_images_need_another_folder(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mine", 5)
    data = DataConfig(images=(folder,), workers=0)
    start(config, steps=1, data=data).train()
    (folder / "004.png").unlink()
    with pytest.raises(CheckpointError, match="holds a run with other settings"):
        start(config, steps=1, data=data)


def test_settings_that_do_not_decide_the_weights_may_change(config: TrainConfig, start: Start) -> None:
    run_until(start(config), "teacher_features", 8)
    data = replace(config.data, workers=1, max_error_fraction=0.5)
    cache = replace(config.cache, confirm=False)
    run = start(
        config,
        log_every=3,
        save_every=2,
        keep_last=1,
        max_nonfinite_steps=2,
        data=data,
        cache=cache,
        recipe="other",
        score=("knn",),
        tasks={"knn": KnnSettings(k=(5,))},
        data_root=config.out,
    )
    assert run.step == 5
    run.train()
    start(config, out=config.out / "whole").train()
    assert same_weights(config.out, config.out / "whole")


def test_restart_begins_anew(config: TrainConfig, start: Start) -> None:
    start(config, steps=5, seed=3).train()
    run_until(start(config, restart=True, steps=4), "teacher_features", 2)
    assert not (config.out / "state").exists()  # the old state must not be taken up with the new log
    start(config, steps=4).train()
    start(config, out=config.out / "fresh", steps=4).train()
    assert untimed(config.out) == untimed(config.out / "fresh")


def test_a_damaged_state_names_restart(config: TrainConfig, start: Start) -> None:
    start(config, steps=2).train()
    (config.out / "state" / "step-000002" / "run.json").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a whole training state; start again with --restart"):
        start(config, steps=2)
    assert start(config, steps=2, restart=True).step == 0


def poison(monkeypatch: pytest.MonkeyPatch, calls: Collection[int], names: Collection[str]) -> None:
    """Let these teachers give NaN for their n-th batches."""
    genuine = module.teacher_features
    count = iter(range(1, 1000))

    def poisoned(*arguments: Any) -> dict[str, Features]:
        features = genuine(*arguments)
        spoilt = names if next(count) in calls else ()
        return {
            name: f._replace(tokens=f.tokens * float("nan")) if name in spoilt else f
            for name, f in features.items()
        }

    monkeypatch.setattr(module, "teacher_features", poisoned)


def test_steps_that_are_not_finite_are_left_out_and_named(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, (3, 4, 8), ("dense", "sam"))
    run = start(config, log_every=4, ema=0.5)
    weights: list[Tensor] = []
    genuine = run.train_step

    def watched(batch: module.Batch) -> None:
        genuine(batch)
        weights.append(next(run.model.parameters()).detach().clone())

    monkeypatch.setattr(run, "train_step", watched)
    run.train()
    moved = [not torch.equal(a, b) for a, b in pairwise(weights)]
    assert moved == [step not in (3, 4, 8) for step in range(2, 13)]
    records = read_records(config.out)
    assert [record["skipped"] for record in records] == [2, 3, 3]
    assert [record.get("not_finite") for record in records] == ["dense/spatial, sam/spatial"] * 2 + [None]
    assert all(math.isfinite(record["loss"]) for record in records)
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 4: 2 steps were left out, not finite: dense/spatial, sam/spatial\n" in told
    assert "step 8: 1 step was left out" in told
    for name in ("ckpt.pt", "ckpt-ema.pt"):
        found = checkpoint.load(config.out / name).tensors
        assert all(torch.isfinite(tensor).all() for tensor in found.values())


def test_the_count_of_steps_left_out_survives_a_stop(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, (3, 5), ("clip",))
        start(config, log_every=7, out=config.out / "whole").train()
    with monkeypatch.context() as patch:
        poison(patch, (3, 5), ("clip",))
        run_until(start(config, log_every=7), "teacher_features", 8)
    start(config, log_every=7).train()
    assert untimed(config.out) == untimed(config.out / "whole")
    assert [record["skipped"] for record in read_records(config.out)] == [2, 2]


@pytest.mark.parametrize(("log_every", "save_every", "saved"), [(1, 5, 5), (12, 1, 8), (12, 2, 8)])
def test_too_many_steps_in_a_row_stop_the_run_and_the_last_save_stands(
    config: TrainConfig,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
    save_every: int,
    saved: int,
) -> None:
    poison(monkeypatch, range(7, 100), ("clip",))
    settings: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "max_nonfinite_steps": 3}
    with pytest.raises(
        RadioError,
        match=r"[34] steps in a row were left out, not finite: clip/spatial; what was saved last stands",
    ):
        start(config, **settings).train()
    found = checkpoint.load(config.out / "ckpt.pt")
    assert found.metadata["provenance"]["step"] == saved
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    assert start(config, **settings).step == saved


def test_a_short_run_without_one_good_step_has_no_result(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(1, 100), ("clip",))
    with pytest.raises(RadioError, match=r"all of the 3 steps were left out, .*; nothing was learned"):
        start(config, steps=3).train()
    assert not (config.out / "ckpt.pt").exists()


def test_a_run_that_is_asked_to_stop_saves_and_ends_like_an_undisturbed_one(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config, log_every=4, out=config.out / "whole").train()
    for name, step in ((signal.SIGTERM, 6), (signal.SIGUSR1, 7)):
        run = start(config, log_every=4)
        genuine = run.train_step

        def asked(batch: module.Batch, run: Trainer = run, genuine: Any = genuine, name: Any = name) -> None:
            genuine(batch)
            if run.step + 1 == step:  # noqa: B023 (called in this turn)
                os.kill(os.getpid(), name)

        monkeypatch.setattr(run, "train_step", asked)
        run.train()
        assert (run.step, run.stopped) == (step, True)
    run = start(config, log_every=4)
    assert run.step == 7
    run.train()
    assert not run.stopped
    assert untimed(config.out) == untimed(config.out / "whole")
    assert same_weights(config.out, config.out / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def watch_evaluations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The step of each checkpoint that is evaluated, and the folder of its reports; the score is the step."""
    calls: list[tuple[int, str]] = []

    def run_all(model: RadioModel, jobs: Any, out: Path, **_: Any) -> list[Outcome]:
        step = model.metadata.get("provenance", {"step": 0})["step"]  # 0: the untrained student
        calls.append((step, out.name))
        report: Any = SimpleNamespace(
            task="knn", primary_metric="top1", metrics={"top1": Metric(value=float(step))}
        )
        return [
            Outcome(task="knn", state="done", report=report),
            Outcome(task="zeroshot", state="left out", reason="no text"),
        ]

    monkeypatch.setattr("evals.core.suite.run_all", run_all)
    return calls


def test_the_student_is_evaluated_on_the_way(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_evaluations(monkeypatch)
    start(config, eval_every=4, log_every=6).train()
    assert calls == [(4, "step-000004"), (0, "reports"), (8, "step-000008"), (12, "step-000012")]
    records = [(record["step"], record.get("knn/top1")) for record in read_records(config.out)]
    assert records == [(4, 4.0), (6, None), (8, 8.0), (12, None), (12, 12.0)]
    start(config, out=config.out / "without", log_every=6).train()
    assert same_weights(config.out, config.out / "without")


def test_an_evaluation_that_was_not_got_to_is_made_up_for(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_evaluations(monkeypatch)
    run = start(config, eval_every=4)
    with monkeypatch.context() as patch:
        patch.setattr("train.scoring.load_backbone", lambda spec, **_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run.train()
    assert calls == []
    again = start(config, eval_every=4)
    assert again.step == 4
    again.train()
    assert [step for step, _ in calls] == [4, 0, 8, 12]
    steps = [record["step"] for record in read_records(config.out) if "knn/top1" in record]
    assert steps == [4, 8, 12]


def test_a_checkpoint_that_could_not_be_written_is_not_evaluated(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_evaluations(monkeypatch)
    genuine, count = checkpoint.save, iter(range(1, 100))

    def full(*arguments: Any) -> str:
        if next(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return genuine(*arguments)

    monkeypatch.setattr(checkpoint, "save", full)
    run = start(config, eval_every=4, save_every=100)
    run.train()
    assert [step for step, _ in calls] == [4, 0, 12]
    told = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        "the state of step 8 could not be written ([Errno 28] No space left on device); that of step 4"
        in told
    )


def test_a_full_disk_at_the_end_is_an_error_and_the_run_can_go_on(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    start(config, out=config.out / "whole").train()
    out, genuine = config.out / "full", checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint,
            "save",
            lambda path, tensors, metadata: (
                full() if out.joinpath("ckpt.pt").exists() else genuine(path, tensors, metadata)
            ),
        )
        with pytest.raises(
            RadioError, match=r"the state of step 12 could not be written .*; that of step 5 stands"
        ):
            start(config, out=out).train()
    run = start(config, out=out)
    assert run.step == 5
    run.train()
    assert same_weights(out, config.out / "whole")


def test_unknown_evaluators_are_told_before_the_first_step(config: TrainConfig, start: Start) -> None:
    with pytest.raises(ConfigError, match="unknown evaluator 'kn'; did you mean knn"):
        start(config, eval_every=4, eval_tasks=("kn",))


def test_another_teacher_file_of_that_name_is_refused(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config, steps=1).train()
    other = tiny("clip3", None)
    monkeypatch.setitem(
        families._entries, "tiny", lambda name, file: other if name == "clip" else tiny(name, file)
    )
    with pytest.raises(CheckpointError, match=r"other settings \(teacher clip's weights was"):
        start(config, steps=1)
