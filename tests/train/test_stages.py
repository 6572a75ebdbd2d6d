"""Stages against runs made by hand, whole against stopped, and one rank against several."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from radio import checkpoint
from radio.config import read_yaml, write_yaml
from radio.dist import Ranks
from radio.errors import CheckpointError, ConfigError, RadioError
from radio.hub import load_backbone
from train.checkpoints import describe_teachers
from train.cli import main
from train.commands import train_stages
from train.config import DataConfig, NormaliseConfig, OptimConfig, StageConfig, TeacherConfig, TrainConfig
from train.data.crops import seed_of
from train.optim import learning_rate
from train.plan import build_meta_models
from train.stages import Stage, check_stages, find_stage, split_stages
from train.trainer import Trainer

from .conftest import CPU, TEACHERS, Start, newest_state, read_records, same_weights, untimed
from .ranks import on_ranks
from .test_parallel import check_alike

SECOND = StageConfig(steps=4, resolution=60, freeze_trunk_steps=1)
THIRD = StageConfig(
    steps=2,
    batch_size=8,
    teachers=(*TEACHERS[:2], replace(TEACHERS[2], student_resolution=72, batch_size=4)),
    optim=OptimConfig(kind="lamb", lr=1e-4),
)


@pytest.fixture
def staged(config: TrainConfig) -> TrainConfig:
    """Four steps with two teachers, four at a higher resolution, and two with a third teacher beside them."""
    return replace(
        config,
        teachers=TEACHERS[:2],
        steps=4,
        stages=(SECOND, THIRD),
        ema=0.8,
        save_every=3,
        optim=replace(config.optim, lr=1e-4),
    )


def trained(
    config: TrainConfig,
    out: Path,
    *,
    group: Ranks | None = None,
    stop: int = 0,
    console: Console | None = None,
    restart: bool = False,
) -> Path | None:
    """Train in a folder; a wish to stop comes during the step that makes it `stop` steps."""
    genuine = Trainer.train_step

    def stopping(run: Trainer, batch: Any) -> Tensor:
        applied = genuine(run, batch)
        early = 2 if run.ranks.world > 1 else 1  # several ranks stop one step later
        run.stop._requested = run.stop._requested or run.step + early == stop
        return applied

    Trainer.train_step = stopping  # type: ignore[method-assign]
    try:
        quiet = console or Console(quiet=True)
        return train_stages(replace(config, out=out), group or Ranks(), CPU, quiet, restart=restart)
    finally:
        Trainer.train_step = genuine  # type: ignore[method-assign]


def tensors_of(file: Path) -> dict[str, Tensor]:
    return checkpoint.load(file).tensors


def test_settings_of_each_stage_by_hand(staged: TrainConfig) -> None:
    first, second, third = split_stages(staged)
    assert first.config == replace(staged, stages=())
    assert second.config == replace(
        first.config, steps=4, resolution=60, freeze_trunk_steps=1, seed=seed_of(0, "stage", 1)
    )
    assert third.config.resolution == 60  # as in the stage before
    assert third.config.freeze_trunk_steps == 0
    assert (third.config.teachers, third.config.optim) == (THIRD.teachers, THIRD.optim)
    assert [(stage.first_step, stage.last_step) for stage in (first, second, third)] == [
        (0, 4),
        (4, 8),
        (8, 10),
    ]
    assert [stage.first_sample for stage in (first, second, third)] == [0, 16, 32]
    assert [stage.is_last for stage in (first, second, third)] == [False, False, True]
    assert split_stages(replace(staged, stages=())) == (
        Stage(config=replace(staged, stages=()), run=replace(staged, stages=())),
    )


def test_a_stage_is_a_run_that_starts_from_the_one_before(
    staged: TrainConfig, start: Start, tmp_path: Path
) -> None:
    whole = replace(staged, stages=(SECOND,), ema=0.0)
    trained(whole, tmp_path / "staged")
    start(replace(whole, stages=()), out=tmp_path / "first").train()
    by_hand = replace(split_stages(whole)[1].config, init=str(tmp_path / "first" / "ckpt.pt"))
    start(by_hand, out=tmp_path / "second").train()
    found, wanted = (tensors_of(tmp_path / name / "ckpt.pt") for name in ("staged", "second"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    moments = [newest_state(tmp_path / name) for name in ("staged", "second")]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    records = read_records(tmp_path / "staged")
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["samples"] for record in records] == list(range(4, 36, 4))
    rates = [learning_rate(step, 4, whole.optim) for step in range(4)]
    assert [record["lr"] for record in records] == pytest.approx(2 * rates)
    second = read_records(tmp_path / "second")
    assert [record["loss"] for record in records[4:]] == [record["loss"] for record in second]
    written = read_yaml(TrainConfig, tmp_path / "staged" / "config.yaml")
    assert (written.steps, written.resolution, written.stages) == (4, 48, (SECOND,))


def test_the_average_goes_on_through_the_stages(staged: TrainConfig, tmp_path: Path) -> None:
    """A stage without a learning rate leaves the weights; the average goes on from where it was to them."""
    still = StageConfig(steps=2, optim=replace(staged.optim, lr=0.0))
    trained(replace(staged, stages=(still,)), tmp_path / "run")
    trained(replace(staged, stages=()), tmp_path / "first")
    weights, average = (tensors_of(tmp_path / "first" / name) for name in ("ckpt.pt", "ckpt-ema.pt"))
    found = tensors_of(tmp_path / "run" / "ckpt-ema.pt")
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.numel():
            wanted = weight + 0.8**2 * (average[name] - weight)
            assert torch.allclose(found[name], wanted, atol=1e-6), name


@pytest.mark.parametrize("stop", [3, 4, 5, 8, 9])
def test_a_run_stopped_anywhere_goes_on_exactly(staged: TrainConfig, tmp_path: Path, stop: int) -> None:
    trained(staged, tmp_path / "whole")
    assert trained(staged, tmp_path / "parts", stop=stop) is None
    records = read_records(tmp_path / "parts")
    assert records[-1]["step"] == stop
    done = trained(staged, tmp_path / "parts")
    assert done == tmp_path / "parts" / "ckpt.pt"
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    trained(staged, tmp_path / "parts")  # nothing is left to do
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [3, 4])
def test_two_ranks_stopped_near_a_border_go_on_exactly(
    staged: TrainConfig, tmp_path: Path, stop: int
) -> None:
    for number, (name, last) in enumerate((("whole", 0), ("parts", stop), ("parts", 0))):
        on_ranks(
            2,
            tmp_path / f"meeting{number}",
            lambda group, out=tmp_path / name, last=last: trained(staged, out, group=group, stop=last),
        )
        assert not last or read_records(tmp_path / "parts")[-1]["step"] == stop
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    for file in ("ckpt.pt", "ckpt-ema.pt"):
        whole, parts = (tensors_of(tmp_path / name / file) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)


def test_features_are_normalised_anew_in_every_stage(staged: TrainConfig, tmp_path: Path) -> None:
    normalised = replace(staged, normalise=NormaliseConfig(kind="phi-s", steps=2))
    trained(normalised, tmp_path / "whole")
    trained(normalised, tmp_path / "parts", stop=6)
    trained(normalised, tmp_path / "parts")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    losses = [record["clip/spatial"] for record in read_records(tmp_path / "whole")]
    assert losses[4] < losses[0]  # the head goes on from where it was, in the new targets' space


def test_a_run_goes_on_with_other_ranks_in_every_stage(staged: TrainConfig, tmp_path: Path) -> None:
    staged = replace(staged, stages=(SECOND, replace(THIRD, steps=4)))
    trained(staged, tmp_path / "one")
    moved = tmp_path / "moved"

    def until(stop: int, **changes: Any) -> Callable[[Ranks], Path | None]:
        return lambda group: trained(replace(staged, **changes), moved, group=group, stop=stop)

    assert on_ranks(2, tmp_path / "two", until(3)) == [None, None]
    shared = {"parallel": "fsdp", "teacher_placement": "shared"}
    assert on_ranks(4, tmp_path / "four", until(6, **shared)) == [None] * 4
    on_ranks(2, tmp_path / "sharded", until(10, **shared))
    assert read_records(moved)[-1]["step"] == 10
    trained(staged, moved)
    check_alike(tmp_path / "one", moved)


def test_a_finished_run_gets_another_stage_and_a_passed_one_cannot_change(
    staged: TrainConfig, tmp_path: Path
) -> None:
    trained(staged, tmp_path / "whole")
    trained(replace(staged, stages=()), tmp_path / "run")
    trained(replace(staged, stages=(SECOND,)), tmp_path / "run")
    trained(staged, tmp_path / "run")
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    longer = replace(staged, stages=(replace(SECOND, resolution=72), THIRD))
    with pytest.raises(CheckpointError, match=r"other settings \(resolution was 60 and is 72\)"):
        trained(longer, tmp_path / "run")
    trained(longer, tmp_path / "run", restart=True)
    assert [record["step"] for record in read_records(tmp_path / "run")] == list(range(1, 11))


def test_a_stage_whose_states_are_damaged_begins_again(staged: TrainConfig, tmp_path: Path) -> None:
    staged = replace(staged, stages=(SECOND,), keep_last=3)
    trained(staged, tmp_path / "whole")
    trained(staged, tmp_path / "run", stop=6)
    for file in (tmp_path / "run" / "state" / "step-000006").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert find_stage(split_stages(staged), tmp_path / "run", Ranks()) == 0
    trained(staged, tmp_path / "run")  # ckpt.pt is of step 6, and written again from the state of step 4
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "run")
    found, wanted = (tensors_of(tmp_path / name / "ckpt.pt") for name in ("run", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_stage_knows_what_the_run_was_started_from(
    staged: TrainConfig, start: Start, tmp_path: Path
) -> None:
    files = {}
    for seed in (1, 2):
        start(replace(staged, stages=(), ema=0.0, steps=1, seed=seed), out=tmp_path / f"first{seed}").train()
        files[seed] = tmp_path / f"first{seed}" / "ckpt.pt"
    warm = replace(staged, stages=(SECOND,), ema=0.0, init=str(files[1]))
    trained(warm, tmp_path / "run", stop=6)
    with pytest.raises(CheckpointError, match=r"other settings \(init was .* and is null"):
        trained(replace(warm, init=None), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"other settings \(init was "):
        trained(replace(warm, init=str(files[2])), tmp_path / "run")
    moved = shutil.copy(files[1], tmp_path / "moved.pt")
    trained(replace(warm, init=str(moved)), tmp_path / "run")
    metadata = checkpoint.load(tmp_path / "run" / "ckpt.pt").metadata
    fingerprint = load_backbone(str(files[1])).fingerprint
    assert metadata["init"] == {"model": str(moved), "fingerprint": fingerprint}


def test_a_checkpoint_names_the_weights_of_its_stage(staged: TrainConfig) -> None:
    third = split_stages(staged)[2].config
    large = TeacherConfig(name="large", adaptor="sam", model="tiny:sam", student_resolution=96)
    config = replace(third, teachers=(*third.teachers, large))
    weights = []
    for each in (third, config):
        entries = describe_teachers(each, build_meta_models(each).facts)
        weights.append({entry["name"]: entry["summary_weight"] for entry in entries})
    assert weights == [{"clip": 1.0, "dense": 1.0, "sam": 0.0}, {"clip": 1.0, "dense": 1.0, "sam": 1.0}]


def test_a_checkpoint_of_another_step_is_no_start(staged: TrainConfig, tmp_path: Path) -> None:
    trained(staged, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    stage = split_stages(replace(staged, out=tmp_path / "run"))[1]
    with pytest.raises(CheckpointError, match="neither a state of stage 2 nor the checkpoint of step 4"):
        Trainer(stage.config, Ranks(), CPU, Console(quiet=True), stage=stage)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((StageConfig(steps=0),), r"--stages\.0\.steps: 0 is out of bounds"),
        (
            (SECOND, StageConfig(steps=2, freeze_trunk_steps=2)),
            "stage 3: --freeze-trunk-steps 2: the trunk would",
        ),
        ((StageConfig(steps=2, resolution=50),), "stage 2: student vit-tiny12 cannot take 50x50 px"),
        (
            (StageConfig(steps=2, teachers=(TeacherConfig(name="x", model="tiny:clip", resolution=55),)),),
            "stage 2: teacher x cannot take 55x55 px",
        ),
        ((StageConfig(steps=2, batch_size=3),), "stage 2: a batch of 3 cannot be shared evenly by 2 ranks"),
    ],
)
def test_a_later_stage_that_cannot_be_is_an_error_before_the_first(
    staged: TrainConfig, stages: tuple[StageConfig, ...], message: str
) -> None:
    with pytest.raises(RadioError, match=message):
        check_stages(replace(staged, stages=stages), 2)


def test_a_student_of_one_size_cannot_start_from_itself_at_another(staged: TrainConfig) -> None:
    """timm's ViTs resize their positions; CoAtNet has a table for each of its attention layers."""
    vit = replace(
        staged, student="timm:test_vit", resolution=160, stages=(StageConfig(steps=2, resolution=96),)
    )
    check_stages(vit, 1)
    with pytest.raises(
        ConfigError,
        match="stage 2: timm:test_coatnet is built for one size, and its weights have other shapes at 96 px "
        "than at 160 px in the stage before",
    ):
        check_stages(replace(vit, student="timm:test_coatnet"), 1)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"model": "dinov2:vits14@/nope/x.pth"}, r"stage 3: .*/nope/x\.pth"),
        ({"model": "dinov2:vits14"}, "stage 3: dinov2:vits14 needs a weights file"),
        (
            {"model": "tiny:clip2", "fingerprint": "0" * 64},
            "stage 3: teacher late: tiny:clip2 has other weights than",
        ),
    ],
)
def test_a_later_stages_wrong_weights_are_found_before_the_first_step(
    staged: TrainConfig, tmp_path: Path, teacher: dict[str, str], message: str
) -> None:
    late = StageConfig(steps=2, teachers=(TeacherConfig(name="late", **teacher),))  # type: ignore[arg-type]
    run = replace(staged, stages=(SECOND, late))
    check_stages(run, 1)  # a plan needs no weights
    with pytest.raises(CheckpointError, match=message):
        trained(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_class_tokens_keep_their_teachers(staged: TrainConfig) -> None:
    with pytest.raises(
        ConfigError, match="stage 3 has the teachers clip, dense, sam and the one before clip, dense"
    ):
        split_stages(replace(staged, summary="per-teacher"))


def test_the_plan_shows_each_stage_and_their_sum(
    staged: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml(replace(staged, data=DataConfig(scenes=100)), tmp_path / "run.yaml")
    assert main([str(tmp_path / "run.yaml"), "--plan", "--world", "1", "--stages.0.steps", "6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("stage ")] == ["stage 1:", "stage 2:", "stage 3:"]
    assert sum(line.startswith("time: ") for line in lines) == 3
    (total,) = (line for line in lines if line.startswith("all 3 stages: "))
    assert "12 steps in" in total
    assert total.endswith(f"{4 * 4 + 6 * 4 + 2 * 12} images")
