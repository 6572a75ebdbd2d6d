"""The loop: what it writes, that it repeats bit for bit, and how it stops."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import radio
from evals.core.report import Metric
from evals.core.suite import Outcome
from radio import checkpoint
from radio.config import read_yaml
from radio.errors import CheckpointError, ConfigError, DataError, RadioError
from radio.model import RadioModel
from radio.students import StudentOptions
from radio.students.vit import ViT
from radio.teachers import families
from radio.types import Features
from train import learner
from train import trainer as module
from train.config import DataConfig, TrainConfig
from train.optim import learning_rate
from train.sampling import draw_window
from train.trainer import Run

from .conftest import TEACHERS, Start, fill_folder, losses_of, read_records, same_weights, untimed
from .tiny_teachers import tiny


def test_a_run_leaves_what_it_should(config: TrainConfig, start: Start) -> None:
    run = start(config)
    path = run.train()
    assert path == config.out / "ckpt.pt"
    assert {file.name for file in config.out.iterdir()} == {
        "ckpt.pt",
        "config.yaml",
        "metrics.jsonl",
        "state",
    }
    assert {file.name for file in (config.out / "state").iterdir()} == {"step-000010", "step-000012"}
    records = read_records(config.out)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["samples"] for record in records] == [4 * step for step in range(1, 13)]
    assert [record["lr"] for record in records] == [
        learning_rate(step, 12, config.optim) for step in range(12)
    ]
    parts = {f"{t.name}/{kind}" for t in TEACHERS for kind in ("summary", "spatial", "centred_cosine")}
    assert parts <= records[0].keys()
    for record in records:
        total = sum(
            record[f"{t.name}/spatial"] + t.summary_weight * record[f"{t.name}/summary"] for t in TEACHERS
        )
        assert record["loss"] == pytest.approx(total, rel=1e-6)
        assert 0 <= record["data_wait"] <= 1
        assert record["images_per_second"] == pytest.approx(4 / record["seconds"])
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert read_yaml(TrainConfig, config.out / "config.yaml") == config


def test_the_checkpoint_is_a_backbone(config: TrainConfig, start: Start) -> None:
    run = start(config, steps=2)
    model = radio.load_backbone(str(run.train()))
    assert isinstance(model, RadioModel)
    assert (model.name, model.native_size, model.summary_dim) == ("run", (48, 48), 128)
    assert model.card["provenance"]["step"] == 2
    assert model.card["provenance"]["samples"] == 8
    assert [teacher["name"] for teacher in model.card["teachers"]] == ["clip", "dense", "sam"]
    features = model(torch.rand(2, 3, 48, 48))
    assert model.adapt("clip", features).summary.shape == (2, 12)
    assert model.adapt("sam", features, (6, 6)).tokens.shape == (2, 36, 20)


def test_log_records_are_means_over_the_steps_between(config: TrainConfig, start: Start) -> None:
    start(config, out=config.out / "each").train()
    start(config, out=config.out / "fives", log_every=5).train()
    each, fives = losses_of(config.out / "each"), read_records(config.out / "fives")
    assert [record["step"] for record in fives] == [5, 10, 12]
    spans = [each[:5], each[5:10], each[10:]]
    assert [record["loss"] for record in fives] == pytest.approx([sum(s) / len(s) for s in spans], rel=1e-9)


def test_an_equal_run_is_equal_and_another_seed_is_not(config: TrainConfig, start: Start) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        start(config, out=config.out / name, seed=seed, steps=6).train()
    assert untimed(config.out / "a") == untimed(config.out / "b")
    assert same_weights(config.out / "a", config.out / "b")
    assert losses_of(config.out / "c") != losses_of(config.out / "a")


def test_workers_change_nothing(config: TrainConfig, start: Start) -> None:
    for workers in (0, 2):
        data = replace(config.data, workers=workers)
        start(config, out=config.out / str(workers), data=data, steps=5).train()
    assert untimed(config.out / "0") == untimed(config.out / "2")


def test_loader_processes_end_well(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is forked by the thread in which the teachers work fails as it ends, and torch may notice."""
    workers: set[Any] = set()
    run = start(config, data=replace(config.data, workers=2), steps=16)  # a worker at its end is gone
    genuine = run.advance

    def watched(batch: module.Batch) -> None:
        workers.update(multiprocessing.active_children())
        genuine(batch)

    monkeypatch.setattr(run, "advance", watched)
    run.train()
    assert [worker.exitcode for worker in workers] == [0, 0]


