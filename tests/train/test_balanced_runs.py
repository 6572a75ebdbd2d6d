"""Balancers in a run: what the log shows, exact resume, and ranks that do what one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from radio import checkpoint
from radio.dist import Ranks
from radio.errors import ConfigError
from train.config import BalanceConfig, TrainConfig
from train.trainer import Trainer

from .conftest import CPU, TEACHERS, Start, read_records, same_weights, untimed
from .ranks import on_ranks

KINDS = ("uncertainty", "adaloss", "amtml")
MOVING = {f"{t.name}/{kind}_weight" for t in TEACHERS for kind in ("summary", "spatial")}


def balanced(kind: str) -> BalanceConfig:
    return BalanceConfig(kind=kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_shows_the_weights_and_the_loss_that_they_make(
    config: TrainConfig, start: Start, kind: str
) -> None:
    start(config, balance=balanced(kind), steps=4).train()
    records = read_records(config.out)
    for record in records:
        shown = {name for name in record if name.endswith("_weight")}
        assert shown == MOVING - ({"sam/summary_weight"} if kind == "amtml" else set())
    firsts = {"uncertainty": (1, 1, 0), "adaloss": (1, 1, 0), "amtml": (1 / 2, 1 / 3, None)}[kind]
    names = ("clip/summary_weight", "dense/spatial_weight", "sam/summary_weight")
    assert [records[0].get(name) for name in names] == pytest.approx(list(firsts))
    last = records[-1]
    assert last["clip/spatial_weight"] != records[0]["clip/spatial_weight"]
    if kind == "adaloss":
        total = sum(
            last[f"{name}_weight"] * last[name] for name in (n.removesuffix("_weight") for n in MOVING)
        )
        assert last["loss"] == pytest.approx(total, rel=1e-5)
        past = [record["clip/spatial"] for record in records[:3]]
        wanted = (0.99**2 + 0.99 + 1) / (0.99**2 * past[0] + 0.99 * past[1] + past[2])
        assert last["clip/spatial_weight"] == pytest.approx(wanted, rel=1e-5)


def test_the_declared_weights_alone_are_not_logged(config: TrainConfig, start: Start) -> None:
    start(config, steps=1).train()
    assert not [name for name in read_records(config.out)[0] if name.endswith("_weight")]


def stop_at(step: int, run: Trainer) -> None:
    """Train, and break off before the step after this one is done."""
    genuine = run.train_step

    def advance(batch: Any) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        genuine(batch)

    run.train_step = advance  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_undisturbed_one(config: TrainConfig, start: Start, kind: str) -> None:
    """Stopped between two saves, it goes on from the first: averages and predictors included."""
    chosen = replace(config, balance=balanced(kind), steps=8, save_every=3)
    start(chosen, out=config.out / "whole").train()
    stop_at(5, start(chosen, out=config.out / "stopped"))
    resumed = start(chosen, out=config.out / "stopped")
    assert resumed.step == 3
    resumed.train()
    assert untimed(config.out / "stopped") == untimed(config.out / "whole")
    assert same_weights(config.out / "stopped", config.out / "whole")


def test_the_checkpoint_holds_student_and_adaptors_alone(config: TrainConfig, start: Start) -> None:
    plain, other = (
        checkpoint.load(start(config, balance=balanced(kind), steps=1, out=config.out / kind).train())
        for kind in ("naive", "uncertainty")
    )
    assert plain.tensors.keys() == other.tensors.keys()


def test_another_balancer_needs_another_folder(config: TrainConfig, start: Start) -> None:
    start(config, steps=1).train()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        start(config, steps=1, balance=balanced("adaloss"))


def test_amtml_refuses_teachers_that_see_other_images(config: TrainConfig, start: Start) -> None:
    apart = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=72, batch_size=4))
    with pytest.raises(ConfigError, match=r"clip\+dense and sam see other images or sizes"):
        start(config, teachers=apart, balance=balanced("amtml"))


def second_step(config: TrainConfig, group: Ranks) -> dict[str, Tensor]:
    """Gradients and averages that this rank has in the second of two steps without an update between."""
    run = Trainer(config, group, CPU, Console(quiet=True))
    for name, parameter in run.loss.balancer.named_parameters():
        seed = sum(map(ord, name))
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    batches = run.batches()
    run.train_step(next(batches))
    run.step += 1
    run.compute_gradients(next(batches))
    found = {name: p.grad.clone() for name, p in run.loss.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in run.loss.balancer.named_buffers()}


def test_ranks_do_what_one_process_does(config: TrainConfig, tmp_path: Path) -> None:
    still = replace(config, batch_size=8, optim=replace(config.optim, lr=0.0))
    grouped = replace(
        still, teachers=(*TEACHERS[:2], replace(TEACHERS[2], student_resolution=72, batch_size=3))
    )
    ways = [
        *(
            replace(grouped, balance=balanced(kind), ranks_per_group=(2, 1))
            for kind in ("uncertainty", "adaloss")
        ),
        *(replace(still, batch_size=9, balance=balanced(kind)) for kind in KINDS),
        replace(grouped, batch_size=9, balance=balanced("adaloss"), teacher_placement="shared"),
    ]
    alone = [second_step(replace(way, ranks_per_group=()), Ranks()) for way in ways]
    found = on_ranks(3, tmp_path / "ranks", lambda group: [second_step(way, group) for way in ways])
    for wanted, *shared in zip(alone, *found, strict=True):
        assert set().union(*shared) == set(wanted)
        for rank in shared:
            for name, tensor in rank.items():
                rounding = 1e-5 * max(1.0, float(wanted[name].abs().max()))  # sums of many terms in float32
                assert torch.allclose(tensor, wanted[name], rtol=0, atol=rounding), name


def test_what_groups_on_ranks_have_measured_goes_on_in_one_process(
    config: TrainConfig, start: Start, tmp_path: Path
) -> None:
    """Every group's averages are in the state, though no rank has those of all."""
    apart = (*TEACHERS[:2], replace(TEACHERS[2], student_resolution=72, batch_size=3))
    chosen = replace(config, teachers=apart, batch_size=8, balance=balanced("adaloss"), steps=6, save_every=3)
    start(chosen, out=tmp_path / "whole").train()
    shared = replace(chosen, out=tmp_path / "shared", ranks_per_group=(2, 1))
    on_ranks(
        3, tmp_path / "ranks", lambda group: stop_at(4, Trainer(shared, group, CPU, Console(quiet=True)))
    )
    resumed = start(shared, ranks_per_group=())
    assert resumed.step == 3
    resumed.train()
    for one, other in zip(read_records(tmp_path / "whole"), read_records(tmp_path / "shared"), strict=True):
        for name in ("loss", *(f"{name}/spatial_weight" for name in ("clip", "dense", "sam"))):
            assert other[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)
