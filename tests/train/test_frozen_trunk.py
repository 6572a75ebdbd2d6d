"""The trunk stands still for the first steps, and learns afterwards as if they had not been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from radio.dist import Ranks
from radio.errors import CheckpointError, ConfigError
from train.config import TrainConfig
from train.trainer import Trainer

from .conftest import Start, newest_state, same_weights, untimed
from .ranks import on_ranks
from .test_parallel import PARTITIONED, WAYS, check_alike, trained


def trunk_of(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.get_submodule("student").state_dict().items()}


@pytest.mark.parametrize("kind", ["adamw", "muon", "lamb"])
def test_only_adaptors_learn_first(
    config: TrainConfig, start: Start, kind: Literal["adamw", "muon", "lamb"]
) -> None:
    run = start(config, freeze_trunk_steps=2, optim=replace(config.optim, kind=kind, weight_decay=0.3))
    before, adaptors = trunk_of(run), run.model.get_submodule("adaptors")
    batches = run.batches()
    for step in range(3):
        heads = {name: tensor.clone() for name, tensor in adaptors.state_dict().items()}
        run.train_step(next(batches))
        run.step += 1
        same = [torch.equal(tensor, before[name]) for name, tensor in trunk_of(run).items()]
        assert (all(same), any(same)) == ((True, True) if step < 2 else (False, False))
        moved = [not torch.equal(tensor, heads[name]) for name, tensor in adaptors.state_dict().items()]
        assert sum(moved) >= len(moved) - 8  # SAM's summary, whose loss has no weight, gets no gradient
    counts = {name: int(run.optimizer.state[weight]["step"]) for name, weight in run.model.named_parameters()}
    assert {counts[name] for name in counts if name.startswith("student.")} == {1}
    assert {counts[name] for name in counts if name.startswith("adaptors.")} == {3}


def test_the_first_moments_of_the_trunk_are_those_of_its_first_gradient(
    config: TrainConfig, start: Start
) -> None:
    frozen = start(config, freeze_trunk_steps=1, optim=replace(config.optim, clip=0.0))
    batches = frozen.batches()
    frozen.train_step(next(batches))
    frozen.step += 1
    frozen.train_step(next(batches))
    for name, weight in frozen.model.named_parameters():
        if name.startswith("student."):
            assert weight.grad is not None
            assert torch.allclose(frozen.optimizer.state[weight]["exp_avg"], 0.1 * weight.grad, atol=1e-9)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_resumes_on_both_sides_of_the_border(
    config: TrainConfig, start: Start, tmp_path: Path, stop: int
) -> None:
    frozen = replace(config, freeze_trunk_steps=2, steps=4, save_every=2, ema=0.5)
    start(frozen, out=tmp_path / "whole").train()
    run = start(frozen, out=tmp_path / "parts")
    genuine = run.train_step

    def stopping(batch: Any) -> Tensor:
        applied = genuine(batch)
        run.stop._requested = run.step + 1 == stop
        return applied

    run.train_step = stopping  # type: ignore[method-assign]
    run.train()
    assert run.step == stop
    start(frozen, out=tmp_path / "parts").train()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    counts = {
        name: int(tensor) for name, tensor in newest_state(tmp_path / "parts").items() if ".step." in name
    }
    assert {count for name, count in counts.items() if "model.student" in name} == {2}


def test_ddp_is_fsdp_is_one_process(config: TrainConfig, tmp_path: Path) -> None:
    frozen = replace(
        config,
        teachers=PARTITIONED,
        batch_size=16,
        steps=5,
        ema=0.8,
        freeze_trunk_steps=2,
        save_every=2,
        optim=replace(config.optim, lr=1e-4),
    )
    trained(frozen, Ranks(), tmp_path / "one")
    ways: dict[str, dict[str, Any]] = {
        "ddp": {**WAYS["ddp"], "grad_accum_steps": 2},
        "fsdp": WAYS["fsdp"],
    }

    def work(group: Ranks) -> None:
        for way, changes in ways.items():
            trained(frozen, group, tmp_path / way, **changes)

    on_ranks(4, tmp_path / "ranks", work)
    for way in ways:
        check_alike(tmp_path / "one", tmp_path / way)


def test_a_trunk_that_never_learns_and_other_numbers_of_steps_are_errors(
    config: TrainConfig, start: Start
) -> None:
    with pytest.raises(ConfigError, match="would learn in none of the 12 steps; give fewer"):
        start(config, freeze_trunk_steps=12)
    with pytest.raises(ConfigError, match="--freeze-trunk-steps: -1 is out of bounds"):
        start(config, freeze_trunk_steps=-1)
    start(config, freeze_trunk_steps=2, steps=5).train()
    with pytest.raises(CheckpointError, match="freeze_trunk_steps was 2 and is 3"):
        start(config, freeze_trunk_steps=3, steps=5)