class StoppedError(Exception):
    """What a kill is here."""


def run_until(run: Run, name: str, call: int) -> None:
    """Train until the trainer calls its function of this name for the n-th time."""
    owner = module if hasattr(module, name) else learner
    genuine: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(1, 1000))

    def stopping(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise StoppedError
        return genuine(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(StoppedError):
            run.train()


@pytest.mark.parametrize(
    ("name", "call", "log_every", "step"),
    [
        ("teacher_features", 9, 4, 5),
        ("gather_weights", 2, 1, 5),  # in the save of step 10
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


def test_the_runs_own_settings_file_runs_it_again(config: TrainConfig, start: Start) -> None:
    start(config, steps=4).train()
    again = read_yaml(TrainConfig, config.out / "config.yaml")
    start(again, out=config.out / "again").train()
    assert losses_of(config.out / "again") == losses_of(config.out)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"steps": 13},
        {"summary": "mean"},
        {"teachers": TEACHERS[:2]},
        {"precision": "bf16"},
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


def test_other_pictures_need_another_folder(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mine", 5)
    data = DataConfig(images=(folder,), workers=0)
    start(config, steps=1, data=data).train()
    (folder / "004.png").unlink()
    with pytest.raises(CheckpointError, match="holds a run with other settings"):
        start(config, steps=1, data=data)


def test_settings_that_do_not_decide_the_weights_may_change(config: TrainConfig, start: Start) -> None:
    run_until(start(config), "teacher_features", 8)
    data = replace(config.data, workers=1, max_broken=0.5)
    cache = replace(config.cache, confirm=False)
    run = start(
        config,
        log_every=3,
        save_every=2,
        keep_last=1,
        max_skipped=2,
        data=data,
        cache=cache,
        recipe="other",
        score=("knn",),
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
    genuine = run.advance

    def watched(batch: module.Batch) -> None:
        genuine(batch)
        weights.append(next(run.model.parameters()).detach().clone())

    monkeypatch.setattr(run, "advance", watched)
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
    settings: dict[str, Any] = {"log_every": log_every, "save_every": save_every, "max_skipped": 3}
    with pytest.raises(
        RadioError,
        match=r"[34] steps in a row were left out, not finite: clip/spatial; what was saved last stands",
    ):
        start(config, **settings).train()
    found = checkpoint.load(config.out / "ckpt.pt")
    assert found.card["provenance"]["step"] == saved
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    assert start(config, **settings).step == saved


def test_a_run_that_is_asked_to_stop_saves_and_ends_like_an_undisturbed_one(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config, log_every=4, out=config.out / "whole").train()
    for name, step in ((signal.SIGTERM, 6), (signal.SIGUSR1, 7)):
        run = start(config, log_every=4)
        genuine = run.advance

        def asked(batch: module.Batch, run: Run = run, genuine: Any = genuine, name: Any = name) -> None:
            genuine(batch)
            if run.step + 1 == step:  # noqa: B023 (called in this turn)
                os.kill(os.getpid(), name)

        monkeypatch.setattr(run, "advance", asked)
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
        step = model.card["provenance"]["step"]
        calls.append((step, out.name))
        report: Any = SimpleNamespace(
            task="knn", headline="top1", metrics={"top1": Metric(value=float(step))}
        )
        return [
            Outcome(task="knn", state="done", report=report),
            Outcome(task="zeroshot", state="left out", reason="no text"),
        ]

    monkeypatch.setattr("train.scoring.run_all", run_all)
    return calls


def test_the_student_is_evaluated_on_the_way(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = watch_evaluations(monkeypatch)
    start(config, eval_every=4, log_every=6).train()
    assert calls == [(4, "step-000004"), (8, "step-000008"), (12, "step-000012")]
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
        patch.setattr("train.scoring.load_backbone", lambda spec: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run.train()
    assert calls == []
    again = start(config, eval_every=4)
    assert again.step == 4
    again.train()
    assert [step for step, _ in calls] == [4, 8, 12]
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
    assert [step for step, _ in calls] == [4, 12]
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
            lambda path, tensors, card: (
                full() if out.joinpath("ckpt.pt").exists() else genuine(path, tensors, card)
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


def test_the_average_of_the_weights(config: TrainConfig, start: Start) -> None:
    run = start(config, ema=0.75, save_every=4, steps=7)
    wanted = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    genuine = run.advance

    def watched(batch: module.Batch) -> None:
        genuine(batch)
        for name, weight in run.model.named_parameters():
            wanted[name] = 0.75 * wanted[name] + 0.25 * weight.detach()

    run.advance = watched  # type: ignore[method-assign]
    run.train()
    found = checkpoint.load(config.out / "ckpt-ema.pt").tensors
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    weights = checkpoint.load(config.out / "ckpt.pt").tensors
    assert found.keys() == weights.keys()
    assert not all(torch.equal(found[name], weights[name]) for name in found)
    run_until(start(config, ema=0.75, save_every=4, steps=7, out=config.out / "b"), "teacher_features", 6)
    again = start(config, ema=0.75, save_every=4, steps=7, out=config.out / "b")
    assert again.step == 4
    again.train()
    resumed = checkpoint.load(config.out / "b" / "ckpt-ema.pt").tensors
    assert all(torch.equal(found[name], resumed[name]) for name in found)
    model = radio.load_backbone(str(config.out / "ckpt-ema.pt"))
    assert model.summary_dim == 128


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


def test_a_few_broken_pictures_are_counted(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 10, broken=2)
    start(config, data=DataConfig(images=(folder,), workers=0), batch_size=6, steps=4).train()
    counts = [record["broken"] for record in read_records(config.out)]
    assert counts[1] >= 2  # an epoch is two steps, and each broken picture is met once in it
    assert counts[-1] >= 4
    assert counts == sorted(counts)


def test_the_count_of_broken_pictures_survives_a_stop(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    folder = fill_folder(tmp_path / "mixed", 10, broken=1)
    mixed = replace(config, data=DataConfig(images=(folder,), workers=0))
    start(mixed, out=config.out / "whole").train()
    run_until(start(mixed), "teacher_features", 8)
    start(mixed).train()
    assert untimed(config.out) == untimed(config.out / "whole")


def test_too_many_broken_pictures_stop_the_run(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    folder = fill_folder(tmp_path / "mixed", 3, broken=9)
    with pytest.raises(
        DataError, match=r"\d+ of \d+ pictures cannot be read; mend the data or raise --data\.max"
    ):
        start(config, data=DataConfig(images=(folder,), workers=0)).train()


def test_shards_and_scenes_are_data_too(config: TrainConfig, start: Start, tmp_path: Path) -> None:
    data = DataConfig(scenes=40, workers=0)
    run = start(config, data=data, steps=2)
    run.train()
    assert run.model.card["data"]["sources"][0]["path"] == "scenes:train?seed=2"


@pytest.mark.parametrize("summary", ["per-teacher", "mean"])
def test_other_summaries_train(config: TrainConfig, start: Start, summary: str) -> None:
    run = start(config, summary=summary, steps=4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    model = radio.load_backbone(str(run.train()))
    assert model.summary_dim == (384 if summary == "per-teacher" else 128)
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    # SAM's summary has no weight in the loss: its head moves by weight decay alone.
    still = {n for n in before if n.startswith("adaptors.sam.summary.") or not before[n].numel()}
    assert moved >= set(before) - still


def test_sampled_windows_reach_the_student(
    config: TrainConfig, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int | None] = []
    genuine = ViT.with_window

    def watched(self: ViT, side: int | None) -> ViT:
        used.append(side)
        return genuine(self, side)

    monkeypatch.setattr(ViT, "with_window", watched)
    run = start(config, student="vitdet-tiny12", resolution=96, windows=(2, 4, 5), batch_size=2)
    used.clear()
    run.train()
    assert run.windows == {96: (2, 4)}
    assert used == [draw_window((2, 4), 0, step) for step in range(12)]
    assert set(used) == {2, 4}


def test_a_window_fixed_by_the_options(config: TrainConfig, start: Start) -> None:
    options = StudentOptions(window=2)
    model = radio.load_backbone(str(start(config, student="vitdet-tiny12", options=options, steps=1).train()))
    assert isinstance(model, RadioModel)
    assert model.config.options.window == 2


def test_the_student_may_see_another_resolution_beside_one_teacher(config: TrainConfig, start: Start) -> None:
    teachers = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=96, batch_size=2))
    run = start(config, teachers=teachers, steps=2)
    assert run.sides == (64, 108)
    sides: list[tuple[int, ...]] = []
    run.model.student.register_forward_pre_hook(lambda module, inputs: sides.append(tuple(inputs[0].shape)))
    run.train()
    assert sides == [(4, 3, 48, 48), (2, 3, 96, 96)] * 2
    assert run.model.card["teachers"][2]["student_resolution"] == 96


def test_bf16_on_a_cpu(config: TrainConfig, start: Start) -> None:
    for precision in ("fp32", "bf16"):
        start(config, precision=precision, out=config.out / precision).train()
    exact, low = losses_of(config.out / "fp32"), losses_of(config.out / "bf16")
    assert low != exact
    assert low == pytest.approx(exact, rel=0.03)
    tensors = checkpoint.load(config.out / "bf16" / "ckpt.pt").tensors
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_recomputed_activations_change_nothing(config: TrainConfig, start: Start) -> None:
    for recompute in (False, True):
        options = StudentOptions(recompute=recompute)
        start(config, options=options, out=config.out / str(recompute), steps=3).train()
    assert losses_of(config.out / "True") == pytest.approx(losses_of(config.out / "False"), rel=1e-6)


def test_the_global_generator_decides_nothing(config: TrainConfig, start: Start) -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        start(config, out=config.out / str(seed), steps=3).train()
    assert losses_of(config.out / "1") == losses_of(config.out / "2")


def test_bad_settings_are_told_before_anything_is_written(config: TrainConfig, start: Start) -> None:
    with pytest.raises(ConfigError, match="--log-every 0 cannot be"):
        start(config, log_every=0)
    with pytest.raises(ConfigError, match="unknown student"):
        start(config, student="vit-tiny")
    assert not config.out.exists()


def test_the_settings_file_is_plain(config: TrainConfig, start: Start) -> None:
    start(config, steps=1).train()
    plain = yaml.safe_load((config.out / "config.yaml").read_text())
    assert plain["optim"]["lr"] == 1e-3
    assert plain["teachers"][2]["summary_weight"] == 0.0
    assert plain["data"]["images"] == [str(config.data.images[0])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile
def test_a_compiled_student_trains_alike(config: TrainConfig, start: Start) -> None:
    for compiled in (False, True):
        run: Run = start(config, compile=compiled, out=config.out / str(compiled), steps=3)
        run.train()
    assert losses_of(config.out / "True") == pytest.approx(losses_of(config.out / "False"), rel=1e-4)
    assert "ckpt.pt" in {path.name for path in (config.out / "True").iterdir()}
